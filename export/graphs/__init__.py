"""The torch graphs that are traced: the generic decoder and the vision towers. No checkpoint, no ONNX."""

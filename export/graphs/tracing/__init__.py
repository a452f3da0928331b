"""From a torch graph to ONNX: signatures, the trace, and how each op is said to a target."""

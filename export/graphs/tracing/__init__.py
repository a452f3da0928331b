"""From a torch graph to ONNX: the trace, and how each op is said to a target."""

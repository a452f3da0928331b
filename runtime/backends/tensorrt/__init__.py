"""TensorRT and TensorRT-RTX as backends, without torch."""

"""The formats of quantized checkpoints, a module each: which tensors a linear map has, and how they become numbers."""

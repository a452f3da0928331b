"""Quantized checkpoints as published: stored tensors proven from headers, read as the matrices they stand for."""

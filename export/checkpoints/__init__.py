"""A checkpoint's files, read as a stranger's: configuration, tensors and where each parameter comes from."""

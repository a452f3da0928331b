"""A checkpoint's tensors: read from their files, loaded while they are used, and written to a bundle's files."""

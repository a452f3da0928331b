"""Engines by TensorRT and TensorRT-RTX: sizes, network and build."""

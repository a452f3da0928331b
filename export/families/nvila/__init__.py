"""NVILA."""

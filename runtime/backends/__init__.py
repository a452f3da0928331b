"""Backends: what executes a segment, a folder each; base.py says what one is."""

"""Engines by torch's inductor: the graphs in plain torch, and their compilation."""

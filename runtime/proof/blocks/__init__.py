"""Proof before a model is there: each op of the graphs and each work of a device, compared with numpy."""

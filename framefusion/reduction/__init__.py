"""The algorithm in numpy: policy (two short vectors in, a plan out), budget and tracks. Knows no model."""

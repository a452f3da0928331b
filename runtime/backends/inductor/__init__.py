"""torch's inductor as a backend, the only one that imports torch, once an engine is opened."""

"""Proof on the device: a bundle's own golden, run by the backend that answers users, and remembered."""

"""Codes by films: what they are calibrated on, all prompts in lockstep through the layers, and whether it helped."""

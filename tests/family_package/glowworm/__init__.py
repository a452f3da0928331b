"""Glowworm, a family that does not exist: SigLIP's tower, a projector of two layers, Qwen2's LLM."""

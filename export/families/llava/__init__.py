"""LLaVA-Video, LLaVA-OneVision and LLaVA-NeXT-Video."""

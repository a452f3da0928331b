"""A conversation as token ids with their positions and embeddings, and back."""

"""What a live model's attention sees: the cache it reads, the mask over it, and the importance taken from it."""

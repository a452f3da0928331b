"""What a live model's attention works with: the cache it reads, the mask over it, and the importance taken from it."""

"""One picture in several tiles or scales, and where their rows lie in it."""

"""Whether a bundle answers as well as another one, before it is published."""

"""transformers' own classes, called with our prompts: what the torch graphs are compared with."""

"""What families read from a checkpoint in the same way: configurations, their defaults, and processors."""

"""Films: the frames that a rule picks, each at its own time."""

"""What is read from and written to the disk with care: the files that are ours, and JSON of unknown origin."""

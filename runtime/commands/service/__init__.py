"""Commands that answer many: a server, and a batch."""

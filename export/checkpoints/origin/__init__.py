"""Where a checkpoint comes from: a folder or the hub, its commit and its licence."""

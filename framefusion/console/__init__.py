"""What both commands say to people: messages and tables, progress, and texts of strangers made fit for a terminal."""

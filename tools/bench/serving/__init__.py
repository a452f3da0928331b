"""Parts of the server's benchmark: its process, what is asked and what is expected, a long mixed load."""

"""What the flags of a question name: the text of --prompt, and films and pictures of files, folders and patterns."""

"""A video file as its container describes it, before anything is decoded: opened, listed, checked for its end."""

"""One answer watched: what became of every token, as values and as a page."""

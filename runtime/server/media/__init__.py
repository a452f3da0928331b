"""What clients of a server show: where it may come from, how it is fetched, and how it is decoded."""

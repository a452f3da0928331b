"""`make gpu`: all that a quarter of an hour on a machine with a GPU can show, by one command."""

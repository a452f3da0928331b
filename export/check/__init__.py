"""Is a bundle right? Its numbers against the torch graphs, and those against transformers' own class."""

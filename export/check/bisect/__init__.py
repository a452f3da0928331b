"""Where two ways of running a bundle part: the graph, then the node."""

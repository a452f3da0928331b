"""A checkpoint under the runtime's own pipeline with its graphs in eager torch: the reference of every build."""

"""The torch ops of our own: those of the decoder and tower graphs, and the reduction at static shapes."""

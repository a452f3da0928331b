"""The machine at hand: processor, GPU, and the folder for what can be made again. Knows no engine."""

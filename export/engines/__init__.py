"""What compiles the graphs of a bundle to engines, a folder for each builder; builder.py says what one is."""

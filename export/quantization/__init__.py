"""Weights in 4 and 8 bits, by blocks of a row: their values, their packing, and how they are made of floats."""

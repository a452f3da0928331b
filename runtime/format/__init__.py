"""The format of a bundle: the records of its manifest, how they are read and checked, and its files. Data only."""

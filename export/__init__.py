"""The export toolchain: a checkpoint in, a bundle of compiled segments out. Needs the `export` extra (torch)."""

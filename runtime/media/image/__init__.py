"""Still pictures: RGB, upright, on white."""

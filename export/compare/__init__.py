"""transformers, transformers with `apply_framefusion`, and a bundle's backends, side by side on one film."""

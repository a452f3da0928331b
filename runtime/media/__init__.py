"""Films and pictures of any origin, as the frames and patches that a family takes."""

"""InternVL in three formats."""

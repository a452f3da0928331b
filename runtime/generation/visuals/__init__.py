"""What a conversation shows, from files to rows of the vision tower, film after film."""

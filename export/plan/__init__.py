"""What a build will write and take, worked out before anything is written."""

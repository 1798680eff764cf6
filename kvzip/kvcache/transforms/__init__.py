"""What can be done to a stored context beside dropping pairs of it. One transform, one file."""

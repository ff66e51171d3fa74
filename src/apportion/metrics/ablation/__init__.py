"""What becomes of the score while players go, or come, in the order of a map."""

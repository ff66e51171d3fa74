"""Class activation maps: weighted sums of an inner layer's channels."""

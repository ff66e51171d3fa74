"""Modified gradients and their products with the input."""

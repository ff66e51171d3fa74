"""Methods that change the backward pass."""

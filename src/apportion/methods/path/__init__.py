"""Methods that accumulate along a path from a baseline."""

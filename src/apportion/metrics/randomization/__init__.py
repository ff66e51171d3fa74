"""Whether a map depends on what the network has learned, and on the class it explains."""

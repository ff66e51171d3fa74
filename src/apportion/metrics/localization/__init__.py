"""Whether a map lies on the object: boxes, masks and polygons as truth."""

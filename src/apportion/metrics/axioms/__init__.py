"""Axioms as measurable quantities: by how much an explanation of this model, here, misses them."""

"""How concentrated and how rough a map is."""

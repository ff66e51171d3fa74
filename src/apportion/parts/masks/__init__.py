"""Masks: which elements form a player, and what stands in for the absent."""

"""Removal: what the score loses when features go, or is worth where they stay or are set."""

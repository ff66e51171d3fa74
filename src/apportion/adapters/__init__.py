"""Adapters: from data to tensors, and back to what a person can look at."""

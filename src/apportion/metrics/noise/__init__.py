"""How noisy a map looks."""

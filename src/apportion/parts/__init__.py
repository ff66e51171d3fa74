"""Parts that recipes are composed of."""

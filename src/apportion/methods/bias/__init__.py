"""Attributions to biases as well as to inputs."""

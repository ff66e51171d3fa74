"""Controls: maps that know nothing of the model, which a metric must tell from those that do."""

from apportion.parts.controls.controls import AllOnes, CenterGaussian, Edges, InputMagnitude, Laplace, Random

__all__ = ["AllOnes", "CenterGaussian", "Edges", "InputMagnitude", "Laplace", "Random"]

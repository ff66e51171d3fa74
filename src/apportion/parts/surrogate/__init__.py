"""Local surrogates: kernels, regressions and selections, all batched; neighborhoods and how far to trust a fit."""

from apportion.parts.surrogate.kernels import Cosine, Distance, Euclid, Exponential, Kernel, Uniform
from apportion.parts.surrogate.neighborhoods import Cloud, Neighborhood
from apportion.parts.surrogate.regressions import BayesianRidge, Fit, Regression, Ridge, Separate
from apportion.parts.surrogate.selections import Best, Everything, Forward, HighestWeights, Selection
from apportion.parts.surrogate.tables import NormalRows, Quartiles
from apportion.parts.surrogate.trust import Trust

__all__ = [
    "BayesianRidge",
    "Best",
    "Cloud",
    "Cosine",
    "Distance",
    "Euclid",
    "Everything",
    "Exponential",
    "Fit",
    "Forward",
    "HighestWeights",
    "Kernel",
    "Neighborhood",
    "NormalRows",
    "Quartiles",
    "Regression",
    "Ridge",
    "Selection",
    "Separate",
    "Trust",
    "Uniform",
]

"""Baselines: the points an explanation is made against."""

from apportion.parts.baselines.adversarial import Nearest, NearestAdversarial
from apportion.parts.baselines.credible import Credible
from apportion.parts.baselines.data import Data, DataMean
from apportion.parts.baselines.extremes import BlackWhite, MaximumDistance
from apportion.parts.baselines.neighbours import Neighbours, k_means
from apportion.parts.baselines.simple import (
    AtInput,
    Baseline,
    Blurred,
    Constant,
    Given,
    Mean,
    Noise,
    Several,
    Zero,
    blur,
    blur_matrix,
)

__all__ = [
    "AtInput",
    "Baseline",
    "BlackWhite",
    "Blurred",
    "Constant",
    "Credible",
    "Data",
    "DataMean",
    "Given",
    "MaximumDistance",
    "Mean",
    "Nearest",
    "NearestAdversarial",
    "Neighbours",
    "Noise",
    "Several",
    "Zero",
    "blur",
    "blur_matrix",
    "k_means",
]

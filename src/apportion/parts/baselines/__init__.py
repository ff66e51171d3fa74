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
from apportion.parts.baselines.substrates import NetworkZero, RISEBlur, UniformNoise

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
    "NetworkZero",
    "Noise",
    "RISEBlur",
    "Several",
    "UniformNoise",
    "Zero",
    "blur",
    "blur_matrix",
    "k_means",
]

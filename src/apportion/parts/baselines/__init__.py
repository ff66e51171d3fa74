"""Baselines: the points an explanation is made against."""

from apportion.parts.baselines.simple import (
    AtInput,
    Baseline,
    Blurred,
    Constant,
    Given,
    Mean,
    Noise,
    Zero,
    blur,
    blur_matrix,
)

__all__ = [
    "AtInput",
    "Baseline",
    "Blurred",
    "Constant",
    "Given",
    "Mean",
    "Noise",
    "Zero",
    "blur",
    "blur_matrix",
]

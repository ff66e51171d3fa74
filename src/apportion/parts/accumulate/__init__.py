"""Accumulators: what is made of the legs of a path."""

from apportion.parts.accumulate.accumulator import (
    Accumulator,
    Dot,
    Expectation,
    Gathered,
    ImportantDirection,
    Split,
)
from apportion.parts.accumulate.valid import ValidFeatures

__all__ = [
    "Accumulator",
    "Dot",
    "Expectation",
    "Gathered",
    "ImportantDirection",
    "Split",
    "ValidFeatures",
]

"""Paths from a starting point to the example."""

from apportion.parts.paths.curve import Curve
from apportion.parts.paths.path import Legs, Path, Walk
from apportion.parts.paths.straight import Straight

__all__ = ["Curve", "Legs", "Path", "Straight", "Walk"]

"""Paths from a starting point to the example."""

from apportion.parts.paths.ascent import Ascent
from apportion.parts.paths.blur import AtScale, BlurScale
from apportion.parts.paths.curve import Curve
from apportion.parts.paths.given import Along
from apportion.parts.paths.guided import GuidedPath
from apportion.parts.paths.path import Legs, Path, Walk
from apportion.parts.paths.representation import Representation
from apportion.parts.paths.salient import Salient
from apportion.parts.paths.stick_breaking import StickBreaking
from apportion.parts.paths.straight import Straight

__all__ = [
    "Along",
    "Ascent",
    "AtScale",
    "BlurScale",
    "Curve",
    "GuidedPath",
    "Legs",
    "Path",
    "Representation",
    "Salient",
    "StickBreaking",
    "Straight",
    "Walk",
]

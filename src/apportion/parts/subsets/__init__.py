"""Parts of the methods that look for an influential subset: masks, games, starts, and what is trained."""

from apportion.parts.subsets.games import Delete, Dual, Preserve, Reward
from apportion.parts.subsets.smooth import SmoothMask, area_loss, smooth_max
from apportion.parts.subsets.starts import CircleStart, MaskStart, UniformStart
from apportion.parts.subsets.statistics import LayerStatistics

__all__ = [
    "CircleStart",
    "Delete",
    "Dual",
    "LayerStatistics",
    "MaskStart",
    "Preserve",
    "Reward",
    "SmoothMask",
    "UniformStart",
    "area_loss",
    "smooth_max",
]

"""Parts of the methods that look for an influential subset: masks, games, starts, and what is trained."""

from apportion.parts.subsets.causal import CausalNetworks, CausalTraining
from apportion.parts.subsets.games import Delete, Dual, Preserve, Reward
from apportion.parts.subsets.masker import Backgrounds, Masker, MaskerTraining
from apportion.parts.subsets.selector import Selector, SelectorTraining
from apportion.parts.subsets.smooth import SmoothMask, area_loss, smooth_max
from apportion.parts.subsets.starts import CircleStart, MaskStart, UniformStart
from apportion.parts.subsets.statistics import LayerStatistics
from apportion.parts.subsets.trainer import Trainer

__all__ = [
    "Backgrounds",
    "CausalNetworks",
    "CausalTraining",
    "CircleStart",
    "Delete",
    "Dual",
    "LayerStatistics",
    "MaskStart",
    "Masker",
    "MaskerTraining",
    "Preserve",
    "Reward",
    "Selector",
    "SelectorTraining",
    "SmoothMask",
    "Trainer",
    "UniformStart",
    "area_loss",
    "smooth_max",
]

"""Rule sets of layer-wise relevance propagation: which layer follows which rule."""

from __future__ import annotations

from apportion.parts.rules.lrp import Epsilon, ZBox, ZPlus
from apportion.parts.rules.rule import Plain
from apportion.parts.rules.table import POOLS, Rules


def epsilon(epsilon: float = 1e-6) -> Rules:
    """LRP-ε in every layer (Bach et al. 2015); ReLU and pooling pass on."""
    return Rules((("layer", Epsilon(epsilon)), ("relu", Plain()), *POOLS))


def epsilon_plus_box(low: float | tuple[float, ...], high: float | tuple[float, ...]) -> Rules:
    """zᴮ in the first layer, z⁺ in convolutions, ε in dense layers (Montavon et al. 2019)."""
    return Rules(
        (("conv", ZPlus()), ("linear", Epsilon()), ("relu", Plain()), *POOLS),
        first=ZBox(low, high),
    )

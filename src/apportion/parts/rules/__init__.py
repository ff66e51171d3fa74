"""Backward rules: what each operation sends back, keyed by operation, on the unmodified model."""

from apportion.parts.rules.rule import Call, Plain, Rule
from apportion.parts.rules.rules import (
    Deconv,
    Epsilon,
    Guided,
    Halfway,
    Rescale,
    RescaleSoftmax,
    SoftplusReLU,
    ZBox,
    ZPlus,
)
from apportion.parts.rules.table import (
    Rules,
    deconvnet,
    deep_lift_rescale,
    epsilon,
    epsilon_plus_box,
    gradient,
    guided_backprop,
    softplus,
)

__all__ = [
    "Call",
    "Deconv",
    "Epsilon",
    "Guided",
    "Halfway",
    "Plain",
    "Rescale",
    "RescaleSoftmax",
    "Rule",
    "Rules",
    "SoftplusReLU",
    "ZBox",
    "ZPlus",
    "deconvnet",
    "deep_lift_rescale",
    "epsilon",
    "epsilon_plus_box",
    "gradient",
    "guided_backprop",
    "softplus",
]

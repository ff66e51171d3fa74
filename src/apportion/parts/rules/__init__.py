"""Backward rules: what each operation sends back, keyed by operation, on the unmodified model."""

from apportion.parts.rules.composites import epsilon, epsilon_plus_box
from apportion.parts.rules.deep_lift import Halfway, Rescale, RescaleSoftmax, deep_lift_rescale
from apportion.parts.rules.lrp import Epsilon, ZBox, ZPlus
from apportion.parts.rules.relu import Deconv, Guided, SoftplusReLU, deconvnet, guided_backprop, softplus
from apportion.parts.rules.rule import Call, Plain, Rule
from apportion.parts.rules.table import Rules, gradient

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

"""Backward rules: what each operation sends back, keyed by operation, on the unmodified model."""

from apportion.parts.rules.composites import epsilon, epsilon_plus_box
from apportion.parts.rules.deep_lift import (
    CrossMax,
    Halfway,
    Rescale,
    RescaleLogSoftmax,
    RescaleLogSumExp,
    RescaleQuotient,
    RescaleSoftmax,
    deep_lift_rescale,
)
from apportion.parts.rules.lrp import Epsilon, ZBox, ZPlus
from apportion.parts.rules.relu import Deconv, Guided, SoftplusReLU, deconvnet, guided_backprop, softplus
from apportion.parts.rules.rule import Call, Detached, Plain, Rule
from apportion.parts.rules.table import Rules, gradient
from apportion.parts.rules.transformers import Half, Identity, NormIdentity, attn_lrp, cp_lrp

__all__ = [
    "Call",
    "CrossMax",
    "Deconv",
    "Detached",
    "Epsilon",
    "Guided",
    "Half",
    "Halfway",
    "Identity",
    "NormIdentity",
    "Plain",
    "Rescale",
    "RescaleLogSoftmax",
    "RescaleLogSumExp",
    "RescaleQuotient",
    "RescaleSoftmax",
    "Rule",
    "Rules",
    "SoftplusReLU",
    "ZBox",
    "ZPlus",
    "attn_lrp",
    "cp_lrp",
    "deconvnet",
    "deep_lift_rescale",
    "epsilon",
    "epsilon_plus_box",
    "gradient",
    "guided_backprop",
    "softplus",
]

"""Rules of layer-wise relevance propagation for attention, normalization and gates, and the rule sets of both kinds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apportion.core.errors import RuleError
from apportion.parts.rules.lrp import Epsilon, Identity
from apportion.parts.rules.rule import Call, Detached, Plain, Rule, Signals, to_first
from apportion.parts.rules.table import POOLS, Rules


@dataclass(frozen=True)
class Half(Rule):
    """Products of two tensors that both carry a signal: half of the relevance for each operand.

    Matrix products of attention and gates alike. A product f(u) g(u) of functions of the same elements, one of
    them a multiple of u, is an activation spelled out, as GELU often is: all goes to the multiple, as in `Identity`.
    In gradient form nothing is divided, so there is no ε.

    Attributes:
        gates: give gates their half as well. Otherwise all goes to what a sigmoid, or 1 less one, is multiplied
            with, as is usual for recurrent networks (Arras et al. 2017); a gate's constant parts absorb relevance.
    """

    gates: bool = True

    def back(self, call: Call, signal: Any) -> Signals:
        whole = call.gated if call.homogeneous is None and not self.gates else call.homogeneous
        if whole is None:
            return call.vjp(signal / 2)
        return tuple(s if i == whole else None for i, s in enumerate(call.vjp(signal)))


@dataclass(frozen=True)
class NormIdentity(Rule):
    """Layer, group, instance and RMS norm with their spread as a constant; what is left is linear.

    For RMS norm relevance is handed on unchanged. Subtracting the mean is a layer like any other, and the
    shift β absorbs its share, as a bias does.
    """

    def back(self, call: Call, signal: Any) -> Signals:
        if is_fixed(call):
            return call.vjp(signal)
        x = call.inputs[0]
        rows, centered, eps, gain = norm_of(call)
        spread = x.reshape(rows)
        spread = spread - spread.mean(-1, keepdim=True) if centered else spread
        spread = (spread.square().mean(-1, keepdim=True) + eps).sqrt()
        sent = (signal * gain).reshape(rows) / spread
        return to_first(call, (sent - sent.mean(-1, keepdim=True) if centered else sent).reshape(x.shape))


def is_fixed(call: Call) -> bool:
    """Tell whether an instance norm uses running statistics, and so is affine."""
    return call.op.kind == "instance_norm" and not call.arguments.get("use_input_stats", True)


def norm_of(call: Call) -> tuple[tuple[int, ...], bool, float, Tensor | float]:
    """Read a normalization: the shape in which its groups are rows, whether it centers, its ε, its gain."""
    x, given = call.inputs[0], call.arguments
    eps, gain = given.get("eps", 1e-5), given.get("weight")
    if call.op.kind in ("layer_norm", "rms_norm"):
        shape = given.get("normalized_shape")
        size = None if shape is None else math.prod([shape] if isinstance(shape, int) else shape)
        if size is not None:
            rms = call.op.kind == "rms_norm"
            eps = torch.finfo(x.dtype).eps if rms and given.get("eps") is None else eps
            return (-1, size), not rms, eps, 1.0 if gain is None else gain
    groups = given.get("num_groups") if call.op.kind == "group_norm" else x.shape[1]
    if groups is None or call.op.kind not in ("group_norm", "instance_norm") or is_fixed(call):
        raise RuleError(
            f"a rule for normalizations on {call.op.kind} in {call.module or 'the model'}",
            "layer, group, instance or RMS norm of torch.nn, of torch.nn.functional or of torch",
            "give that operation another rule",
        )
    per_channel = 1.0 if gain is None else gain.reshape(-1, *[1] * (x.ndim - 2))
    return (len(x), groups, -1), True, eps, per_channel


SPREADS = ("rsqrt", "var", "std")
"""What a normalization that is spelled out divides by; there it is a constant as well."""


def attn_lrp(layer: Rule | None = None) -> Rules:
    """AttnLRP (Achtibat et al. 2024): the softmax by its derivative, products by halves, norms with constant spread.

    In gradient form the softmax's x ⊙ (R - s ΣR) is its derivative. It is the one rule that does not conserve
    relevance, for a softmax has an offset.

    Args:
        layer: the rule of linear and convolutional layers; ε unless given.
    """
    return Rules((("softmax", Plain()), *_around_attention(layer, Half())))


def cp_lrp(layer: Rule | None = None) -> Rules:
    """Conservative propagation (Ali et al. 2022): attention weights are constants, so values get all relevance.

    Queries and keys get none, nor do gates, and relevance is conserved where biases are 0.

    Args:
        layer: as for `attn_lrp`.
    """
    return Rules((("softmax", Detached()), *_around_attention(layer, Half(gates=False))))


def _around_attention(layer: Rule | None, product: Half) -> tuple[tuple[str, Rule], ...]:
    return (
        ("layer", layer or Epsilon()),
        *((name, NormIdentity()) for name in ("layer_norm", "rms_norm", "group_norm", "instance_norm")),
        *((name, Detached()) for name in SPREADS),
        ("product", product),
        ("elementwise", Identity()),
        *POOLS,
    )

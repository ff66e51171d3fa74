"""Rules of layer-wise relevance propagation, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apportion.core.errors import RuleError
from apportion.core.ops import LAYERS
from apportion.parts.rules.rule import Call, Rule, Signals


def stabilized(z: Tensor, epsilon: float) -> Tensor:
    """Z + ε sign(z) with sign(0) = 1, so that it is never 0.

    >>> stabilized(torch.tensor([0.0, -1.0]), 0.5)
    tensor([ 0.5000, -1.5000])
    """
    return z + epsilon * torch.where(z < 0, -1.0, 1.0).to(z.dtype)


@dataclass(frozen=True)
class Epsilon(Rule):
    """LRP-ε: R_i = Σ_j x_i w_ij R_j / (z_j + ε sign z_j); Bach et al. 2015, equation 58.

    The bias is part of z and absorbs its share of relevance.

    Attributes:
        epsilon: in units of z.
    """

    epsilon: float = 1e-6

    def back(self, call: Call, signal: Any) -> Signals:
        z = call.output
        return call.vjp(signal * z / stabilized(z, self.epsilon))


@dataclass(frozen=True)
class ZPlus(Rule):
    """LRP-z⁺ (α = 1, β = 0): only positive contributions x_i w_ij share R_j; Montavon et al. 2017, equation 9.

    The bias takes no share. Inputs may be negative: x⁺w⁺ and x⁻w⁻ are the positive contributions.

    Attributes:
        epsilon: added to the denominator, in units of z.
    """

    epsilon: float = 1e-12

    def back(self, call: Call, signal: Any) -> Signals:
        x, weight, linear = linear_parts(call)
        up, down = weight.clamp(min=0), weight.clamp(max=0)
        relevance = signal * call.output

        def positive(t: Tensor) -> Tensor:
            return linear(t.clamp(min=0), up) + linear(t.clamp(max=0), down)

        z = positive(x)
        share = torch.where(z > 0, relevance / (z + self.epsilon), 0.0)
        return _only(call, x, _transposed(call, x, share, positive))


@dataclass(frozen=True)
class ZBox(Rule):
    """LRP-zᴮ for inputs in a box: R_i = Σ_j (x_i w_ij - l w⁺_ij - h w⁻_ij) R_j / Σ_i of the same.

    Montavon et al. 2017, equation 15. Gives relevance, since an input of 0 may have some. For the first
    layer only; l and h are in units of the network's own input, per channel or one for all.

    Attributes:
        low: the lowest admissible input l.
        high: the highest, h.
        epsilon: as in `ZPlus`.
    """

    low: float | tuple[float, ...]
    high: float | tuple[float, ...]
    epsilon: float = 1e-12

    @property
    def relevance(self) -> bool:
        return True

    def back(self, call: Call, signal: Any) -> Signals:
        x, weight, linear = linear_parts(call)
        up, down = weight.clamp(min=0), weight.clamp(max=0)
        low, high = _bound(self.low, x), _bound(self.high, x)
        z = linear(x, weight) - linear(low, up) - linear(high, down)
        share = signal * call.output / stabilized(z, self.epsilon)
        own = _transposed(call, x, share, lambda t: linear(t, weight))
        below = _transposed(call, x, share, lambda t: linear(t, up))
        above = _transposed(call, x, share, lambda t: linear(t, down))
        return _only(call, x, x * own - low * below - high * above)


def linear_parts(call: Call) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Give input, weight and bias-free map (input, weight) -> output of a linear layer.

    Raises:
        RuleError: the call is not a layer with a constant weight.
    """
    if call.op.kind not in LAYERS or len(call.inputs) < 2 or call.carrying[1]:
        raise RuleError(
            f"a rule for linear layers on {call.op.kind} in {call.module or 'the model'}",
            "a linear layer or convolution with constant weights",
            "give that operation another rule",
        )
    x, weight = call.inputs[0], call.inputs[1].detach()
    bias = call.inputs[2] if len(call.inputs) > 2 else None
    zero = None if bias is None else torch.zeros_like(bias)

    def linear(t: Tensor, w: Tensor) -> Tensor:
        return call.fn(t, w) if zero is None else call.fn(t, w, zero)

    return x, weight, linear


def _transposed(call: Call, x: Tensor, share: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply the transpose of a map that is linear around x to `share`."""
    keep = call.true_output is not None
    with torch.enable_grad():
        point = x if keep and x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(fn(point), point, share, create_graph=keep)[0]


def _bound(value: float | tuple[float, ...], x: Tensor) -> Tensor:
    b = torch.tensor(value, dtype=x.dtype, device=x.device)
    return (b.reshape(1, -1, *[1] * (x.ndim - 2)) if b.ndim else b).expand_as(x)


def _only(call: Call, x: Tensor, signal: Tensor) -> Signals:
    return tuple(signal if t is x else None for t in call.inputs)

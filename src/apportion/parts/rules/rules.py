"""The rules: modified ReLUs, layer-wise relevance propagation, DeepLIFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.core.errors import RuleError
from apportion.parts.rules.rule import Call, Rule, Signals


@dataclass(frozen=True)
class Guided(Rule):
    """ReLU: relu(R) where z > 0 (Springenberg et al. 2014)."""

    def back(self, call: Call, signal: Any) -> Signals:
        return _first(call, signal.clamp(min=0) * (call.inputs[0] > 0))


@dataclass(frozen=True)
class Deconv(Rule):
    """ReLU: relu(R), whatever z (Zeiler and Fergus 2014)."""

    def back(self, call: Call, signal: Any) -> Signals:
        return _first(call, signal.clamp(min=0))


@dataclass(frozen=True)
class SoftplusReLU(Rule):
    """ReLU replaced by log(1 + exp(β z)) / β, forward and backward, so that second derivatives exist.

    Attributes:
        beta: sharpness β; the larger, the nearer to the ReLU.
    """

    beta: float = 10.0

    @property
    def surrogate(self) -> bool:
        return True

    def _smooth(self, z: Tensor) -> Tensor:
        return F.softplus(z, beta=self.beta, threshold=1e4)

    def forward(self, call: Call) -> Any:
        return self._smooth(call.inputs[0])

    def back(self, call: Call, signal: Any) -> Signals:
        return _first(call, signal * torch.sigmoid(self.beta * call.inputs[0]))


# -- layer-wise relevance propagation -------------------------------------------------------------


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
    if call.op.kind not in ("linear", "conv") or len(call.inputs) < 2 or call.carrying[1]:
        raise RuleError(
            f"a rule for linear layers on {call.op.kind} in {call.module or 'the model'}",
            "linear or conv with constant weights",
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


def _first(call: Call, signal: Tensor) -> Signals:
    return (signal, *[None] * (len(call.inputs) - 1))


def _only(call: Call, x: Tensor, signal: Tensor) -> Signals:
    return tuple(signal if t is x else None for t in call.inputs)


# -- DeepLIFT -------------------------------------------------------------------------------------


def reference_of(call: Call) -> list[Tensor]:
    """Give the reference values of a call's inputs.

    Raises:
        RuleError: the pass has no reference.
    """
    if call.reference is None:
        raise RuleError(f"a rule that compares with a reference on {call.op.kind}", "reference rows", "pass reference=")
    return call.reference


@dataclass(frozen=True)
class Rescale(Rule):
    """DeepLIFT Rescale for elementwise functions: m = Δy / Δx; Shrikumar et al. 2017, equation 13.

    Attributes:
        threshold: where |Δx| is below this share of |x| + |x'| + 1, the derivative half-way stands in.
    """

    threshold: float = 1e-7

    def back(self, call: Call, signal: Any) -> Signals:
        x, x0 = call.inputs[0], reference_of(call)[0]
        rest0 = reference_of(call)[1:]
        dx = x - x0
        small = dx.abs() <= self.threshold * (x.abs() + x0.abs() + 1)
        dy = call.output - call.fn(x0, *rest0)
        slope = call.vjp(torch.ones_like(signal), at=[(x + x0) / 2, *call.inputs[1:]])[0]
        if slope is None:
            slope = torch.zeros_like(x)
        return _first(call, signal * torch.where(small, slope, dy / torch.where(small, torch.ones_like(dx), dx)))


@dataclass(frozen=True)
class Halfway(Rule):
    """Products: the derivative half-way, which is exact for bilinear operations.

    ab - a'b' = (a - a')(b + b')/2 + (b - b')(a + a')/2: each factor gets its Shapley share.
    """

    def back(self, call: Call, signal: Any) -> Signals:
        middle = [(a + b) / 2 for a, b in zip(call.inputs, reference_of(call), strict=True)]
        return call.vjp(signal, at=middle)


@dataclass(frozen=True)
class RescaleSoftmax(Rule):
    """Softmax in log space, p = exp(x - log Σ exp x), with Rescale for both exps and the logarithm.

    Nothing overflows or divides by 0, however far the inputs lie from each other or from the reference.

    Attributes:
        threshold: see `Rescale`.
    """

    threshold: float = 1e-7

    def back(self, call: Call, signal: Any) -> Signals:
        x, x0 = call.inputs[0], reference_of(call)[0]
        dim = call.arguments.get("dim")
        if dim is None:
            raise RuleError("softmax without dim", "an explicit dim", "write softmax(x, dim=-1) in the model")
        top = torch.maximum(x, x0).amax(dim, keepdim=True).detach()
        e, e0 = (x - top).exp(), (x0 - top).exp()  # one of the sums is at least 1
        rise, s0 = (e - e0).sum(dim, keepdim=True), e0.sum(dim, keepdim=True)
        dx = torch.where(x == x0, 0.0, x - x0)  # masked entries are -inf on both sides
        lse = x.logsumexp(dim, keepdim=True) - x0.logsumexp(dim, keepdim=True)
        near = rise.abs() <= s0 / 2  # there the logarithms' difference would cancel
        safe = torch.where(rise == 0, 1.0, rise)
        near_slope = torch.where(rise == 0, 1 / torch.where(near, s0, 1.0), _log1p(safe, s0, near) / safe)
        log_slope = torch.where(near, near_slope, lse / safe)
        lse = torch.where(near, log_slope * rise, lse)
        to_log = signal * self._exp_slope(dx - lse, call.output, call.fn(x0, *call.inputs[1:]))
        return _first(call, to_log - to_log.sum(dim, keepdim=True) * log_slope * self._exp_slope(dx, e, e0))

    def _exp_slope(self, rise: Tensor, e: Tensor, e0: Tensor) -> Tensor:
        small = rise.abs() <= self.threshold
        return torch.where(small, (e + e0) / 2, (e - e0) / torch.where(small, 1.0, rise))


def _log1p(rise: Tensor, start: Tensor, where: Tensor) -> Tensor:
    return torch.log1p(torch.where(where, rise / torch.where(where, start, 1.0), 0.0))

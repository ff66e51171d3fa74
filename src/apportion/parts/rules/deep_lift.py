"""Rules of DeepLIFT: differences from a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apportion.core.errors import RuleError
from apportion.parts.rules.rule import Call, Rule, Signals, to_first
from apportion.parts.rules.table import Rules


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
        return to_first(call, signal * torch.where(small, slope, dy / torch.where(small, torch.ones_like(dx), dx)))


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
        return to_first(call, to_log - to_log.sum(dim, keepdim=True) * log_slope * self._exp_slope(dx, e, e0))

    def _exp_slope(self, rise: Tensor, e: Tensor, e0: Tensor) -> Tensor:
        small = rise.abs() <= self.threshold
        return torch.where(small, (e + e0) / 2, (e - e0) / torch.where(small, 1.0, rise))


def _log1p(rise: Tensor, start: Tensor, where: Tensor) -> Tensor:
    return torch.log1p(torch.where(where, rise / torch.where(where, start, 1.0), 0.0))


def deep_lift_rescale() -> Rules:
    """DeepLIFT with Rescale, the product rule and softmax in log space (Shrikumar et al. 2017)."""
    return Rules((("elementwise", Rescale()), ("product", Halfway()), ("softmax", RescaleSoftmax())))

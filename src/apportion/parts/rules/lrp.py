"""Rules of layer-wise relevance propagation, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.core.errors import ConfigError, RuleError
from apportion.core.ops import LAYERS, Status
from apportion.parts.rules.relu import RELU6_CAP
from apportion.parts.rules.rule import Call, Rule, Signals, to_first


def stabilized(z: Tensor, epsilon: float) -> Tensor:
    """Z + ε sign(z) with sign(0) = 1, so that it is never 0.

    >>> stabilized(torch.tensor([0.0, -1.0]), 0.5)
    tensor([ 0.5000, -1.5000])
    """
    return z + epsilon * torch.where(z < 0, -1.0, 1.0).to(z.dtype)


def quotient(numerator: Tensor, z: Tensor, epsilon: float = 0.0) -> Tensor:
    """Divide by z + ε sign(z), and give 0 where z = 0: what no input contributed to is not shared out.

    >>> quotient(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]))
    tensor([0.5000, 0.0000])
    """
    dead = z == 0
    return torch.where(dead, 0.0, numerator / stabilized(torch.where(dead, 1.0, z), epsilon))


@dataclass(frozen=True)
class Epsilon(Rule):
    """LRP-ε: R_i = Σ_j x_i w_ij R_j / (z_j + ε sign z_j); Bach et al. 2015, equation 58.

    The bias is part of z and absorbs its share of relevance. With ε = 0 it is LRP-0, the derivative itself. Fits
    everything affine: residual additions and average pooling too, where branches may cancel.

    Attributes:
        epsilon: in units of z.
    """

    epsilon: float = 1e-6

    _not_negative: ClassVar[tuple[str, ...]] = ("epsilon",)

    def back(self, call: Call, signal: Any) -> Signals:
        if call.op.status is Status.MULTILINEAR and sum(call.carrying) > 1:
            raise RuleError(
                f"LRP-ε on {call.op.kind} of two signals in {call.module or 'the model'}",
                "one signal, and constant weights",
                "give products a rule of their own, under 'product'",
            )
        z = call.output
        return call.vjp(signal * z / stabilized(z, self.epsilon) if self.epsilon else signal)


@dataclass(frozen=True)
class AlphaBeta(Rule):
    """LRP-αβ: α times the share of positive contributions x_i w_ij less β times that of the negative ones.

    R_i = Σ_j (α (x_i w_ij)⁺ / Σ_i (x_i w_ij)⁺ - β (x_i w_ij)⁻ / Σ_i (x_i w_ij)⁻) R_j; Bach et al. 2015,
    equation 60. Inputs may be negative: x⁺w⁺ and x⁻w⁻ are the positive contributions.

    Attributes:
        alpha: weight of what excites.
        beta: weight of what inhibits; α - β = 1 conserves relevance.
        bias: count a positive bias among the positive contributions and a negative one among the negative,
            where it absorbs its share; otherwise biases take nothing.
        redistribute: let a unit without negative contributions share out R_j itself rather than α R_j, and one
            without positive ones likewise, so that relevance is conserved there as well.
    """

    alpha: float = 2.0
    beta: float = 1.0
    bias: bool = False
    redistribute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.alpha - self.beta - 1) > 1e-6:
            raise ConfigError(
                f"alpha={self.alpha}, beta={self.beta}",
                "alpha - beta = 1, so that relevance is conserved",
                "give beta=alpha - 1",
            )

    def back(self, call: Call, signal: Any) -> Signals:
        x, weight, linear = linear_parts(call)
        relevance = signal * call.output
        up, down = weight.clamp(min=0), weight.clamp(max=0)

        def excite(t: Tensor, *_: Tensor) -> Tensor:
            return linear(t.clamp(min=0), up) + linear(t.clamp(max=0), down)

        def inhibit(t: Tensor, *_: Tensor) -> Tensor:
            return linear(t.clamp(min=0), down) + linear(t.clamp(max=0), up)

        above, below = excite(x), inhibit(x)
        if self.bias and len(call.inputs) > 2:
            shift = call.fn(torch.zeros_like(x), *call.inputs[1:])
            above, below = above + shift.clamp(min=0), below + shift.clamp(max=0)
        for_above, for_below = self.alpha * relevance, -self.beta * relevance
        if self.redistribute:
            for_above = torch.where(below == 0, relevance, for_above)
            for_below = torch.where(above == 0, relevance, for_below)
        sent = call.vjp(quotient(for_above, above), excite)
        if not self.beta and not self.redistribute:
            return sent
        return _added(sent, call.vjp(quotient(for_below, below), inhibit))


@dataclass(frozen=True)
class ZPlus(Rule):
    """LRP-z⁺, which is αβ with α = 1 and β = 0: positive contributions share R_j; Montavon et al. 2017, equation 9.

    The bias takes no share.
    """

    def back(self, call: Call, signal: Any) -> Signals:
        return AlphaBeta(1.0, 0.0).back(call, signal)


@dataclass(frozen=True)
class Excitation(Rule):
    """The step of excitation backpropagation: shares of x w⁺, noting inputs that are negative; Zhang et al. 2016.

    Those are treated as in `ZPlus`, which this is.
    """

    def forward(self, call: Call) -> Any:
        if bool((call.inputs[0] < 0).any()):
            call.note(
                "a layer has negative inputs, where x⁻w⁻ was taken as excitation; the method is defined without them"
            )
        return super().forward(call)

    def back(self, call: Call, signal: Any) -> Signals:
        return ZPlus().back(call, signal)


@dataclass(frozen=True)
class Gamma(Rule):
    """LRP-γ: R_i = Σ_j x_i (w_ij + γ w⁺_ij) R_j / Σ_i of the same; Montavon et al. 2019.

    The bias counts as one of the i. For inputs that are not negative; others are noted, and for them
    `GeneralizedGamma` is meant.

    Attributes:
        gamma: how much positive weights are favoured.
    """

    gamma: float = 0.25

    _not_negative: ClassVar[tuple[str, ...]] = ("gamma",)

    def forward(self, call: Call) -> Any:
        if bool((call.inputs[0] < 0).any()):
            call.note("LRP-γ met negative inputs, for which it favours negative contributions: take GeneralizedGamma")
        return super().forward(call)

    def back(self, call: Call, signal: Any) -> Signals:
        x, weight, linear = linear_parts(call)
        z, bent = call.output, _bent(weight, self.gamma, 1)
        whole = linear(x, bent) + _bent(z - linear(x, weight), self.gamma, 1)
        return call.vjp(quotient(signal * z, whole), lambda t, *_: linear(t, bent))


@dataclass(frozen=True)
class GeneralizedGamma(Rule):
    """LRP-γ for inputs of either sign: contributions of the sign of z_j are favoured by the factor 1 + γ.

    Where z_j > 0 shares are x⁺(w + γ w⁺) + x⁻(w + γ w⁻), and where z_j < 0 x⁺(w + γ w⁻) + x⁻(w + γ w⁺); the bias
    counts as a contribution. The form of the zennit library; equal to `Gamma` where x ≥ 0 and z > 0.

    Attributes:
        gamma: the factor's excess over 1.
    """

    gamma: float = 0.25

    _not_negative: ClassVar[tuple[str, ...]] = ("gamma",)

    def back(self, call: Call, signal: Any) -> Signals:
        x, weight, linear = linear_parts(call)
        z = call.output
        relevance = signal * z
        sent: Signals = (None,) * len(call.inputs)
        for sign in (1, -1):
            here = z > 0 if sign > 0 else z < 0
            for_plus, for_minus = _bent(weight, self.gamma, sign), _bent(weight, self.gamma, -sign)

            def modified(t: Tensor, *_: Tensor, p: Tensor = for_plus, m: Tensor = for_minus) -> Tensor:
                return linear(t.clamp(min=0), p) + linear(t.clamp(max=0), m)

            shift = z - linear(x, weight)
            whole = modified(x) + _bent(shift, self.gamma, sign)
            sent = _added(sent, call.vjp(quotient(torch.where(here, relevance, 0.0), whole), modified))
        return sent


def _bent(t: Tensor, gamma: float, sign: int) -> Tensor:
    return t + gamma * (t.clamp(min=0) if sign > 0 else t.clamp(max=0))


@dataclass(frozen=True)
class WSquare(Rule):
    """LRP-w²: R_i = Σ_j w²_ij R_j / Σ_i w²_ij; Montavon et al. 2017.

    For a first layer whose inputs may be any real numbers. Gives relevance, whatever the input is.
    """

    @property
    def relevance(self) -> bool:
        return True

    def back(self, call: Call, signal: Any) -> Signals:
        _, weight, _ = linear_parts(call)
        return _spread(call, signal, weight.square())


@dataclass(frozen=True)
class Flat(Rule):
    """LRP-flat: every input of a unit gets the same share of R_j; Lapuschkin et al. 2019.

    For a first layer: its map shows from where units of the second layer read, no finer.
    """

    @property
    def relevance(self) -> bool:
        return True

    def back(self, call: Call, signal: Any) -> Signals:
        _, weight, _ = linear_parts(call)
        return _spread(call, signal, torch.ones_like(weight))


def _spread(call: Call, signal: Tensor, weight: Tensor) -> Signals:
    """Share relevance out in proportion to some weights alone."""
    x, _, linear = linear_parts(call)
    whole = linear(torch.ones_like(x), weight)
    return call.vjp(quotient(signal * call.output, whole), lambda t, *_: linear(t, weight))


@dataclass(frozen=True)
class Identity(Rule):
    """Elementwise functions hand relevance on unchanged: the signal is multiplied by f(x) / x.

    Where x = 0 the derivative stands in, the limit of f(x) / x if f(0) = 0. If f(0) is not 0, that is noted: what
    the unit gives without any input is then relevance of its inputs.

    Raises:
        RuleError: f(0) ≠ 0 at an x of 0, where the relevance f(0) has nowhere to go.
    """

    def forward(self, call: Call) -> Any:
        x = call.inputs[0].detach()
        offset = call.fn(torch.zeros_like(x[:1] if x.ndim else x), *call.inputs[1:]).detach().abs().max()
        if bool(offset != 0):
            call.note(
                f"{call.op.kind}(0) is {float(offset):.3g} and not 0: its relevance is handed to inputs that did not "
                "make it, and values sum to f(x) rather than to a difference from f(0)"
            )
        return super().forward(call)

    def back(self, call: Call, signal: Any) -> Signals:
        x, y = call.inputs[0], call.output
        zero = x == 0
        if not bool(zero.any()):
            return to_first(call, signal * (y / x))
        if bool((zero & (y != 0) & (signal != 0)).any()):
            raise RuleError(
                f"{call.op.kind} in {call.module or 'the model'}, which gives {float(y[zero].abs().max()):.3g} at 0",
                "f(0) = 0: relevance f(x) cannot be input times signal where the input is 0",
                "give that operation another rule, such as Plain() or Detached()",
            )
        slope = call.vjp(torch.ones_like(signal))[0]
        assert slope is not None
        return to_first(call, signal * torch.where(zero, slope, y / torch.where(zero, 1.0, x)))


@dataclass(frozen=True)
class Through(Rule):
    """Scaling and shifting element by element hands relevance on, shift and all; what arrives at an x of 0 is lost."""

    def back(self, call: Call, signal: Any) -> Signals:
        return to_first(call, signal * quotient(call.output, call.inputs[0]))


@dataclass(frozen=True)
class Capped(Rule):
    """ReLU6 hands relevance on as a ReLU does; units at the cap are noted, for which no root search was derived.

    Where 0 < z < 6 the signal is kept, above it is multiplied by 6 / z.
    """

    def forward(self, call: Call) -> Any:
        if bool((call.inputs[0] > RELU6_CAP).any()):
            call.note(
                "units of ReLU6 are at their cap, where deep Taylor decomposition is not derived: they hand on their "
                "relevance as if they were linear up to there"
            )
        return super().forward(call)

    def back(self, call: Call, signal: Any) -> Signals:
        return Through().back(call, signal)


@dataclass(frozen=True)
class Shift(Rule):
    """Additions: a constant takes nothing, as biases do under z⁺; two signals share in proportion."""

    def back(self, call: Call, signal: Any) -> Signals:
        y = call.output
        if sum(call.carrying) > 1:
            return call.vjp(signal)
        shift = call.fn(*(torch.zeros_like(t) if c else t for t, c in zip(call.inputs, call.carrying, strict=True)))
        return call.vjp(signal * quotient(y, y - shift))


@dataclass(frozen=True)
class SoftmaxGradient(Rule):
    """The softmax's derivative as relevance of the logits: R_c = p_t (δ_ct - p_c) for class t; Iwana et al. 2019.

    The start value of SGLRP, under the score `Probability`: other classes start negative, and all sum to 0. A logit
    of exactly 0 can pass nothing on.
    """

    def back(self, call: Call, signal: Any) -> Signals:
        relevance = call.vjp(signal)[0]
        return to_first(call, signal * 0 if relevance is None else quotient(relevance, call.inputs[0]))


@dataclass(frozen=True)
class ZBox(Rule):
    """LRP-zᴮ for inputs in a box: R_i = Σ_j (x_i w_ij - l w⁺_ij - h w⁻_ij) R_j / Σ_i of the same.

    Montavon et al. 2017, equation 15. Gives relevance, since an input of 0 may have some. For the first
    layer only; l and h are in units of the network's own input, per channel or one for all.

    Attributes:
        low: the lowest admissible input l.
        high: the highest, h.
    """

    low: float | tuple[float, ...]
    high: float | tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        lows, highs = (v if isinstance(v, tuple) else (v,) for v in (self.low, self.high))
        count = max(len(lows), len(highs))
        lows, highs = (v * count if len(v) == 1 else v for v in (lows, highs))
        if len(lows) != len(highs) or any(low > high for low, high in zip(lows, highs, strict=True)):
            raise ConfigError(
                f"ZBox({self.low}, {self.high})",
                "low at most high, in every channel",
                "give the lowest input first, then the highest",
            )

    @property
    def relevance(self) -> bool:
        return True

    def forward(self, call: Call) -> Any:
        x = call.inputs[0]
        if bool(((x < _bound(self.low, x)) | (x > _bound(self.high, x))).any()):
            call.note(
                f"the network's input leaves the box of zᴮ, which is {self.low} to {self.high} there: shares may be "
                "negative; give low and high in units of that input, after the normalization"
            )
        return super().forward(call)

    def back(self, call: Call, signal: Any) -> Signals:
        x, weight, linear = linear_parts(call)
        up, down = weight.clamp(min=0), weight.clamp(max=0)
        low, high = _bound(self.low, x), _bound(self.high, x)
        z = linear(x, weight) - linear(low, up) - linear(high, down)
        share = quotient(signal * call.output, z)
        own, below, above = (call.vjp(share, lambda t, *_, w=w: linear(t, w))[0] for w in (weight, up, down))
        assert own is not None
        assert below is not None
        assert above is not None
        return to_first(call, x * own - low * below - high * above)


def linear_parts(call: Call) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Give input, weight and bias-free map (input, weight) -> output of a linear layer.

    Raises:
        RuleError: the call is not a layer with a constant weight and bias.
    """
    if call.op.kind not in LAYERS or len(call.inputs) < 2 or any(call.carrying[1:]):
        raise RuleError(
            f"a rule for linear layers on {call.op.kind} in {call.module or 'the model'}",
            "a linear layer or convolution with constant weights and bias",
            "give that operation another rule",
        )
    x, weight = call.inputs[0], call.inputs[1].detach()
    bias = call.inputs[2] if len(call.inputs) > 2 else None
    zero = None if bias is None else torch.zeros_like(bias)

    def linear(t: Tensor, w: Tensor) -> Tensor:
        return call.fn(t, w) if zero is None else call.fn(t, w, zero)

    return x, weight, linear


def _bound(value: float | tuple[float, ...], x: Tensor) -> Tensor:
    b = torch.tensor(value, dtype=x.dtype, device=x.device)
    return (b.reshape(1, -1, *[1] * (x.ndim - 2)) if b.ndim else b).expand_as(x)


def _added(a: Signals, b: Signals) -> Signals:
    return tuple(t if s is None else s if t is None else s + t for s, t in zip(a, b, strict=True))

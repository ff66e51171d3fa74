"""FullGrad, the saliency map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apportion.core import ops, tree
from apportion.core.attribution import Attribution, Domain
from apportion.core.card import Card, Kind, Need
from apportion.core.errors import InputError, SiteError
from apportion.core.explainer import Explainer, Passes
from apportion.core.ops import ELEMENTWISE
from apportion.core.protocols import RulePass
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.tree import Tree
from apportion.methods.bias.full_grad import PAPER
from apportion.parts.bias_terms import Biases, Seen, forget, homogeneous, product, through
from apportion.parts.rules import engine
from apportion.parts.rules.rule import Call, Signals

CARD = Card(
    title="FullGrad saliency",
    paper=PAPER,
    kind=Kind.SALIENCE,
    intent="Where gradient × input and the biases of spatial layers are strong, all layers rescaled alike and added.",
    cost="1 forward, 1 backward",
    needs=frozenset({Need.SPATIAL}),
    signed=False,
    unjudged="Deng et al. 2025 place no method that gives biases a share",
    unit="",
    cautions=(
        "Not complete: magnitudes are rescaled layer by layer, so that a layer of tiny terms counts as much as any.",
        "Biases of linear layers are on no picture and are dropped: parts['dropped'], as part of the score.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class FullGradSaliency(Explainer):
    """Σ_c ψ(∇f ⊙ x) + Σ_l Σ_c ψ(∇_{b_l} f ⊙ b_l), ψ = |.| stretched to [0, 1]; Srinivas and Fleuret 2019.

    ψ takes the extremes of each layer, all channels together, for each example, as the authors' code does; a layer
    without variation gives 0. Maps are enlarged bilinearly, corners on corners. A layer is an operation that has a
    bias, explicit or implicit, and gives [B, C, h, w] or [B, h, w, C] with the input's proportions; which of the two
    is known from the layers before, and what may be either is dropped, as attention is. Values [B, H, W], ≥ 0, without
    unit. `parts["dropped"]` is the score's remainder that is on no map, in units of the score, and
    `parts["dropped_share"]` the same over the score.

    Smooth FullGrad is `SmoothGrad(base=FullGradSaliency(), samples=25, noise=ap.noise.Gaussian(0.15))`.

    Raises:
        SiteError: no layer of the network has spatial axes.
        InputError: the input is not one tensor of pictures.

    >>> import torch, apportion as ap
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(18, 2))
    >>> a = ap.FullGradSaliency()(ap.Field(net), torch.rand(1, 1, 5, 5), target=0)
    >>> a.values.shape, torch.allclose(a.parts["dropped"], net[3].bias[0], atol=1e-6)
    (torch.Size([1, 5, 5]), True)
    """

    def explain(self, q: Question) -> Attribution:
        if not isinstance(q.x, Tensor) or q.x.ndim != 4:
            shapes = [tuple(t.shape) for t in tree.leaves(q.x)]
            raise InputError(
                f"FullGradSaliency of {shapes}",
                "one tensor of pictures, [B, C, H, W]",
                "use FullGrad, whose parts are the biases' shares, for tables and text",
            )
        done = q.backward(q.x, torch.arange(len(q), device=q.device), _Painting((q.x.shape[2], q.x.shape[3])))
        painted = [cast(_Painter, chunk[0]) for chunk in done.tape]
        if not all(p.layers for p in painted):
            raise SiteError(
                "FullGradSaliency of a network without spatial layers",
                "an operation that gives [B, C, h, w] with the input's proportions",
                "use FullGrad, which gives each layer's share of the score instead of a map",
            )
        biases = torch.cat([p.map for p in painted])
        on_maps = tree.total(done.relevance) + torch.cat([p.total for p in painted])
        dropped = done.value - on_maps
        share = dropped / torch.where(done.value == 0, torch.ones_like(dropped), done.value)
        return q.attribution(
            self,
            heat(done.relevance) + biases,
            domain=Domain.SITE,
            value=done.value,
            parts={"dropped": dropped, "dropped_share": share},
        )

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(1, 1)


def heat(layer: Float[Tensor, "R C h w"]) -> Float[Tensor, "R h w"]:
    """Stretch magnitudes to [0, 1] by the extremes of each row, and add channels."""
    size = layer.abs()
    low, high = size.amin((1, 2, 3))[:, None, None], size.amax((1, 2, 3))[:, None, None]
    wide = high - low
    return torch.where(wide == 0, 0, (size.sum(1) - layer.shape[1] * low) / wide).clamp_min(0)


@dataclass(frozen=True)
class _Painting:
    """The gradient, and on the way the maps of biases."""

    size: tuple[int, int]
    kind: Literal["gradient"] = "gradient"
    surrogate: bool = False

    def run(
        self,
        forward: Callable[[Tree], Tensor],
        z: Tree,
        reference: Tree | None,
        *,
        start: Literal["score", "one"] = "score",
        record: bool = False,
        differentiable: bool = False,
    ) -> RulePass:
        painter = _Painter(z.new_zeros(len(z), *self.size))
        done = engine.run(Seen(otherwise=painter), forward, z, None, start=start, record=False, differentiable=False)
        return done._replace(tape=[painter])


_FIRST = frozenset(
    """conv conv_transpose batch_norm group_norm instance_norm local_response_norm max_pool2d avg_pool2d lp_pool2d
    adaptive_avg_pool2d adaptive_max_pool2d interpolate upsample pixel_shuffle pixel_unshuffle""".split()
)
"""Operations that have channels on axis 1."""
_PRODUCTS = frozenset("matmul baddbmm addbmm einsum".split())
"""Operations of attention, whose last two axes are tokens or features even where they look like a picture."""
_NOWHERE = frozenset({"softmax", "log_softmax"}) | _PRODUCTS


class _Channels(NamedTuple):
    """Which axis of a tensor holds channels, in a form that views share.

    Attributes:
        stride: of that axis, in elements; 0 where the tensor is no layer with places, but attention.
        size: of that axis.
        ndim: of the tensor.
        room: bytes of its memory, to tell it from what lies there later.
    """

    stride: int
    size: int
    ndim: int
    room: int


class _Layouts:
    """Follows channels from the operations that fix their axis, through elementwise ones and views, forward."""

    def __init__(self) -> None:
        self.found: dict[int, _Channels] = {}
        self.axes: WeakKeyDictionary[Call, int | None] = WeakKeyDictionary()

    def of(self, t: Tensor) -> int | None:
        """Give the axis of channels; 0 where the tensor has no places, None where it is not known."""
        memory = t.untyped_storage()
        held = self.found.get(memory.data_ptr())
        if held is None or held.room != memory.nbytes():
            return None
        if held.stride == 0:
            return 0
        fits = [
            i
            for i in range(1, t.ndim)
            if t.stride(i) == held.stride and t.shape[i] > 1 and (t.ndim == held.ndim or t.shape[i] == held.size)
        ]
        return fits[0] if len(fits) == 1 else None

    def chosen(self, call: Call) -> int | None:
        """Give the axis of channels of an operation's output, before it runs."""
        kind, x = call.op.kind, call.inputs[0]
        if kind in _FIRST:
            return 1
        if kind == "linear":
            return x.ndim - 1
        axes = [self.of(t) for t, c in zip(call.inputs, call.carrying, strict=True) if c and t.ndim == x.ndim]
        if kind in _PRODUCTS:
            return 0 if sum(call.carrying) > 1 else None
        known = [a for a in axes if a] or [a for a in axes if a is not None]
        if known:
            return known[0] if len(set(known)) == 1 else None
        normed = call.arguments.get("normalized_shape", ())
        return x.ndim - 1 if kind in ("layer_norm", "rms_norm") and len(normed) == 1 else None

    def note(self, call: Call, axis: int | None, out: Any) -> None:
        """Keep what is known of an output, and forget what lay there."""
        for t in tree.tensors(out):
            memory = t.untyped_storage()
            self.found.pop(memory.data_ptr(), None)
            if axis == 0:
                self.found[memory.data_ptr()] = _Channels(0, 0, t.ndim, memory.nbytes())
            elif axis is not None and axis < t.ndim:
                self.found[memory.data_ptr()] = _Channels(t.stride(axis), t.shape[axis], t.ndim, memory.nbytes())
        self.axes[call] = axis


class _Painter(Biases):
    """Adds the maps of biases up as the signal comes by."""

    def __init__(self, blank: Tensor) -> None:
        super().__init__()
        self.map, self.total, self.layers = blank, blank.new_zeros(len(blank)), 0
        self.layouts = _Layouts()

    def forward(self, call: Call) -> Any:
        axis = self.layouts.chosen(call)
        out = super().forward(call)
        self.layouts.note(call, axis, out)
        return out

    def back(self, call: Call, signal: Any) -> Signals:
        axis = self._picture(call, signal) if isinstance(signal, Tensor) else None
        paints = axis is not None
        self.layers += paints
        if homogeneous(call.op, call.carrying):
            sent = call.vjp(signal)
        elif (known := self.known(call, signal)) is not None:
            sent, bias = known
            if paints:
                self._paint(product(signal, bias), axis)
        elif call.op.kind in ELEMENTWISE and len(call.inputs) == 1 and isinstance(signal, Tensor):
            out, slope = sloped(call)
            sent = (signal * slope,)
            if paints:
                self._paint(product(signal, out.addcmul_(slope, call.inputs[0], value=-1)), axis)
        else:
            out, sent = through(call, signal)
            if paints:
                self._paint(product(signal, implicit(call, out[0])), axis)
        forget(call)
        return sent

    def _paint(self, layer: Tensor, axis: int) -> None:
        if bool(layer.any()):
            self.total = self.total + layer.flatten(1).sum(1)
            coarse = heat(layer.movedim(axis, 1))[:, None]  # before enlarging: linear steps may change places
            self.map = self.map + F.interpolate(coarse, self.map.shape[1:], mode="bilinear", align_corners=True)[:, 0]

    def _picture(self, call: Call, out: Tensor) -> int | None:
        """Give the axis of channels where an output is a picture, known or by its proportions alone."""
        if call.op.kind in _NOWHERE or out.ndim != 4 or out.shape[0] != len(self.map):
            return None
        axis = self.layouts.axes[call] if call in self.layouts.axes else self.layouts.of(call.inputs[0])
        fits = [
            a
            for a in (1, 3)
            if axis in (None, a) and self._alike([n for i, n in enumerate(out.shape) if i not in (0, a)])
        ]
        return fits[0] if len(fits) == 1 else None

    def _alike(self, grid: Sequence[int]) -> bool:
        ratio = grid[0] * self.map.shape[2] / (grid[1] * self.map.shape[1])
        return grid[0] * grid[1] > 1 and 0.8 <= ratio <= 1.25


def sloped(call: Call) -> tuple[Tensor, Tensor]:
    """Give the output of a function of single elements, and its derivative."""
    with torch.enable_grad():
        x = call.inputs[0].detach().requires_grad_()
        out = call.fn(x)
        (slope,) = torch.autograd.grad(out, x, torch.ones_like(out))
    return out.detach(), slope


def implicit(call: Call, out: Tensor) -> Tensor:
    """Give an operation's output less its derivative times its input, element by element; no rounding errors."""
    with torch.enable_grad():
        if ops.is_affine(call.op, call.carrying):
            pairs = zip(call.inputs, call.carrying, strict=True)
            return call.fn(*(torch.zeros_like(i) if c else i for i, c in pairs)).detach().expand_as(out)
        full = [p.detach().requires_grad_(c) for p, c in zip(call.inputs, call.carrying, strict=True)]
        wanted = [p for p, c in zip(full, call.carrying, strict=True) if c]
        again = call.fn(*full)
        # the derivative times the input, as the derivative of the way back by the signal it starts with
        start = torch.zeros_like(again, requires_grad=True)
        back = torch.autograd.grad(again, wanted, start, create_graph=True)
        dot = sum((b * p.detach()).sum() for b, p in zip(back, wanted, strict=True))
        (linear,) = torch.autograd.grad(cast(Tensor, dot), start)
    found = out - linear
    noise = 1e3 * torch.finfo(out.dtype).eps * (out.abs() + linear.abs())
    return found.masked_fill(found.abs() <= noise, 0)

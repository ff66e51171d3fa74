"""What attributions cannot do, as models: the limits are tests, of metrics and of promises."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apportion.core.errors import ConfigError
from apportion.planted.functions import Points, Product, Scores
from apportion.planted.problem import Pair, Planted, away_from_zero, seeded


class _Steps(nn.Module):
    """Σ_i rise_i · ramp(x_i) + slope_i · kink(x_i): up by the rise before 1/2, flat, and about 1 a slope of its own.

    kink(1 + u) = u for |u| ≤ 1/8, and is back at 0 for |u| ≥ 1/4.
    """

    rise: Tensor
    slope: Tensor

    def __init__(self, rise: Tensor, slope: Tensor) -> None:
        super().__init__()
        self.register_buffer("rise", rise)
        self.register_buffer("slope", slope)

    def forward(self, x: Points) -> Scores:
        ramp = 2 * (x.relu() - (x - 0.5).relu())
        u = x - 1
        kink = -(u + 0.25).relu() + 2 * (u + 0.125).relu() - 2 * (u - 0.125).relu() + (u - 0.25).relu()
        return (self.rise * ramp + self.slope * kink).sum(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class SameAttribution(Pair):
    """Two models with equal attributions at `x`, and slopes there that are each other's negatives.

    Attributes:
        slopes: the first's derivative by each feature within `radius` of x; the second's is -slopes.
        radius: how far around x both are linear.
    """

    slopes: Float[Tensor, "1 d"]
    radius: float


def same_attribution(features: int = 6, steepness: float = 8.0, seed: int = 0) -> SameAttribution:
    """Plant two models that a complete and linear attribution cannot tell apart, and that behave oppositely.

    Truth: x_i's rise, g_i(1) - g_i(0): what integrated gradients, Shapley values and every other method that is
    complete on each term of an additive function gives for both. Does f go up if x_i goes up a little? Whatever is
    guessed from attributions is right for exactly one of the two: accuracy 1/2 over the pair, which is chance. The
    construction follows Bilodeau et al. 2024 (PNAS, arXiv:2212.11870): behavior near x is free, and what is between x
    and the baseline makes up for it. The gradient answers the question, and is not complete.

    Args:
        features: d.
        steepness: size of the slopes about x.
        seed: of rises and signs.

    >>> p = same_attribution()
    >>> up = p.x + 0.1 * torch.eye(6, dtype=p.x.dtype)
    >>> one, two = p.model(up) - p.model(p.x), p.other(up) - p.other(p.x)
    >>> torch.allclose(one, -two), torch.allclose(p.model(p.x), p.other(p.x))
    (True, True)
    """
    generator = seeded(seed)
    rise = away_from_zero(generator, features)
    signs = torch.randint(2, (features,), generator=generator).double() * 2 - 1
    x = torch.ones(1, features, dtype=torch.float64)
    return SameAttribution(
        model=_Steps(rise, steepness * signs),
        other=_Steps(rise, -steepness * signs),
        x=x,
        other_x=x,
        baseline=0 * x,
        other_baseline=0 * x,
        truth=rise[None],
        slopes=steepness * signs[None],
        radius=0.125,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class NoneFits(Planted):
    """Conditions that no attribution meets together; `truth` comes nearest, by least squares.

    Attributes:
        masks: the sets of features that are removed.
        drops: what f loses with each: what the values of the set should sum to.
        residual: the norm of what `truth` leaves unmet; no attribution leaves less.
    """

    masks: Bool[Tensor, "k d"]
    drops: Float[Tensor, "n k"]
    residual: Float[Tensor, " n"]


def product(examples: int = 4, seed: int = 0) -> NoneFits:
    """x1 · x2 from 0: sensitivity-1 asks for (x1 x2, x1 x2), sensitivity-2 for a sum of x1 x2 (Ancona et al. 2018).

    Truth: (2/3) x1 x2 for each, which misses all three conditions by x1 x2 / 3. Occlusion meets the first two, and
    Shapley values and integrated gradients the last.

    Args:
        examples: points.
        seed: of the points.

    >>> p = product()
    >>> unmet = p.truth @ p.masks.double().T - p.drops
    >>> torch.allclose(unmet.norm(dim=1), p.residual)
    True
    """
    x = away_from_zero(seeded(seed), examples, 2)
    both = x.prod(1)
    return NoneFits(
        model=Product(),
        x=x,
        baseline=torch.zeros_like(x[:1]),
        truth=(2 / 3 * both)[:, None].expand(-1, 2).contiguous(),
        masks=torch.tensor([[True, False], [False, True], [True, True]]),
        drops=both[:, None].expand(-1, 3).contiguous(),
        residual=both.abs() / math.sqrt(3),
    )


class _Background(nn.Module):
    """Red or blue frame, two classes; beside it the strongest edge less the strongest edge, which is 0."""

    def __init__(self, side: int) -> None:
        super().__init__()
        weight = torch.zeros(4, 3, 3, 3)
        edge = torch.full((3, 3), -1.0)
        edge[1, 1] = 8
        weight[:2] = edge
        weight[2, 0, 1, 1] = weight[3, 2, 1, 1] = 1
        weight[2, 2, 1, 1] = weight[3, 0, 1, 1] = -1
        self.features = _given(nn.Conv2d, weight, 3, 4, 3, padding=1)
        self.act, self.pool = nn.ReLU(), nn.MaxPool2d(side)
        self.cancel = _given(nn.Linear, torch.tensor([[1.0, -1.0]]), 2, 1)
        frame = _frame(side).flatten().float()
        head = torch.zeros(2, 1 + 2 * side * side)
        head[:, 0] = 1
        head[0, 1 : 1 + side * side] = head[1, 1 + side * side :] = 4 / frame.sum() * frame
        self.head = _given(nn.Linear, head, 1 + 2 * side * side, 2)

    def forward(self, x: Float[Tensor, "R 3 H W"]) -> Float[Tensor, "R 2"]:
        h = self.act(self.features(x))
        nothing = self.cancel(self.pool(h[:, :2]).flatten(1))
        return self.head(torch.cat([nothing, h[:, 2:].flatten(1)], 1))


def _given(kind: type[nn.Module], weight: Tensor, *sizes: int, **options: int) -> nn.Module:
    """Make a layer without a bias and with these weights, drawing nothing."""
    layer = kind(*sizes, **options, bias=False, device="meta").to_empty(device="cpu")
    layer.requires_grad_(False).get_parameter("weight").copy_(weight)
    return layer


def _frame(side: int) -> Bool[Tensor, "side side"]:
    frame = torch.ones(side, side, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    return frame


@dataclass(frozen=True, eq=False, kw_only=True)
class BackgroundOnly(Planted):
    """Pictures of an object on a background that alone decides; `truth` is the pixels that decide, [H, W].

    Attributes:
        objects: where the object is.
        without: the pictures with the object painted over.
        labels: the classes, which the model gets right.
    """

    objects: Bool[Tensor, "n H W"]
    without: Float[Tensor, "n 3 H W"]
    labels: Int[Tensor, " n"]


def background_only(examples: int = 8, side: int = 20, seed: int = 0) -> BackgroundOnly:
    """Plant a convolutional classifier that reads the frame of the picture, and an object that attracts guided maps.

    Two equal units look for the strongest edge, and the next layer takes one from the other: the output never depends
    on either. Guided backpropagation and deconvnet drop the negative signal of the second unit and keep the first's,
    so their maps peak on the object, and they pass the pointing game, in all pictures. Painting the object over
    changes no output by a bit, and the gradient there is exactly 0.

    Truth: the frame, two pixels wide; the model is blind to what is inside it.

    Args:
        examples: n.
        side: of the pictures, at least 12.
        seed: of colors and places.

    Raises:
        ConfigError: pictures that are too small.

    >>> p = background_only()
    >>> torch.equal(p.model(p.x), p.model(p.without)), torch.equal(p.model(p.x).argmax(1), p.labels)
    (True, True)
    """
    if side < 12:
        raise ConfigError(f"side={side}", "at least 12", "leave room for an object inside the frame")
    generator = seeded(seed)
    labels = torch.arange(examples) % 2
    tint = torch.tensor([[0.6, 0.4, 0.3], [0.3, 0.4, 0.6]])[labels]
    ground = tint[:, :, None, None] + 0.05 * (torch.rand(examples, 3, side, side, generator=generator) - 0.5)
    stencil = torch.ones(5, 5)
    stencil[1:4, 1:4] = 0
    stencil[2, 2] = 1
    places = torch.randint(3, side - 7, (examples, 2), generator=generator)
    x, objects = ground.clone(), torch.zeros(examples, side, side, dtype=torch.bool)
    for n, (i, j) in enumerate(places.tolist()):
        x[n, :, i : i + 5, j : j + 5] = stencil
        objects[n, i : i + 5, j : j + 5] = True
    return BackgroundOnly(
        model=_Background(side).eval(),
        x=x,
        baseline=torch.zeros_like(x[:1]),
        truth=_frame(side),
        target=labels,
        objects=objects,
        without=ground,
        labels=labels,
    )

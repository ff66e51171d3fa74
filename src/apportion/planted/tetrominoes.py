"""Tetrominoes in noise: pictures whose class is in four pixels, or eight (XAI-TRIS; Clark et al. 2024)."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apportion.core.errors import ConfigError
from apportion.parts.baselines.simple import blur, blur_matrix
from apportion.planted.problem import Planted, normal, seeded

_SIDE = 8
_SMOOTHING = 3.0
_T = ((1, 0), (1, 1), (1, 0))
_L = ((1, 0), (1, 0), (1, 1))


class Scenario(enum.Enum):
    """How the class is in the picture; the values are the authors' α on white and on correlated background."""

    LINEAR = (0.18, 0.0125)
    """A T at one place, or an L at another, is added."""
    MULTIPLICATIVE = (0.7, 0.1)
    """The same, but the noise is weaker there."""
    MOVED = (0.65, 0.2)
    """The T or L is anywhere, and turned by quarters."""
    XOR = (0.35, 0.15)
    """Both are there, of one sign or of opposite signs."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Tetrominoes(Planted):
    """Pictures of 8 × 8 with a tetromino; `truth` [n, 8, 8] is the pixels that the class is in.

    Attributes:
        labels: 0 for T, or equal signs; 1 for L, or opposite signs.
        own: the pixels whose values this picture's pattern changed, which is what the authors' code has as truth.
    """

    labels: Int[Tensor, " n"]
    own: Bool[Tensor, "n 8 8"]


def _fixed() -> Tensor:
    """Place T and L as the authors do: [2, 8, 8]."""
    out = torch.zeros(2, _SIDE, _SIDE, dtype=torch.float64)
    out[0, 1:4, 1:3] = torch.tensor(_T)
    out[1, 4:7, 5:7] = torch.tensor(_L)
    return out


def _everywhere() -> Tensor:
    """Place T and L, turned, at all places: [2, 168, 8, 8]."""
    kinds = []
    for shape in (_T, _L):
        places = []
        for turns in range(4):
            turned = torch.rot90(torch.tensor(shape, dtype=torch.float64), turns)
            h, w = turned.shape
            for i in range(_SIDE - h + 1):
                for j in range(_SIDE - w + 1):
                    place = torch.zeros(_SIDE, _SIDE, dtype=torch.float64)
                    place[i : i + h, j : j + w] = turned
                    places.append(place)
        kinds.append(torch.stack(places))
    return torch.stack(kinds)


class TetrominoOdds(nn.Module):
    """log p(class 1) / p(class 0) of a picture on white background, [R, 1, 8, 8] -> [R]: no classifier is better.

    With t and l the sums over the pixels of T and L, k the pattern's height by the noise's variance:
    k (l - t) if linear; a weighted difference of the sums of squares if multiplicative;
    log cosh k(t - l) - log cosh k(t + l) for XOR; the difference of log-sum-exps over all places if moved.
    """

    patterns: Tensor

    def __init__(self, scenario: Scenario, height: float, variance: float) -> None:
        super().__init__()
        self.scenario, self.height, self.variance = scenario, height, variance
        self.register_buffer("patterns", _everywhere() if scenario is Scenario.MOVED else _fixed()[:, None])

    def forward(self, x: Float[Tensor, "R 1 8 8"]) -> Float[Tensor, " R"]:
        patterns = self.patterns.to(x.dtype).flatten(2)
        flat = x.flatten(1) ** 2 if self.scenario is Scenario.MULTIPLICATIVE else x.flatten(1)
        t, l = (flat @ p.T * (self.height / self.variance) for p in patterns)  # noqa: E741
        if self.scenario is Scenario.MOVED:
            return l.logsumexp(1) - t.logsumexp(1)
        t, l = t[:, 0], l[:, 0]  # noqa: E741
        if self.scenario is Scenario.XOR:
            return _log_cosh(t - l) - _log_cosh(t + l)
        return t - l if self.scenario is Scenario.MULTIPLICATIVE else l - t


def _log_cosh(x: Tensor) -> Tensor:
    return torch.logaddexp(x, -x)


def tetrominoes(
    scenario: Scenario = Scenario.LINEAR,
    count: int = 200,
    seed: int = 0,
    correlated: bool = False,
    alpha: float | None = None,
) -> Tetrominoes:
    """Draw pictures α · pattern + (1 - α) · noise, or (1 - α pattern) ⊙ noise; half of each class.

    As in the authors' code pattern and noise are divided by their Frobenius norms first, here by the expected ones, so
    that a picture does not depend on its company; the noise then has a mean square of 1. Correlated noise is white
    noise blurred with a standard deviation of 3. Where patterns are, is decided by the class alone, so nothing else is
    informative by itself; blurred, neighbors are suppressors, and whoever trains on these will use them.

    Truth: the pixels of both patterns, since the absence of T tells L; of the one that is there if it moves. The
    model is the best classifier on white background, and reads these pixels and no others, unless they move.

    Args:
        scenario: how the class is in the picture.
        count: how many, even.
        seed: of noise and places.
        correlated: blur the noise.
        alpha: the pattern's share, from 0 to 1; by default the authors', for about the same difficulty.

    Raises:
        ConfigError: an odd count, or α out of range.

    >>> p = tetrominoes(Scenario.XOR, count=400)
    >>> p.x.shape, p.truth[0].sum().item(), ((p.model(p.x) > 0) == (p.labels == 1)).double().mean() > 0.9
    (torch.Size([400, 1, 8, 8]), 8, tensor(True))
    """
    alpha = scenario.value[correlated] if alpha is None else alpha
    if count % 2 or count < 2 or not 0 < alpha < 1:
        raise ConfigError(f"count={count}, alpha={alpha}", "an even count, and 0 < alpha < 1")
    generator = seeded(seed)
    labels = torch.arange(count) % 2
    patterns = _patterns(scenario, labels, generator)
    noise = normal(generator, count, 1, _SIDE, _SIDE)
    if correlated:
        each = blur_matrix(_SIDE, _SMOOTHING, noise)
        noise = blur(noise, _SMOOTHING) * (_SIDE / float(each.square().sum()))
    own = patterns != 0
    if scenario is Scenario.MULTIPLICATIVE:
        window = 1 - alpha * patterns
        scale = _SIDE / float(window[0].norm())
        x = scale * window * noise
        # Σ x² / (2 v²) (1 / (1 - α)² - 1) over the pixels of a pattern
        height, variance = 0.5 * (1 / (1 - alpha) ** 2 - 1), scale**2
    else:
        height, variance = alpha * _SIDE / math.sqrt(float(patterns[0].square().sum())), (1 - alpha) ** 2
        x = height * patterns + (1 - alpha) * noise
    truth = own if scenario is Scenario.MOVED else (_fixed().sum(0) != 0).expand_as(own)
    return Tetrominoes(
        model=TetrominoOdds(scenario, height, variance).eval(),
        x=x,
        baseline=torch.zeros_like(x[:1]),
        truth=truth[:, 0].contiguous(),
        labels=labels,
        own=own[:, 0],
    )


def _patterns(scenario: Scenario, labels: Tensor, generator: torch.Generator) -> Float[Tensor, "n 1 8 8"]:
    if scenario is Scenario.MOVED:
        every = _everywhere()
        return every[labels, torch.randint(every.shape[1], labels.shape, generator=generator)][:, None]
    fixed = _fixed()
    if scenario is Scenario.XOR:
        sign = torch.randint(2, labels.shape, generator=generator).double() * 2 - 1
        signs = torch.stack([sign, sign * (1 - 2 * labels)], 1)
        return torch.einsum("nk,khw->nhw", signs, fixed)[:, None]
    return fixed[labels][:, None]

"""Noise of a map: roughness, fine structure and changes of sign between neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.card import Paper
from apportion.core.errors import ConfigError, InputError
from apportion.core.question import Question
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.scores import Direction
from apportion.parts.baselines import blur

CARD = MetricCard(
    title="Noise of a map",
    paper=Paper(
        "Smilkov, Thorat, Kim, Viégas, Wattenberg",
        2017,
        "SmoothGrad: removing noise by adding noise",
        "arXiv:1706.03825",
    ),
    intent="What makes a map look noisy: its variation from pixel to pixel, fine structure, changes of sign.",
    direction=Direction.LOWER,
    range=(0.0, None),
    chance="that of white noise, which stands in parts['white']",
    cautions=(
        "A blurred map is less noisy and no truer: a low value says nothing of what the network does.",
        "The source of the name has no formula for it; these are ours, and stated in the docstring.",
    ),
)


def beside(q: Question, m: Float[Tensor, "B H W"], sigma: float) -> dict[str, Float[Tensor, "B H W"]]:
    """Make what noise is compared with: white noise of the maps' size, one for all maps of an example, and blurs."""
    owner = torch.arange(len(m))
    white = q.stream("white noise").normal(torch.zeros(m.shape), owner, 0 * owner).to(m)
    return {"white": white, "blurred": blur(m[:, None], sigma)[:, 0]}


@register(CARD)
@dataclass(frozen=True)
class MapNoise(Metric):
    """Noise of the map m[h, w], its channels summed.

    `variation` is Σ|m[h+1, w] - m[h, w]| + |m[h, w+1] - m[h, w]| over Σ|m|: 2√2 for Gaussian
    white noise on large pictures, near 0 for smooth maps. `frequency` is the share of the energy of m less its mean at
    frequencies above `above` cycles a pixel, by the discrete Fourier transform of the map mirrored at its borders.
    `flips` is the share of neighbouring pairs of different sign. All three are in `parts`; `white` and `blurred` there
    hold what `values` would be for white noise of the same size, and for this map after a Gaussian blur of `blur`
    pixels.

    Undefined for maps of zeros, and `frequency` for constant ones.

    Attributes:
        of: which one `values` has.
        above: in cycles a pixel: .5 is the finest along an axis, √½ along the diagonal.
        blur: standard deviation in pixels.

    Raises:
        InputError: maps that are no pictures.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.sum((1, 2, 3))), torch.zeros(1, 1, 2, 2)
    >>> s = MapNoise()(field, x, torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]]))
    >>> s.values, s.parts["flips"]
    (tensor([1.]), tensor([0.5000]))
    """

    of: Literal["variation", "frequency", "flips"] = "variation"
    above: float = 0.25
    blur: float = 2.0

    _positive = ("blur",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.above <= math.sqrt(0.5):
            raise ConfigError(f"above={self.above}", "cycles a pixel: 0 to √½, the finest there is", "write above=.25")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Measure the map, white noise of its size, and the map blurred."""
        values = subject.map(q)
        if not isinstance(values, Tensor) or values.ndim != 4 or min(values.shape[2:]) < 2:
            shapes = tuple(values.shape) if isinstance(values, Tensor) else "several tensors"
            raise InputError(
                f"a map of shape {shapes}", "pictures [B, channels, H, W] of 2 × 2 pixels or more", "leave it out"
            )
        m = values.sum(1)
        found = self._all(m)
        for name, other in beside(q, m, self.blur).items():
            found[name] = self._all(other)[self.of]
        none = (m == 0).flatten(1).all(1)
        value = found[self.of]
        return Found(value, parts=found, undefined={"a map of zeros": none, "a constant map": value.isnan() & ~none})

    def _all(self, m: Float[Tensor, "B H W"]) -> dict[str, Tensor]:
        high = m.abs().amax((1, 2), keepdim=True)
        m = m / torch.where(high > 0, high, 1)  # or squares of tiny values vanish, and of huge ones overflow
        mass = m.abs().sum((1, 2))
        down, across = m[:, 1:] - m[:, :-1], m[:, :, 1:] - m[:, :, :-1]
        rough = down.abs().sum((1, 2)) + across.abs().sum((1, 2))
        turned = ((m[:, 1:] * m[:, :-1]) < 0).sum((1, 2)) + ((m[:, :, 1:] * m[:, :, :-1]) < 0).sum((1, 2))
        pairs = down[0].numel() + across[0].numel()
        none = mass == 0
        return {
            "variation": torch.where(none, torch.nan, rough / mass),
            "frequency": self._fine(m),
            "flips": torch.where(none, torch.nan, turned.to(m) / pairs),
        }

    def _fine(self, m: Tensor) -> Tensor:
        centered = m - m.mean((1, 2), keepdim=True)
        mirrored = torch.cat([centered, centered.flip(1)], 1)
        mirrored = torch.cat([mirrored, mirrored.flip(2)], 2)
        energy = torch.fft.fft2(mirrored).abs().square()
        h, w = (torch.fft.fftfreq(n, dtype=m.dtype, device=m.device) for n in mirrored.shape[1:])
        fine = (h[:, None] ** 2 + w**2).sqrt() > self.above
        total = energy.sum((1, 2))
        flat = centered.abs().amax((1, 2)) <= 1e-6 * m.abs().amax((1, 2))
        return torch.where(flat, torch.nan, (energy * fine).sum((1, 2)) / total)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(), cls("frequency"), cls("flips"))

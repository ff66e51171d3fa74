"""Kernels: how much a sample counts, by its distance from the example in the surrogate's features."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.config import Configurable

Samples = Float[Tensor, "*b N P"]
Center = Float[Tensor, "*b P"]
Weights = Float[Tensor, "*b N"]


@dataclass(frozen=True)
class Distance(Configurable):
    """Base of distances between samples and the example."""

    example: ClassVar[str] = "ap.surrogates.Cosine()"

    @abstractmethod
    def __call__(self, z: Samples, center: Center) -> Weights:
        """Measure how far each sample is from the example."""


@dataclass(frozen=True)
class Cosine(Distance):
    """1 - cos(z, center); 1 for a sample without any player.

    >>> Cosine()(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]), torch.ones(2))
    tensor([0.0000, 0.2929, 1.0000])
    """

    def __call__(self, z: Samples, center: Center) -> Weights:
        both = z.square().sum(-1) * center.square().sum(-1)[..., None]
        along = (z * center[..., None, :]).sum(-1)
        cosine = along / torch.where(both > 0, both, 1).sqrt()
        return (1 - torch.where(both > 0, cosine, 0)).clamp(min=0)


@dataclass(frozen=True)
class Euclid(Distance):
    """|z - center|, in the units of the surrogate's features."""

    def __call__(self, z: Samples, center: Center) -> Weights:
        return (z - center[..., None, :]).square().sum(-1).sqrt()


@dataclass(frozen=True)
class Kernel(Configurable):
    """Base of kernels."""

    example: ClassVar[str] = "ap.surrogates.Exponential(0.25)"

    @abstractmethod
    def __call__(self, z: Samples, center: Center, features: Float[Tensor, "*b"]) -> Weights:
        """Weigh samples.

        Args:
            z: the samples as the surrogate sees them.
            center: the example itself.
            features: how many features it has; fewer than there are columns where other examples have more.
        """


@dataclass(frozen=True)
class Exponential(Kernel):
    r"""sqrt(exp(-D² / w²)), the root included; Ribeiro et al. 2016, section 3.4 without the root, which is the code's.

    Attributes:
        width: w, in units of the distance.
        distance: D.
        per_root_feature: multiply the width by the root of the number of features, as the authors do for tables.

    >>> half = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    >>> round(float(Exponential(0.25)(half, torch.ones(4), torch.tensor(4.0))), 4)
    0.5034
    """

    _positive = ("width",)

    width: float = 0.25
    distance: Distance = Cosine()
    per_root_feature: bool = False

    def __call__(self, z: Samples, center: Center, features: Float[Tensor, "*b"]) -> Weights:
        width = self.width * features.sqrt() if self.per_root_feature else torch.full_like(features, self.width)
        return exponential(self.distance(z, center), width)


def exponential(distance: Weights, width: Float[Tensor, "*b"]) -> Weights:
    """Weigh distances by sqrt(exp(-D² / w²)), one width per example."""
    return torch.exp(-(distance.square() / (2 * width.square()[..., None])))


@dataclass(frozen=True)
class Uniform(Kernel):
    """Every sample counts alike: the sampling alone says what is near."""

    def __call__(self, z: Samples, center: Center, features: Float[Tensor, "*b"]) -> Weights:
        return torch.ones_like(z[..., 0])

"""Regressions: linear models of the score around an example, weighted, batched, in float64."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core.config import Configurable
from apportion.core.errors import ConfigError

Samples = Float[Tensor, "*b N P"]
Values = Float[Tensor, "*b N"]
Weights = Float[Tensor, "*b N"]
PerFeature = Float[Tensor, "*b P"]
Kept = Bool[Tensor, "*b P"]

_MOST = 8192
"""Features of which a regression takes all pairs: the matrix has half a gigabyte."""
_SINGULAR = 1e-11
"""A pivot this small beside the largest entry: the samples do not determine the coefficients."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A linear model fitted to samples.

    Attributes:
        coefficients: one per feature; 0 where a feature was left out.
        intercept: the model's value where all features are 0.
        standard_error: of the coefficients, for the sampling; what a penalty does is no part of it.
        r2: the weighted share of the variance about the mean that is explained, on the samples of the fit; below 0
            where a model without an intercept does worse than the mean.
        parts: what a regression knows besides.
    """

    coefficients: Float[Tensor, "... P"]
    intercept: Float[Tensor, "..."]
    standard_error: Float[Tensor, "... P"]
    r2: Float[Tensor, "..."]
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def predict(self, z: Samples) -> Values:
        """Give the model's values at samples."""
        return (z @ self.coefficients[..., None]).squeeze(-1) + self.intercept[..., None]


@dataclass(frozen=True, eq=False)
class Centered:
    """Samples less their weighted means, with what regressions make of them; columns left out are 0.

    Attributes:
        z: samples less their means.
        v: values less theirs.
        w: weights.
        z_mean: what was taken off; 0 without an intercept.
        v_mean: likewise.
        cross: Σ w z v.
        kept: the columns in play.
    """

    z: Samples
    v: Values
    w: Weights
    z_mean: PerFeature
    v_mean: Float[Tensor, "*b"]
    cross: PerFeature
    kept: Kept

    @classmethod
    def of(cls, z: Samples, v: Values, w: Weights, kept: Kept, intercept: bool = True) -> Centered:
        """Center samples about their weighted means, unless the model is to go through 0."""
        total = w.sum(-1)
        z_mean = (w[..., None, :] @ z).squeeze(-2) / total[..., None]
        v_mean = (w * v).sum(-1) / total
        if not intercept:
            z_mean, v_mean = torch.zeros_like(z_mean), torch.zeros_like(v_mean)
        z = torch.where(kept[..., None, :], z - z_mean[..., None, :], 0)
        v = v - v_mean[..., None]
        return cls(z, v, w, z_mean, v_mean, (z.mT @ (w * v)[..., None]).squeeze(-1), kept)

    @cached_property
    def gram(self) -> Float[Tensor, "*b P P"]:
        """Σ w z zᵀ.

        Raises:
            ConfigError: too many features for a matrix of all pairs.
        """
        if (features := self.z.shape[-1]) > _MOST:
            raise ConfigError(
                f"a regression of {features} features",
                f"at most {_MOST}",
                "group them, as ap.groups.Superpixels(50) does, or regress each alone with ap.surrogates.Separate()",
            )
        return (self.w[..., None] * self.z).mT @ self.z

    def fit(self, coefficients: PerFeature, standard_error: PerFeature, **parts: Tensor) -> Fit:
        """Make the model of these coefficients."""
        left = self.v - (self.z @ coefficients[..., None]).squeeze(-1)
        mean = (self.w * self.v).sum(-1, keepdim=True) / self.w.sum(-1, keepdim=True)  # 0 but without an intercept
        unexplained, all_of_it = (self.w * left.square()).sum(-1), (self.w * (self.v - mean).square()).sum(-1)
        # a constant score leaves nothing to explain, and any model of it that is constant does so
        least = rounding(self.v + self.v_mean[..., None], self.w)
        varies = all_of_it > least
        none = (unexplained <= least).to(unexplained)
        r2 = torch.where(varies, 1 - unexplained / torch.where(varies, all_of_it, 1), none)
        intercept = self.v_mean - (self.z_mean * coefficients).sum(-1)
        return Fit(coefficients, intercept, standard_error, r2, parts)


def rounding(v: Values, w: Weights) -> Float[Tensor, "*b"]:
    """Give Σ w v² ε², the sum of squares below which differences between scores are those of rounding.

    >>> bool(rounding(torch.tensor([3.0]).double(), torch.ones(1).double()) < 1e-22)
    True
    """
    return (w * v.square()).sum(-1) * (4096 * torch.finfo(v.dtype).eps) ** 2


@dataclass(frozen=True)
class Regression(Configurable):
    """Base of regressions."""

    example: ClassVar[str] = "ap.surrogates.Ridge()"

    @abstractmethod
    def __call__(self, z: Samples, v: Values, w: Weights, kept: Kept) -> Fit:
        """Fit a linear model.

        Args:
            z: samples of the features.
            v: the score at each.
            w: how much each counts.
            kept: which features may have a coefficient.
        """


@dataclass(frozen=True)
class Ridge(Regression):
    """Minimize Σ w (v - b₀ - bᵀz)² + α |b|²; the intercept b₀ bears no penalty.

    With α > 0 coefficients are drawn to 0, the more the fewer samples there are: independent halves of N samples of
    weight 1 give N/4 / (N/4 + α) of the effect. Standard errors are those of the sandwich formula with residuals
    divided by 1 - leverage (HC3): they hold for samples drawn at random, whatever the score's curvature.

    Attributes:
        alpha: the penalty.
        intercept: whether there is b₀.

    >>> z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).double()
    >>> v, one = z @ torch.tensor([3.0, 6.0, 9.0]).double(), torch.ones(8).double()
    >>> Ridge(1.0)(z, v, one, torch.ones(3) > 0).coefficients.round(decimals=4)    # two thirds, of 8 samples
    tensor([2., 4., 6.], dtype=torch.float64)

    Raises:
        ConfigError: samples that do not determine the coefficients, without a penalty.
    """

    _not_negative = ("alpha",)

    alpha: float = 1.0
    intercept: bool = True

    def __call__(self, z: Samples, v: Values, w: Weights, kept: Kept) -> Fit:
        c = Centered.of(z, v, w, kept, self.intercept)
        pull = self._pull(c, kept)  # what a unit of weighted residual adds to each coefficient
        coefficients = (pull.mT @ (c.w * c.v)[..., None]).squeeze(-1)
        left = c.v - (c.z @ coefficients[..., None]).squeeze(-1)
        leverage = c.w * ((pull * c.z).sum(-1) + (1 / c.w.sum(-1, keepdim=True) if self.intercept else 0))
        left = left / (1 - leverage).clamp(min=1e-6)
        error = ((c.w * left).square()[..., None] * pull.square()).sum(-2).sqrt()
        return c.fit(coefficients, error)

    def _pull(self, c: Centered, kept: Kept) -> Samples:
        """Give Z (ZᵀWZ + α)⁻¹, by way of the pairs of samples where they are fewer than those of features."""
        samples, features = c.z.shape[-2:]
        steep = float((c.w[..., None] * c.z.square()).sum(-2).max()) if samples < features <= _MOST else torch.inf
        if self.alpha <= _SINGULAR * steep:
            return c.z @ inverse_of(c.gram, self.alpha, kept)
        pairs = c.z @ c.z.mT * c.w[..., None, :]
        return torch.linalg.solve(pairs + self.alpha * torch.eye(samples).to(pairs), c.z)


def inverse_of(gram: Float[Tensor, "*b P P"], alpha: float, kept: Kept) -> Float[Tensor, "*b P P"]:
    """Invert Σ w z zᵀ + α; columns that are left out, or never vary, get coefficients of 0.

    Raises:
        ConfigError: it is singular.
    """
    lower, determined = factor_of(gram, alpha, kept)
    if not bool(determined.all()):
        raise ConfigError(
            f"a regression of {int(kept.sum(-1).max())} features on samples that do not determine them",
            "more samples than features, or a penalty",
            "draw more samples, use fewer players, or give Ridge a positive alpha",
        )
    return torch.cholesky_inverse(lower)


def factor_of(
    gram: Float[Tensor, "*b P P"], alpha: float, kept: Kept
) -> tuple[Float[Tensor, "*b P P"], Bool[Tensor, "*b"]]:
    """Factor Σ w z zᵀ + α into L Lᵀ, and tell where it is not singular."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    idle = ~kept | ((diagonal == 0) & (alpha == 0))
    full = gram + torch.diag_embed(torch.where(idle, gram.new_tensor(1.0), gram.new_tensor(alpha)))
    lower, info = torch.linalg.cholesky_ex(full)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    small = (pivots < _SINGULAR * full.diagonal(dim1=-2, dim2=-1)).any(-1)
    return lower, (info == 0) & ~small


@dataclass(frozen=True)
class Separate(Regression):
    """Each feature alone: Cov(v, z) / Var(z), over the weighted samples.

    Where features are sampled independently of each other and weighed alike, this estimates what least squares does,
    without an inverse, and so from fewer samples than features. A kernel makes features dependent, and then it does
    not. The model whose R² is given has all of these coefficients at once.

    >>> z = torch.eye(2).double()
    >>> Separate()(z, torch.tensor([1.0, 3.0]).double(), torch.ones(2).double(), torch.ones(2) > 0).coefficients
    tensor([-2.,  2.], dtype=torch.float64)
    """

    def __call__(self, z: Samples, v: Values, w: Weights, kept: Kept) -> Fit:
        c = Centered.of(z, v, w, kept)
        each = 1 / c.w.sum(-1)[..., None, None]
        found: list[tuple[Tensor, Tensor]] = []
        for part, cross in zip(c.z.split(_MOST, -1), c.cross.split(_MOST, -1), strict=True):
            own = (c.w[..., None] * part.square()).sum(-2)
            varies = own > 0
            scale = torch.where(varies, own, 1)
            b = torch.where(varies, cross / scale, 0)
            leverage = c.w[..., None] * (part.square() / scale[..., None, :] + each)
            left = (c.v[..., None] - part * b[..., None, :]) / (1 - leverage).clamp(min=1e-6)
            error = (c.w[..., None] * left * part).square().sum(-2).sqrt() / scale
            found.append((b, torch.where(varies, error, 0)))
        return c.fit(*(torch.cat(both, -1) for both in zip(*found, strict=True)))


@dataclass(frozen=True)
class BayesianRidge(Regression):
    """Normal prior on coefficients, normal noise: the posterior mean, and its deviation as standard error.

    b = (λ + a ZᵀWZ)⁻¹ (λ b₀ + a ZᵀWv) with noise precision a and weight precision λ; Zhao et al. 2021. What is None
    is found by maximizing the evidence (MacKay's updates, scikit-learn's order, hyperpriors and stopping rule):
    neither given is the paper's non-informative case, λ alone its partial one, both its full prior. The intercept has
    no distribution: it makes the weighted means meet.

    Attributes:
        prior_mean: b₀, the same for every feature.
        weight_precision: λ.
        noise_precision: a.
        iterations: updates, at most.
        tolerance: the sum of changes of coefficients at which they stop.
    """

    _positive = ("iterations", "tolerance")

    prior_mean: float = 0.0
    weight_precision: float | None = None
    noise_precision: float | None = None
    iterations: int = 300
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_precision", "noise_precision"):
            given = getattr(self, name)
            if given is not None and given <= 0:
                raise ConfigError(f"BayesianRidge({name}={given!r})", "a positive number, or None", "leave it out")

    def __call__(self, z: Samples, v: Values, w: Weights, kept: Kept) -> Fit:
        c = Centered.of(z, v, w, kept)
        prior = torch.where(kept, c.cross.new_tensor(self.prior_mean), 0)
        size, turn = torch.linalg.eigh(c.gram)  # all updates happen in the basis where the Gram matrix is diagonal
        real = size > 1e-12 * size.amax(-1, keepdim=True)  # fewer samples than features leave directions without any
        size = torch.where(real, size, 0)
        offset = (turn.mT @ prior[..., None]).squeeze(-1)
        rest = c.v - (c.z @ prior[..., None]).squeeze(-1)  # of what the prior mean leaves, a prior about 0
        away = (turn.mT @ (c.z.mT @ (c.w * rest)[..., None])).squeeze(-1)
        away = torch.where(real, away, 0)
        plain = (turn @ torch.where(real, away / torch.where(real, size, 1), 0)[..., None]).squeeze(-1)
        beyond = (c.w * (rest - (c.z @ plain[..., None]).squeeze(-1)).square()).sum(-1)  # out of any model's reach
        count, energy = c.w.sum(-1), (c.w * c.v.square()).sum(-1)
        given = (self.noise_precision, self.weight_precision)
        noise = 1 / (energy / count + torch.finfo(energy.dtype).eps) if given[0] is None else count * 0 + given[0]
        weight = torch.ones_like(count) if given[1] is None else count * 0 + given[1]

        def mean(noise: Tensor, weight: Tensor) -> Tensor:
            return away / (size + (weight / noise)[..., None])

        tiny, done, old = 1e-6, torch.zeros_like(count, dtype=torch.bool), None
        rounds = torch.zeros_like(count)
        for _ in range(self.iterations if None in given else 0):
            b = mean(noise, weight)
            used = size * noise[..., None]
            gamma = (used / (used + weight[..., None])).sum(-1)
            short = torch.where(real, away - size * b, 0).square() / torch.where(real, size, 1)
            error = beyond + short.sum(-1)
            new_weight = (gamma + 2 * tiny) / (b.square().sum(-1) + 2 * tiny)
            new_noise = (count - gamma + 2 * tiny) / (error + 2 * tiny)
            rounds = rounds + ~done
            noise = torch.where(done | (given[0] is not None), noise, new_noise)
            weight = torch.where(done | (given[1] is not None), weight, new_weight)
            if old is not None:
                change = (turn @ (old - b)[..., None]).squeeze(-1).abs().sum(-1)
                done = done | (change < self.tolerance)
                if bool(done.all()):
                    break
            old = b
        coefficients = (turn @ (mean(noise, weight) + offset)[..., None]).squeeze(-1)
        spread = 1 / (noise[..., None] * size + weight[..., None])
        variance = torch.where(kept, (turn.square() @ spread[..., None]).squeeze(-1), 0)
        coefficients = torch.where(kept, coefficients, 0)
        return c.fit(
            coefficients, variance.sqrt(), posterior_variance=variance,
            noise_precision=noise, weight_precision=weight, rounds=rounds,
        )  # fmt: skip

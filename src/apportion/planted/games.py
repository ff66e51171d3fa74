"""Functions of few features whose attributions can be written down: linear, additive, multilinear, homogeneous."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.core.errors import ConfigError
from apportion.planted.functions import Linear, Points, Saturated, Scores
from apportion.planted.networks import _empty, _fill
from apportion.planted.problem import Planted, PlantedGame, away_from_zero, normal, seeded, shapley_shares


class Cubics(nn.Module):
    """Σ_i a_i x_i + b_i x_i² + c_i x_i³: no feature meets another."""

    coefficients: Tensor

    def __init__(self, coefficients: Float[Tensor, "3 d"]) -> None:
        super().__init__()
        self.register_buffer("coefficients", coefficients)

    def parts(self, x: Points) -> Float[Tensor, "R d"]:
        """Evaluate what each feature gives."""
        a, b, c = self.coefficients.to(x.dtype)
        return x * (a + x * (b + x * c))

    def forward(self, x: Points) -> Scores:
        return self.parts(x).sum(1)


class Multilinear(nn.Module):
    """Σ_S c_S Π_{i ∈ S} x_i, a coefficient for each set of features, in the order of `AllSubsets`."""

    coefficients: Tensor
    members: Tensor

    def __init__(self, coefficients: Float[Tensor, " N"]) -> None:
        super().__init__()
        features = coefficients.shape[0].bit_length() - 1
        self.register_buffer("coefficients", coefficients)
        bits = (torch.arange(1 << features)[:, None] >> torch.arange(features)) & 1
        self.register_buffer("members", bits.bool())

    def forward(self, x: Points) -> Scores:
        return torch.where(self.members, x[:, None], 1.0).prod(2) @ self.coefficients.to(x.dtype)

    def dividends(self, x: Points, baseline: Float[Tensor, "#R d"]) -> Float[Tensor, "R N"]:
        """Give a(T) = Σ_{S ⊇ T} c_S Π_{i ∈ T} (x_i - x'_i) Π_{i ∈ S∖T} x'_i, by expanding x = x' + (x - x')."""
        out = self.coefficients.to(x.dtype).expand(len(x), -1)
        base = baseline.expand_as(x)
        for i in range(x.shape[1]):
            without, with_ = out.reshape(len(x), -1, 2, 1 << i).unbind(2)
            start, move = base[:, i, None, None], (x - base)[:, i, None, None]
            out = torch.stack([without + start * with_, move * with_], 2).reshape(len(x), -1)
        return out


def linear(features: int = 5, examples: int = 4, seed: int = 0) -> Planted:
    """f(x) = w · x + b. Truth: w_i (x_i - x'_i), which every method that attributes a change must give.

    Gradient × difference, integrated gradients, DeepLIFT, Shapley values and occlusion agree on it; sensitivity-n is 1
    for every n, and the infidelity of the gradient w is 0. The last feature has no weight. `model.weight` is w.

    Args:
        features: d, at least 2.
        examples: n.
        seed: of w, b, x and the baseline.

    >>> p = linear()
    >>> torch.allclose(p.truth.sum(1), p.model(p.x) - p.model(p.baseline)), bool((p.truth[:, -1] == 0).all())
    (True, True)
    """
    generator = seeded(seed)
    weight = away_from_zero(generator, features)
    weight[-1] = 0
    x, baseline = normal(generator, examples, features), 0.5 * normal(generator, 1, features)
    model = Linear(weight.tolist(), float(normal(generator, 1)))
    return Planted(model=model, x=x, baseline=baseline, truth=weight * (x - baseline))


def additive(features: int = 5, examples: int = 4, seed: int = 0) -> Planted:
    """f(x) = Σ g_i(x_i) with cubic g_i. Truth: g_i(x_i) - g_i(x'_i).

    Integrated gradients, Shapley values and occlusion give it, and sensitivity-n is 1 for every n; gradient ×
    difference does not give it, since the g_i bend.

    Args:
        features: d.
        examples: n.
        seed: of the g_i, x and the baseline.

    >>> p = additive()
    >>> torch.allclose(p.truth.sum(1), p.model(p.x) - p.model(p.baseline))
    True
    """
    generator = seeded(seed)
    model = Cubics(away_from_zero(generator, 3, features))
    x, baseline = normal(generator, examples, features), 0.5 * normal(generator, 1, features)
    return Planted(model=model, x=x, baseline=baseline, truth=model.parts(x) - model.parts(baseline))


def multilinear(
    features: int = 4, order: int | None = None, examples: int = 4, seed: int = 0, from_zero: bool = False
) -> PlantedGame:
    """f(x) = Σ_S c_S Π_{i ∈ S} x_i over sets of up to `order` features, with dividends in closed form.

    Truth: Shapley values Σ_{S ∋ i} a(S) / |S|. Integrated gradients are the same here, and only here: along the
    straight line each product's term is shared equally. Occlusion gives Σ_{S ∋ i} a(S), each term whole to all.

    Args:
        features: d; 2^d coefficients.
        order: the largest |S|; d by default.
        examples: n.
        seed: of the coefficients, x and the baseline.
        from_zero: take the baseline 0, where a(S) is the term of S itself.

    >>> p = multilinear()
    >>> p.dividends.shape, torch.allclose(p.truth.sum(1), p.model(p.x) - p.model(p.baseline))
    (torch.Size([4, 16]), True)
    """
    generator = seeded(seed)
    coefficients = away_from_zero(generator, 1 << features)
    model = Multilinear(coefficients)
    if order is not None:
        coefficients[model.members.sum(1) > order] = 0
    x, baseline = away_from_zero(generator, examples, features), 0.5 * normal(generator, 1, features)
    baseline = torch.zeros_like(baseline) if from_zero else baseline
    terms = model.dividends(x, baseline)
    return PlantedGame(model=model, x=x, baseline=baseline, truth=shapley_shares(terms), dividends=terms)


def homogeneous(
    features: int = 6, hidden: tuple[int, ...] = (10, 8), outputs: int = 3, examples: int = 4, seed: int = 0
) -> Planted:
    """A ReLU network without biases, so that f(t x) = t f(x) for t ≥ 0 and x · ∇f(x) = f(x).

    Truth: x ⊙ ∇f(x), computed from which units are on. Gradient × input, integrated gradients and DeepLIFT from 0, and
    LRP-0 give it. Output 0 is explained.

    Args:
        features: d.
        hidden: widths of the layers between; one at least.
        outputs: how many.
        examples: n.
        seed: of weights and x.

    Raises:
        ConfigError: no hidden layer.

    >>> p = homogeneous()
    >>> torch.allclose(p.truth.sum(1), p.model(p.x)[:, 0]), torch.allclose(p.model(3 * p.x), 3 * p.model(p.x))
    (True, True)
    """
    if not hidden:
        raise ConfigError("hidden=()", "one width at least", "for no hidden layer, see planted.linear")
    widths = (features, *hidden, outputs)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [_empty(lambda a=a, b=b: nn.Linear(a, b, bias=False)), nn.ReLU()]
    model = _fill(nn.Sequential(*layers[:-1]), seed)
    x = away_from_zero(seeded(seed + 1), examples, features)
    weights = [p.detach() for p in model.parameters()]
    on, h = [], x
    for weight in weights[:-1]:
        on.append(h @ weight.T > 0)
        h = (h @ weight.T).relu()
    slope = weights[-1][:1]
    for weight, passes in zip(reversed(weights[:-1]), reversed(on), strict=True):
        slope = (slope * passes) @ weight
    return Planted(model=model, x=x, baseline=torch.zeros(1, features, dtype=x.dtype), truth=x * slope, target=0)


def saturated() -> Planted:
    """f(x) = 1 - ReLU(1 - x) at 2, from 0: f goes from 0 to 1 and is flat at 2 (Sundararajan et al. 2017, section 2).

    Truth: 1, the change, which the only feature caused; whoever gives 0, as the gradient does, fails sensitivity (a).

    >>> p = saturated()
    >>> p.truth, p.model(p.x) - p.model(p.baseline)
    (tensor([[1.]], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    return Planted(model=Saturated(), x=2 * one, baseline=0 * one, truth=one)

"""Principles as checks: each says whether it holds for an explainer on planted models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from apportion import planted
from apportion.core.attribution import Attribution
from apportion.core.card import Need, Principle
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer
from apportion.core.field import Field
from apportion.core.score import Loss, Score

Check = Callable[[Explainer], bool]

TIGHT = 1e-9
"""Relative error below which two numbers in float64 count as equal."""


def points(count: int = 4, features: int = 5, seed: int = 1) -> Tensor:
    """Draw the points the checks look at, away from 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return x + 0.2 * x.sign()


def ready(explainer: Explainer, field: Field, like: Tensor) -> Explainer:
    """Let an explainer learn what it must, from noise in the shape of some examples."""
    noise = torch.randn(24, *like.shape[1:], generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return explainer.fitted(Field(field.model), noise.to(like))  # in chunks of its own choice


def score_for(explainer: Explainer) -> Score | None:
    """Choose what a method is asked about: the logit, or for those of a loss one that falls where the logit rises."""
    return Loss(log_loss) if Need.LOSS in explainer.card.needs else None


def log_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """-log sigmoid of the label's output, or of the only one."""
    return -torch.nn.functional.logsigmoid(outputs if outputs.ndim == 1 else outputs.gather(1, labels[:, None])[:, 0])


def _ask(explainer: Explainer, model: nn.Module | Callable[..., Tensor], x: Tensor, **options: object) -> Attribution:
    target = None if isinstance(model, planted.Saturated) and Need.LOSS not in explainer.card.needs else 1
    field = Field(model, score_for(explainer))
    return ready(explainer, field, x)(field, x, target=target, ids=range(len(x)), **options)  # pyright: ignore[reportArgumentType]


def _close(a: Tensor, b: Tensor, tolerance: float = TIGHT) -> bool:
    return bool(((a - b).abs() <= tolerance * (1e-3 + torch.maximum(a.abs().max(), b.abs().max()))).all())


def _relu(explainer: Explainer) -> bool:
    return Need.RELU in explainer.card.needs


def completeness(explainer: Explainer) -> bool:
    """Values sum to f(x) - f(0), up to 1e-6, on a smooth network, or on a ReLU network if it must be one."""
    x, net = points(), planted.dense_net(relu=_relu(explainer))
    with torch.no_grad():
        total = (net(x) - net(torch.zeros_like(x)))[:, 1]
    return _close(_ask(explainer, net, x).values.sum(1), total, 1e-6)


def sensitivity(explainer: Explainer) -> bool:
    """The one feature that differs from 0 and changes f gets a value, even where f is flat."""
    x = torch.tensor([[2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    return bool((_ask(explainer, planted.Saturated(), x).values[:, 0].abs() > TIGHT).all())


def dummy(explainer: Explainer) -> bool:
    """A feature with no weight in the network gets 0."""
    values = _ask(explainer, planted.dense_net(blind=2, relu=_relu(explainer)), points()).values
    return bool((values[:, 2].abs() <= TIGHT * values.abs().max()).all())


def linearity(explainer: Explainer) -> bool:
    """Values of 2 f - 3 g are 2 times those of f minus 3 times those of g."""
    x, f, g = points(), *(planted.dense_net(seed=seed, relu=_relu(explainer)) for seed in (0, 7))
    both = _ask(explainer, lambda z: 2 * f(z) - 3 * g(z), x).values
    return _close(both, 2 * _ask(explainer, f, x).values - 3 * _ask(explainer, g, x).values)


def symmetry(explainer: Explainer) -> bool:
    """Two exchangeable features with equal values get equal values."""
    x = points()
    x[:, 1] = x[:, 0]
    values = _ask(explainer, planted.symmetric_net(relu=_relu(explainer)), x).values
    return _close(values[:, 0], values[:, 1])


def implementation_invariance(explainer: Explainer) -> bool:
    """Two networks, equal as functions, get equal values: one with units that cancel, one that nests otherwise."""
    x = points()
    pairs = planted.equal_pair(), planted.largest_pair()
    return all(_close(_ask(explainer, a, x).values, _ask(explainer, b, x).values) for a, b in pairs)


def shift_invariance(explainer: Explainer) -> bool:
    """A shift of the input that the first bias undoes changes no value."""
    x, (f, g) = points(), planted.shifted_pair(0.7, relu=_relu(explainer))
    return _close(_ask(explainer, f, x).values, _ask(explainer, g, x + 0.7).values)


PRINCIPLES: dict[Principle, Check] = {
    Principle.COMPLETENESS: completeness,
    Principle.SENSITIVITY: sensitivity,
    Principle.DUMMY: dummy,
    Principle.LINEARITY: linearity,
    Principle.SYMMETRY: symmetry,
    Principle.IMPLEMENTATION_INVARIANCE: implementation_invariance,
    Principle.SHIFT_INVARIANCE: shift_invariance,
}
"""The principles that can be measured."""


def measure(explainer: Explainer, principle: Principle) -> bool:
    """Tell whether a principle holds for an explainer on planted models.

    Raises:
        ConfigError: the principle has no check.
    """
    if principle not in PRINCIPLES:
        known = ", ".join(p.name for p in PRINCIPLES)
        raise ConfigError(f"no check for {principle.name}", f"one of {known}", "measure one of those")
    return PRINCIPLES[principle](explainer)

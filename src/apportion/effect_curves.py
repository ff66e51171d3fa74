"""Curves of a feature's effect: what each example's score does, and what is expected after an intervention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core.attribution import Cost
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.field import Field
from apportion.core.score import Target
from apportion.methods.removal.ace import ACE, features


@dataclass(frozen=True, eq=False, repr=False)
class EffectCurves:
    """Curves over the range of each feature, in units of the score.

    Attributes:
        feature: the features, by index.
        alpha: what each is set to, ascending.
        individual: ICE, the score of each example with the feature set and all else as it is (Goldstein et al. 2015).
        expected: E[f | do(x_i = α)] for the example's class, as `ACE` has it.
        at: the example's own value of the feature.
        value: f(x).
        target: the class of each example; None without classes.
        cost: rows spent.
        warnings: what deserves a look.
    """

    feature: Int[Tensor, " k"]
    alpha: Float[Tensor, "k n"]
    individual: Float[Tensor, "B k n"]
    expected: Float[Tensor, "B k n"]
    at: Float[Tensor, "B k"]
    value: Float[Tensor, " B"]
    target: Any
    cost: Cost
    warnings: tuple[str, ...] = ()

    @property
    def spread(self) -> Float[Tensor, "B k"]:
        """How far ICE and the expectation differ in shape: the standard deviation over α of their difference.

        It is 0 where the feature acts alike on the example and at the data's mean, and grows with interactions.
        """
        return (self.individual - self.expected).std(-1, correction=0)

    def __repr__(self) -> str:
        batch, k, n = self.individual.shape
        lines = [f"EffectCurves of {batch} example(s), feature(s) {self.feature[:8].tolist()}, {n} values each"]
        lines += [f"  ICE against ACE, differing in shape by {float(self.spread.mean()):.3g} on average"] if k else []
        return "\n".join(lines + [f"  warning: {w}" for w in self.warnings])


def effect_curves(
    explainer: ACE,
    field: Field,
    x: Float[Tensor, "B d"],
    which: Sequence[int] | None = None,
    points: int = 33,
    *,
    target: Target = None,
    ids: Sequence[Any] | None = None,
    seed: int = 0,
) -> EffectCurves:
    """Set features to values over their range: in each example (ICE), and in expectation (ACE).

    `apportion.show.curves.curves` draws them.

    Args:
        explainer: with moments of the data, whose range is covered, ends included.
        field: what is asked of which model.
        x: examples, rows of features.
        which: features by index; None for all.
        points: values each feature is set to.
        target: the output whose curves these are; None for each example's top class.
        ids: names of the examples.
        seed: of random probes.

    Raises:
        ConfigError: another explainer or field, or fewer than two points.
        InputError: features that are not there.

    >>> import apportion as ap
    >>> ace = ap.ACE(ap.FeatureMoments.fit(torch.tensor([[0.0, 0.0], [2.0, 4.0]])))
    >>> field = ap.Field(lambda x: x[:, 0] * x[:, 1])
    >>> c = ap.effect_curves(ace, field, torch.tensor([[1.0, 3.0]]), [0], points=3)
    >>> c.individual[0, 0].tolist(), c.expected[0, 0].tolist()      # 3 α, and 2 α: the second feature's mean is 2
    ([0.0, 3.0, 6.0], [0.0, 2.0, 4.0])
    """
    if not isinstance(explainer, ACE):
        raise ConfigError(
            f"{kind_of(explainer)} as explainer of effect curves",
            "an ap.ACE with moments of the data",
            "write ap.ACE(ap.FeatureMoments.fit(data))",
        )
    if not isinstance(field, Field):
        raise ConfigError(f"{kind_of(field)} as field", "an ap.Field", "write effect_curves(ace, ap.Field(model), x)")
    if points < 2:
        raise ConfigError(f"points={points!r}", "at least 2, the ends of the range", "write points=33, for example")
    with torch.inference_mode(False):
        q = field.bind(x, target=target, ids=ids, seed=seed)
        d = features(q).shape[1]
        chosen = torch.arange(d) if which is None else torch.as_tensor(list(which), dtype=torch.long)
        if not bool(((chosen >= 0) & (chosen < d)).all()):
            raise InputError(
                f"features {chosen.tolist()} of examples with {d}", f"indices from 0 to {d - 1}", "count from 0"
            )
        chosen = chosen.to(q.device)
        low, high = (t[chosen] for t in explainer.range(q))
        alpha = low[:, None] + torch.linspace(0, 1, points).to(q.x) * (high - low)[:, None]
        column, flat = chosen.repeat_interleave(points), alpha.flatten()
        individual = q.x.new_zeros(len(q), len(flat))
        for step, owner in q.grid(len(flat), "individual curves"):
            rows = q.x[owner].scatter(1, column[step, None], flat[step, None])
            individual[owner, step] = q.value(rows, owner)
        expected = explainer.expected(q, column, flat.expand(len(q), -1)).value
        return EffectCurves(
            feature=chosen,
            alpha=alpha,
            individual=individual.unflatten(1, alpha.shape),
            expected=expected.unflatten(1, alpha.shape),
            at=q.x[:, chosen],
            value=q.fx,
            target=q.target,
            cost=q.cost,
            warnings=q.warnings,
        )

"""Max- and average-sensitivity: how far a map moves when the input moves a little."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.card import Paper
from apportion.core.question import Question
from apportion.metrics.fidelity.copies import by_example, copies, minus, norm
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, register
from apportion.metrics.scores import Direction
from apportion.parts.noise import Gaussian, NoiseModel, UniformBox

YEH = Paper(
    "Yeh, Hsieh, Suggala, Inouye, Ravikumar", 2019, "On the (in)fidelity and sensitivity of explanations", "NeurIPS"
)


@dataclass(frozen=True)
class _Moved(Metric):
    """What the two have in common: distances of the maps of noisy copies from the map of the example."""

    _positive = ("samples",)

    noise: NoiseModel = UniformBox(0.2)
    samples: int = 50
    relative: bool = True

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain copies, and see how far their maps are."""
        phi = subject.map(q)
        parts = [norm(minus(again, phi, owner)) for _, owner, _, again in copies(q, subject, self.noise, self.samples)]
        away, size = by_example(parts, len(q)), norm(phi)
        if not self.relative:
            return Found(self._summed(away), parts={"norm": size})
        zero = size == 0
        values = (self._summed(away) / torch.where(zero, 1, size)).masked_fill(zero, torch.nan)
        return Found(values, parts={"norm": size}, undefined={"a map of zeros, relative to which nothing is": zero})

    @abstractmethod
    def _summed(self, away: Float[Tensor, "B N"]) -> Float[Tensor, " B"]: ...

    def explanations(self, q: Question) -> int:
        """One for each copy."""
        return self.samples

    def questions(self, q: Question) -> int:
        """Each is explained with its own baselines."""
        return self.explanations(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Small ones."""
        return (cls(samples=3), cls(Gaussian(0.1, relative=False), 2, False))


@register(
    MetricCard(
        title="Max-sensitivity",
        paper=YEH,
        intent="The largest move of the map when the input moves within a small box.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(0.0, None),
        cost="an explanation for each copy",
        cautions=(
            "A map that ignores the input, such as an edge filter's or a constant one, is the most robust of all.",
            "A maximum over draws grows with their number: compare at one number only.",
            "A map that draws random numbers moves by these too.",
        ),
    )
)
@dataclass(frozen=True)
class MaxSensitivity(_Moved):
    """max_δ ‖Φ(x + δ) - Φ(x)‖₂ / ‖Φ(x)‖₂ over random δ: a lower bound of the maximum over the box.

    Copies are explained for the target of their example, all copies of all examples together.

    Attributes:
        noise: how copies are made: uniform within ±0.2 in the authors' code for data in [0, 1] (0.1 for methods in
            units of the score).
        samples: copies of each example, 50 in that code.
        relative: divide by the norm of the example's map, which is what is usually reported; False is the paper's
            definition, which does not divide.

    parts["norm"] is ‖Φ(x)‖₂. Undefined for maps of zeros if relative.

    Source: Yeh et al. (2019), section 3, with the authors' division. Their published loop divides what it has so
    far by the norm again with every draw; that is a slip, and not followed.

    >>> import apportion as ap, torch
    >>> square = ap.Field(lambda x: x.square().sum(1))
    >>> found = MaxSensitivity(samples=9)(square, torch.ones(1, 4), ap.Gradient())
    >>> bool(0 < found.values < 0.2)
    True
    """

    def _summed(self, away: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
        return away.amax(1)


@register(
    MetricCard(
        title="Average-sensitivity",
        paper=Paper(
            "Bhatt, Weller, Moura", 2020, "Evaluating and aggregating feature-based model explanations", "IJCAI"
        ),
        intent="The mean move of the map when the input moves within a small box.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(0.0, None),
        cost="an explanation for each copy",
        cautions=("A map that ignores the input does not move at all.",),
    )
)
@dataclass(frozen=True)
class AverageSensitivity(_Moved):
    """E_δ ‖Φ(x + δ) - Φ(x)‖₂ / ‖Φ(x)‖₂: as `MaxSensitivity`, with the mean over draws.

    Unlike the maximum it does not grow with the number of draws.

    Attributes:
        noise: makes copies.
        samples: how many of each example.
        relative: whether distances are in units of the norm of the example's map.

    Undefined for maps of zeros if relative.

    Source: Bhatt et al. (2020), average sensitivity with the Euclidean distance, on draws as in Yeh et al. (2019).

    >>> import apportion as ap, torch
    >>> constant = ap.Field(lambda x: x.sum(1))
    >>> AverageSensitivity(samples=4)(constant, torch.ones(1, 4), ap.Gradient()).values
    tensor([0.], dtype=torch.float64)
    """

    def _summed(self, away: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
        return away.mean(1)

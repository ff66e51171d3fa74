"""Local Lipschitz estimate: the steepest change of a map near an example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apportion.core.card import Paper
from apportion.core.question import Question
from apportion.metrics.fidelity.copies import by_example, copies, minus, norm
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, register
from apportion.metrics.scores import Direction
from apportion.parts.noise import Gaussian, NoiseModel, UniformBox

CARD = MetricCard(
    title="Local Lipschitz estimate",
    paper=Paper(
        "Alvarez-Melis, Jaakkola", 2018, "On the robustness of interpretability methods", "ICML workshop on WHI"
    ),
    intent="The largest ratio of the change of a map to the change of the input that made it.",
    direction=Direction.LOWER,
    judges=Judges.EXPLAINER,
    range=(0.0, None),
    cost="an explanation for each copy",
    cautions=(
        "It is in units of the map per unit of input: maps in other units do not compare.",
        "A map that ignores the input is the most robust of all.",
        "A map that draws random numbers has no bound as copies come nearer.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class LocalLipschitz(Metric):
    """max_{x'} ‖Φ(x) - Φ(x')‖₂ / ‖x - x'‖₂ over random x' near x: a lower bound of the local Lipschitz constant.

    The source searches a ball for its maximum; drawing from around x is what evaluation libraries do. Maps are taken as
    they are: dividing them by their own maximum, or worse by that of the whole batch, measures something else.

    Attributes:
        noise: how neighbours are drawn; normal with standard deviation 0.1 unless given.
        samples: neighbours of each example.

    parts["mean"] is the mean ratio.

    Source: Alvarez-Melis and Jaakkola (2018), the local Lipschitz quotient L̂(x).

    >>> import apportion as ap, torch
    >>> square = ap.Field(lambda x: x.square().sum(1))
    >>> found = LocalLipschitz(samples=3)(square, torch.ones(1, 4, dtype=torch.float64), ap.Gradient())
    >>> round(float(found.values), 6)
    2.0
    """

    _positive = ("samples",)

    noise: NoiseModel = Gaussian(0.1, relative=False)
    samples: int = 200

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain neighbours, and divide."""
        phi = subject.map(q)
        parts = []
        for rows, owner, _, again in copies(q, subject, self.noise, self.samples):
            parts.append(norm(minus(again, phi, owner)) / norm(minus(rows, q.x, owner)))
        ratio = by_example(parts, len(q))
        return Found(ratio.amax(1), parts={"mean": ratio.mean(1)})

    def explanations(self, q: Question) -> int:
        """One for each neighbour."""
        return self.samples

    def questions(self, q: Question) -> int:
        """Each is explained with its own baselines."""
        return self.explanations(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Small ones."""
        return (cls(samples=3), cls(UniformBox(0.05), 2))

"""Relative importance: an object's attribution by two models, and by one model with the object and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core import tree
from apportion.core.card import Paper
from apportion.core.config import Configurable, whole
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.explainer import Passes
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.metrics.fidelity.copies import explained
from apportion.metrics.localization.pointing import made_up
from apportion.metrics.localization.region import Region, masks, regions
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, register
from apportion.metrics.scores import Direction

_PAPER = Paper(
    "Yang, Kim", 2019, "Benchmarking attribution methods with relative feature importance", "arXiv:1907.09701"
)
_WHERE = "the object's region, one entry an example: a mask [H, W] or an ap.metrics.Region"


@dataclass(frozen=True, kw_only=True)
class Relative(Metric):
    """Base of the metrics that hold the attribution of a region against that of the same region elsewhere.

    Attributes:
        percentile: of the pixels, which is 1 after scaling; what is higher is cut off.
        right: whether only examples count whose explained class is the highest output, of both.
    """

    percentile: float = 99.0
    right: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.percentile <= 100:
            raise ConfigError(f"percentile={self.percentile}", "above 0, at most 100", "100 cuts nothing off")

    def concept(self, values: Tree, on: Bool[Tensor, "B H W"]) -> Float[Tensor, " B"]:
        """Average over a region a map's positive parts, summed over channels and scaled to [0, 1] in each picture."""
        assert isinstance(values, Tensor)
        m = tree.wide(values).clamp(min=0).sum(1).flatten(1)
        ordered = m.sort(1).values
        at = self.percentile / 100 * (m.shape[1] - 1)
        low, top = ordered[:, :1], torch.lerp(ordered[:, int(at)], ordered[:, -int(-at // 1)], at % 1)[:, None]
        scaled = torch.where(top > low, (m - low) / (top - low), (m > low).to(m)).clamp(0, 1)
        return (scaled * on.flatten(1)).sum(1) / on.flatten(1).sum(1)

    def found(
        self, values: Tensor, parts: dict[str, Tensor], on: Tensor, asked: Sequence[tuple[Question, Tensor | None]]
    ) -> Found:
        """Leave examples undefined without an object, or where one of both is seen as something else."""
        none = ~on.flatten(1).any(1)
        wrong = torch.zeros_like(none)
        for q, outputs in asked:
            if outputs is not None:
                wrong |= outputs.argmax(1) != q.target.reshape(len(q), -1)[:, 0]  # pyright: ignore
        undefined = {"no object": none, "another class than the one explained": wrong & ~none}
        return Found(values.to(on.device).masked_fill(none | wrong, torch.nan), parts=parts, undefined=undefined)

    def seen(self, q: Question) -> Float[Tensor, "B C"] | None:
        """Give the outputs of classes, where they decide which examples count."""
        if not self.right:
            return None
        out = q.outputs(q.x, q.owners)
        if not isinstance(out, Tensor) or out.ndim != 2 or not isinstance(q.target, Tensor):
            raise InputError(
                "outputs that are not one row of classes", "[B, classes], and targets", "write right=False"
            )
        return out


def _pictures(q: Question) -> Float[Tensor, "B C H W"]:
    if not isinstance(q.x, Tensor) or q.x.ndim != 4:
        shapes = [tuple(t.shape) for t in tree.leaves(q.x)]
        raise InputError(f"examples {shapes}", "pictures [B, channels, H, W]", "regions need pictures")
    return q.x


def _pairs(q: Question, truth: Any) -> tuple[list[Any], list[Any]]:
    """Take regions and what stands beside them apart; None where nothing does."""
    each = truth if isinstance(truth, Tensor | np.ndarray) else list(truth) if isinstance(truth, list | tuple) else None
    if each is None or len(each) != len(q):
        count = kind_of(truth) if each is None else f"{len(each)} truth(s)"
        raise InputError(f"{count} for {len(q)} example(s)", "one entry an example", "write list(zip(masks, others))")
    pairs = [one if isinstance(one, tuple) else (one, None) for one in each]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError("truths of more than two entries", "a region, and one thing beside", "write (mask, other)")
    return [region for region, _ in pairs], [beside for _, beside in pairs]


def _at_rows(subject: Subject, q: Question, rows: Tensor, draw: int) -> tuple[Question, Tree]:
    other = q.at(rows, q.owners, torch.full_like(q.owners, draw))
    return other, explained(subject, other)


@register(
    MetricCard(
        title="Model contrast score",
        paper=_PAPER,
        intent="How much more an object is attributed by a model of objects than by a model of scenes.",
        direction=Direction.HIGHER,
        judges=Judges.EXPLAINER,
        truth=_WHERE + ", or a pair of it and the other model's class",
        range=(-1.0, 1.0),
        chance="0",
        cost="2 rows; the explainer's, twice",
        cautions=("It presumes that the other model reads the object less: know that from how both were trained.",),
    )
)
@dataclass(frozen=True, kw_only=True)
class ModelContrast(Relative):
    """A(f, x) - A(f', x): what the object's region gets by the question's model less what it gets by the other one.

    A is a map's positive part, summed over channels, scaled in each picture from its minimum to its 99th percentile,
    and averaged over the object. f has learned to tell objects, f' to tell the scenes they stand in, on the same
    pictures. f is asked about the question's class, f' about that in `truth`, or its highest. `parts` has both A.

    Whoever does not look at the model gets 0, as does a constant map, whose A is 0.

    Undefined without an object, and where a model has another class highest than the one explained: the source takes
    pictures that both classify rightly, which is told by labels for `target` and in `truth`.

    Attributes:
        other: f'.

    Raises:
        ConfigError: no model, or `External`.
        InputError: examples that are no pictures, truths that do not fit, or outputs that are not classes.

    Source: Yang and Kim (2019), and their code for A.

    >>> import apportion as ap
    >>> p = ap.planted.shapes_on_textures(6)
    >>> metric, truth = ModelContrast(other=p.scene.model), list(zip(p.masks, p.scene.target))
    >>> field, controls = ap.Field(p.object.model), [ap.controls.Edges()]
    >>> found = metric(field, p.object.x, ap.Gradient(), target=p.object.target, truth=truth, controls=controls)
    >>> found.values.tolist(), found.controls["Edges"].values.tolist()
    ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    """

    other: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.other) or isinstance(self.other, type):
            raise ConfigError(f"{kind_of(self.other)} as other", "a model", "give the network of scenes")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain both."""
        _ = subject.for_any_model  # refuses functions
        x = _pictures(q)
        where, classes = self._read(q, truth)
        on = masks(where, x)
        known = None if classes[0] is None else classes
        other = q.field.with_model(self.other).bind(q.inputs, known, q.ids, q.seed)
        asked = [(q, self.seen(q)), (other, None if known is None else self.seen(other))]
        each = [self.concept(_at_rows(subject, one, _pictures(one), 0)[1], on) for one in (q, other)]
        q.charge(other.account)
        return self.found(each[0] - each[1], {"model": each[0], "other": each[1]}, on, asked)

    def _read(self, q: Question, truth: Any) -> tuple[list[Region], list[Any]]:
        where, classes = _pairs(q, truth)
        if len({c is None for c in classes}) > 1:
            raise InputError("the other model's class of some examples", "of all, or of none", "give (mask, class)")
        numbers = [None if c is None else whole(c) for c in classes]
        if any(c is not None and n is None for c, n in zip(classes, numbers, strict=True)):
            raise InputError(f"classes {classes[:4]}", "whole numbers", "write list(zip(masks, labels))")
        return regions(where, _pictures(q)[:, 0]), numbers

    def check_truth(self, q: Question, truth: Any) -> None:
        """Read regions and classes."""
        self._read(q, truth)

    def passes(self, q: Question) -> Passes:
        """Count what both classify, and what the other one's class takes."""
        return Passes(2 if self.right else 0, 0, 2, exact=False)

    def explanations(self, q: Question) -> int:
        """Once for each model."""
        return 2

    def questions(self, q: Question) -> int:
        """As many."""
        return 2

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Give a model of colors for the other, with and without its verdict."""
        return cls(other=_Colors()), cls(other=_Colors(), right=False, percentile=90.0)

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        return made_up(x)


@dataclass(frozen=True)
class _Colors(Configurable):
    """A model whose classes are channels."""

    def __call__(self, x: Float[Tensor, "R C H W"]) -> Float[Tensor, "R C"]:
        return x.square().mean((2, 3))


@dataclass(frozen=True, kw_only=True)
class Paired(Relative):
    """Base of the metrics whose truths are a region and the picture with something else there."""

    def both(
        self, q: Question, subject: Subject, truth: Any
    ) -> tuple[Tensor, list[Tensor], list[tuple[Question, Tensor | None]]]:
        """Give the regions, what they get in either picture, and what the model says to both."""
        x, (where, others) = _pictures(q), self._read(q, truth)
        on = masks(where, x)
        asked, each = [], []
        for draw, rows in enumerate((x, torch.stack(others).to(x))):
            one, values = _at_rows(subject, q, rows, draw)
            asked.append((one, self.seen(one)))
            each.append(self.concept(values, on))
        return on, each, asked

    def _read(self, q: Question, truth: Any) -> tuple[list[Region], list[Tensor]]:
        where, others = _pairs(q, truth)
        shape = tuple(_pictures(q).shape[1:])
        for i, one in enumerate(others):
            if not isinstance(one, Tensor) or tuple(one.shape) != shape or not bool(one.isfinite().all()):
                given = f"{tuple(one.shape)}" if isinstance(one, Tensor) else kind_of(one)
                raise InputError(
                    f"{given} beside the region of example {i}",
                    f"a picture {shape} of numbers",
                    "write (mask, picture)",
                )
        return regions(where, _pictures(q)[:, 0]), others

    def check_truth(self, q: Question, truth: Any) -> None:
        """Read regions and pictures."""
        self._read(q, truth)

    def passes(self, q: Question) -> Passes:
        """Count a row for each picture where its class decides."""
        return Passes(2 if self.right else 0, 0)

    def explanations(self, q: Question) -> int:
        """Once for each picture."""
        return 2

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Judge all examples, and those that are seen as explained."""
        return cls(right=False), cls(percentile=90.0)

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        assert isinstance(x, Tensor)
        return list(zip(made_up(x), (x * 0.9).flip(-1), strict=True))


@register(
    MetricCard(
        title="Input dependence rate",
        paper=_PAPER,
        intent="Whether a region is attributed less once an object lies on it that the model does not read.",
        direction=Direction.HIGHER,
        judges=Judges.EXPLAINER,
        truth=_WHERE + ", in a pair with the picture without the object",
        range=(0.0, 1.0),
        chance="0.5 for a random map, 0 for a constant one",
        cost="2 rows; the explainer's, twice",
        cautions=("It presumes a model to which the object means less than what it covers, as one of scenes.",),
    )
)
@dataclass(frozen=True, kw_only=True)
class InputDependence(Paired):
    """1 where A(f, x without the object) > A(f, x), else 0; the mean over examples is the rate.

    f tells scenes, to which the object says nothing that what it covers did not say better, so its region should get
    less with it than without; A is that of `ModelContrast`, of the same class in both pictures. 1 less the rate is how
    often a method calls the object important by mistake.

    Equal A count as 0, as in the source, and are told in parts["tied"]: so a constant map gets 0. `parts` has `with`
    and `without`.

    Undefined without an object, and where the class explained is not the highest in both pictures.

    Raises:
        InputError: no pair of region and picture for each example, or outputs that are not classes.

    Source: Yang and Kim (2019), and what their code makes of ties.

    >>> import apportion as ap
    >>> p = ap.planted.shapes_on_textures(6)
    >>> field, truth = ap.Field(p.scene.model), list(zip(p.masks, p.bare))
    >>> InputDependence()(field, p.scene.x, ap.Gradient(), target=p.scene.target, truth=truth).values
    tensor([1., 1., 1., 1., 1., 1.], dtype=torch.float64)
    """

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain both pictures."""
        on, (with_, without), asked = self.both(q, subject, truth)
        parts = {"with": with_, "without": without, "tied": with_ == without}
        return self.found((without > with_).to(with_), parts, on, asked)


@register(
    MetricCard(
        title="Input independence rate",
        paper=_PAPER,
        intent="Whether a region keeps its attribution when something is put there that changes nothing for the model.",
        direction=Direction.HIGHER,
        judges=Judges.EXPLAINER,
        truth="the region, one entry an example: a mask [H, W] or Region, in a pair with the picture changed there",
        range=(0.0, 1.0),
        cost="2 rows; the explainer's, twice",
        cautions=(
            "It presumes a change that leaves the model's function alone: see parts['change of outputs'].",
            "Maps that do not depend on the input are best.",
        ),
        blind_is_best=True,
    )
)
@dataclass(frozen=True, kw_only=True)
class InputIndependence(Paired):
    """1 where |A(f, x) - A(f, x')| ≤ tolerance · A(f, x), else 0; the mean over examples is the rate.

    x' is x with something else in the region that means nothing to f: outputs are as before, so the attribution should
    be too. A is that of `ModelContrast`. The source makes such patches by minimizing |f(x') - f(x)| from a picture of a
    dog, which is not done here: bring the pictures, or take planted ones. parts["change of outputs"] is the Euclidean
    distance of the outputs (with `right`), which tells how far the premise holds; `before` and `after` are both A.

    Where A is 0 in both pictures nothing has changed, which counts as 1; the source's code has < and gives 0.

    Undefined where the region is empty, and where the class explained is not the highest in both.

    Attributes:
        tolerance: the change that is let pass, relative; .1 in the source.

    Raises:
        InputError: as for `InputDependence`.

    Source: Yang and Kim (2019), with the default of their code.

    >>> import apportion as ap
    >>> p = ap.planted.shapes_on_textures(6)
    >>> field, truth = ap.Field(p.object.model), list(zip(~p.masks, p.repainted))
    >>> found = InputIndependence()(field, p.object.x, ap.Gradient(), target=p.object.target, truth=truth)
    >>> found.values.mean().item(), found.parts["change of outputs"].max().item()
    (1.0, 0.0)
    """

    _not_negative = ("tolerance",)

    tolerance: float = 0.1

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain both pictures, and compare what the model says."""
        on, (before, after), asked = self.both(q, subject, truth)
        parts = {"before": before, "after": after}
        (_, here), (_, there) = asked
        if here is not None and there is not None:
            parts["change of outputs"] = tree.wide(here - there).norm(dim=1)
        return self.found(((before - after).abs() <= self.tolerance * before).to(before), parts, on, asked)

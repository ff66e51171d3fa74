"""Scores: the one number per example that is explained."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections import abc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, ScoreError, TargetError, kind_of
from apportion.core.site import Site
from apportion.core.tree import Tree

Target = Any
"""An int, a list or tensor of B ints, a tuple that indexes the output axes, or None for each top class."""

_scoring = ContextVar("scoring", default=False)


@contextmanager
def scoring() -> Iterator[None]:
    """Say that what runs now is the score, and no part of the model."""
    before = _scoring.set(True)
    try:
        yield
    finally:
        _scoring.reset(before)


def is_scoring() -> bool:
    """Tell whether a score is being computed.

    >>> with scoring():
    ...     is_scoring()
    True
    """
    return _scoring.get()


def main_output(outputs: Any) -> Tensor:
    """Find the one tensor a score reads: the output itself, its `logits`, or its only tensor.

    Raises:
        ScoreError: the output holds no such tensor.
    """
    if isinstance(outputs, Tensor):
        return outputs
    missing = object()
    logits = outputs.get("logits", missing) if isinstance(outputs, Mapping) else missing
    logits = getattr(outputs, "logits", missing) if logits is missing else logits
    if isinstance(logits, Tensor):
        return logits
    if logits is not missing:  # what else it holds, such as a loss, is not meant
        raise ScoreError(
            f"the model's output has logits that are {kind_of(logits)}",
            "a tensor as logits",
            "have the model return them, or pass score=lambda outputs: ..., which picks what to explain",
        )
    held = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    if isinstance(held, tuple | list):
        found = [v for v in held if isinstance(v, Tensor)]
        if len(found) == 1:
            return found[0]
    raise ScoreError(
        f"the model's output is a {type(outputs).__name__}",
        "a tensor, something with `logits`, or a container of one tensor",
        "pass score=lambda outputs: ..., which picks what to explain",
    )


def top_class(outputs: Any) -> Tensor | None:
    """Name each row's highest output, or None where outputs are not one score per class."""
    try:
        scores = main_output(outputs)
    except ScoreError:
        return None
    return scores.argmax(1) if scores.ndim == 2 and scores.shape[1] > 1 else None


@dataclass(frozen=True)
class Score(Configurable):
    """Base of the scores: outputs and the resolved target in, one number per row out."""

    @property
    def site(self) -> Site | None:
        """The inner site this score reads; None for the model's output."""
        return None

    def caution(self, shown: Any) -> str | None:
        """Say what looks wrong in combining this score with such outputs; None for nothing."""
        del shown
        return None

    @abstractmethod
    def __call__(self, outputs: Any, target: Tree) -> Float[Tensor, " R"]:
        """Score each row.

        Args:
            outputs: the model's outputs, rows first.
            target: what `resolve` returned, one row per row of outputs.
        """

    def resolve(self, target: Target, shown: Any, outputs: Callable[[], Any], batch: int) -> Tree:
        """Fix the target of every example, once.

        Args:
            target: as the user gave it.
            shown: the outputs of one example, for shapes.
            outputs: gives the outputs of all examples, at the price of a forward pass.
            batch: the number of examples.

        Returns:
            A tree of tensors with `batch` rows, or None.

        Raises:
            TargetError: the target does not fit the outputs.
        """
        del shown, outputs
        if target is None:
            return None
        return _as_tensor(target, batch)


def inherited(score: Score, other: Score, target: Tree) -> tuple[bool, Target]:
    """Say which target a score has that is asked in place of the field's own.

    Args:
        score: the score asked.
        other: the field's.
        target: what `other` resolved.

    Returns:
        Whether it is `target` as it stands; else what to resolve the score with (its own target comes first).
    """
    if isinstance(score, Custom) or score is other:
        return True, None
    own = score.labels if isinstance(score, Loss) else score.tokens if isinstance(score, Sequence) else None
    own = getattr(score, "target", own)
    if own is not None or isinstance(score, Neuron):
        return False, None
    if isinstance(score, _Class) and isinstance(other, _Class):
        return True, None
    return False, target if isinstance(other, _Class) and isinstance(score, Contrast | Region) else None


def _as_tensor(target: Target, batch: int) -> Tensor:
    """Take labels of any numeric kind, one per example.

    Raises:
        TargetError: not numbers, or not one per example.
    """
    try:
        given = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(
            f"target {target!r}", "a number, or a list or tensor of one per example", "give class indices"
        ) from error
    given = given.expand(batch) if given.ndim == 0 else given
    if given.shape[0] != batch:
        raise TargetError(
            f"{given.shape[0]} targets for {batch} example(s)",
            "one per example",
            "give one target per example, or one number for all",
        )
    return given


def _check_int(target: Any) -> Tensor:
    try:
        t = torch.as_tensor(np.asarray(target) if not isinstance(target, Tensor) else target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(
            f"target {target!r}", "an int, a list or tensor of ints, or a tuple of ints", "give class indices"
        ) from error
    if t.dtype == torch.bool or t.is_floating_point() or t.is_complex():
        raise TargetError(
            f"target {target!r} of type {t.dtype}", "integers (class indices)", "name the class by its index"
        )
    return t.long()


def index_targets(target: Target, scores: Tensor, batch: int) -> Tensor:
    """Turn a user's target into indices into the output axes, one row per example.

    Args:
        target: an int (all examples), a list or tensor [B] or [B, k], or a tuple of k ints (all examples).
        scores: outputs [1, n_1, ..., n_k] of one example.
        batch: the number of examples B.

    Returns:
        Indices [B, k].

    Raises:
        TargetError: wrong type, shape or range.
    """
    axes = tuple(scores.shape[1:])
    t = _check_int(list(target) if isinstance(target, tuple) else target)
    if isinstance(target, tuple):
        if t.ndim != 1 or len(t) != len(axes):
            raise TargetError(
                f"the tuple {target} as target",
                f"{len(axes)} index(es), one per output axis {axes}",
                "use a list for one target per example",
            )
        t = t.expand(batch, -1)
    elif t.ndim == 0:
        t = t.expand(batch, 1)
    elif t.ndim == 1:
        t = t[:, None]
    if t.ndim != 2 or t.shape[0] != batch or t.shape[1] != len(axes):
        raise TargetError(
            f"targets of shape {tuple(t.shape)} for {batch} example(s) with outputs {axes}",
            f"shape ({batch}, {len(axes)})" + (f" or ({batch},)" if len(axes) == 1 else ""),
            "give one target per example, or Region or Sequence scores for outputs with several axes",
        )
    low, high = t.amin(0).tolist(), t.amax(0).tolist()
    for axis, size in enumerate(axes):
        if low[axis] < 0 or high[axis] >= size:
            bad = low[axis] if low[axis] < 0 else high[axis]
            raise TargetError(
                f"target {bad} on output axis {axis + 1}",
                f"0 to {size - 1}",
                "look at the shape of model(x), and count classes from 0",
            )
    return t


def _one_number(scores: Tensor) -> bool:
    return scores.ndim == 1 or (scores.ndim == 2 and scores.shape[1] == 1)


@dataclass(frozen=True)
class _Class(Score):
    """Scores of one class, or of a model that gives one number."""

    target: int | abc.Sequence[int] | None = None

    def resolve(self, target: Target, shown: Any, outputs: Callable[[], Any], batch: int) -> Tree:
        target = _agree(self.target, target)
        scores = main_output(shown)
        if _one_number(scores):
            if target is not None and not bool((_check_int(_as_tensor(target, batch)) == 0).all()):
                raise TargetError(f"target {target} for a model that gives one number", "no target", "leave it out")
            return None
        if target is not None:
            return index_targets(target, scores, batch).to(scores.device)
        if scores.ndim > 2:
            raise TargetError(
                f"no target for outputs of shape {tuple(scores.shape[1:])} per example",
                f"{scores.ndim - 1} indices",
                "give target=(i, ...), or a Region or Sequence score",
            )
        return main_output(outputs()).argmax(1, keepdim=True)

    def __call__(self, outputs: Any, target: Tree) -> Float[Tensor, " R"]:
        scores = main_output(outputs)
        if target is None:
            return self._of_number(scores.reshape(len(scores)))
        return self._of_class(scores, target)

    def caution(self, shown: Any) -> str | None:
        z = main_output(shown)
        if isinstance(self, Logit) or z.ndim < 2 or z.shape[1] < 2:
            return None
        sums = z.sum(1)
        if bool((z >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
            return (
                f"the outputs look like probabilities, and {type(self).__name__} takes a softmax of them again: "
                "use Logit() for the probability itself"
            )
        return None

    def _of_number(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def _of_class(self, z: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError


def _agree(own: Target, given: Target) -> Target:
    if own is not None and given is not None and not _equal(own, given):
        raise TargetError(
            f"the score's target {own} and target={given}", "one of them, or both the same", "leave target= out"
        )
    return own if given is None else given


def _equal(a: Target, b: Target) -> bool:
    try:
        one, other = torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu()
        if one.ndim == 0 or other.ndim == 0:  # one for all examples
            return bool((one == other).all())
        return one.tolist() == other.tolist()
    except (TypeError, ValueError, RuntimeError):
        return False


def pick(z: Tensor, target: Tensor) -> Tensor:
    """Take each row's entry at its target indices.

    >>> pick(torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[0], [1]]))
    tensor([1., 4.])
    """
    if z.ndim == 2:
        return z.gather(1, target)[:, 0]  # its derivative is a quarter of the work
    return z[(torch.arange(len(z), device=z.device), *target.unbind(1))]


@dataclass(frozen=True)
class Logit(_Class):
    """The raw output z_c of the target class (the pre-softmax score), or the one number of a regression.

    >>> Logit()(torch.tensor([[1., 3.]]), torch.tensor([[1]]))
    tensor([3.])
    """

    def _of_number(self, z: Tensor) -> Tensor:
        return z

    def _of_class(self, z: Tensor, target: Tensor) -> Tensor:
        return pick(z, target)


@dataclass(frozen=True)
class LogProbability(_Class):
    """log softmax(z)_c over axis 1; log sigmoid(z) for one number or, with `multilabel`, per class.

    >>> LogProbability()(torch.tensor([[0., 0.]]), torch.tensor([[1]]))
    tensor([-0.6931])
    """

    multilabel: bool = False

    def _of_number(self, z: Tensor) -> Tensor:
        return F.logsigmoid(z)

    def _of_class(self, z: Tensor, target: Tensor) -> Tensor:
        return F.logsigmoid(pick(z, target)) if self.multilabel else pick(F.log_softmax(z, 1), target)


@dataclass(frozen=True)
class Probability(_Class):
    """softmax(z)_c over axis 1; sigmoid(z) for one number or, with `multilabel`, per class.

    >>> Probability()(torch.tensor([[0., 0.]]), torch.tensor([[1]]))
    tensor([0.5000])
    """

    multilabel: bool = False

    def _of_number(self, z: Tensor) -> Tensor:
        return z.sigmoid()

    def _of_class(self, z: Tensor, target: Tensor) -> Tensor:
        return pick(z, target).sigmoid() if self.multilabel else pick(z.softmax(1), target)


@dataclass(frozen=True)
class LogOdds(_Class):
    """log p/(1-p) of the target class: z_c - log sum of exp z_k over the other classes; z for one number.

    >>> LogOdds()(torch.tensor([[2., 0.]]), torch.tensor([[0]]))
    tensor([2.])
    """

    multilabel: bool = False

    def _of_number(self, z: Tensor) -> Tensor:
        return z

    def _of_class(self, z: Tensor, target: Tensor) -> Tensor:
        own = pick(z, target)
        if self.multilabel:
            return own
        others = torch.ones_like(z, dtype=torch.bool)
        others[(torch.arange(len(z), device=z.device), *target.unbind(1))] = False
        rest = z.masked_fill(~others, -torch.inf).logsumexp(1)
        return own - (pick(rest, target[:, 1:]) if rest.ndim > 1 else rest)


@dataclass(frozen=True)
class Decision(_Class):
    """1 where the target class has the highest output, 0 elsewhere; for one number, whether it is above 0.

    Its mean is the probability that the class is chosen. It has no slope: for games, not for gradients.

    >>> Decision()(torch.tensor([[1., 3.], [2., 1.]]), torch.tensor([[1], [1]]))
    tensor([1., 0.])
    """

    def _of_number(self, z: Tensor) -> Tensor:
        return (z > 0).to(z.dtype)

    def _of_class(self, z: Tensor, target: Tensor) -> Tensor:
        return (pick(z, target) >= z.flatten(1).amax(1)).to(z.dtype)


@dataclass(frozen=True)
class Contrast(Score):
    """z_c - z_o: why this class *rather than* that one.

    Targets given to a question may be the classes c, or both, [B, 2], as a question knows them.

    Attributes:
        target: the class c; None for each example's own top class.
        other: the class o; None for each example's highest class besides c.

    >>> Contrast()(torch.tensor([[5., 3., 1.]]), torch.tensor([[0, 1]]))
    tensor([2.])
    """

    target: int | abc.Sequence[int] | None = None
    other: int | abc.Sequence[int] | None = None

    def resolve(self, target: Target, shown: Any, outputs: Callable[[], Any], batch: int) -> Tree:
        rival = self.other
        if isinstance(target, Tensor) and target.ndim == 2 and target.shape[1] == 2:
            target, rival = target[:, 0], _agree(self.other, target[:, 1])
        target = _agree(self.target, target)
        scores = main_output(shown)
        if scores.ndim != 2 or scores.shape[1] < 2:
            raise ScoreError(
                f"Contrast on outputs of shape {tuple(scores.shape[1:])} per example",
                "two or more classes",
                "use Logit for a model with one number",
            )
        all_scores = main_output(outputs()) if target is None or rival is None else None
        if target is not None:
            own = index_targets(target, scores, batch)[:, 0].to(scores.device)
        else:
            own = all_scores.argmax(1)  # pyright: ignore[reportOptionalMemberAccess]
        if rival is not None:
            other = index_targets(rival, scores, batch)[:, 0].to(scores.device)
        else:
            other = all_scores.scatter(1, own[:, None], -torch.inf).argmax(1)  # pyright: ignore[reportOptionalMemberAccess]
        if bool((own == other).any()):
            raise TargetError(
                f"Contrast of a class with itself: {own.tolist()} and {other.tolist()}",
                "two classes",
                "give two different classes",
            )
        return torch.stack([own, other], 1)

    def __call__(self, outputs: Any, target: Tree) -> Float[Tensor, " R"]:
        both = main_output(outputs).gather(1, target)
        return both[:, 0] - both[:, 1]


@dataclass(frozen=True)
class Neuron(Score):
    """One unit of an inner site: A[index] of its activation A.

    Attributes:
        at: the site.
        index: one index per axis after the first.
    """

    at: Site
    index: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.at, Site):
            raise ConfigError(f"Neuron(at={self.at!r})", "a site", "write Neuron(ap.At('name.of.the.layer'), (0,))")
        if not isinstance(self.index, tuple):
            raise ConfigError(
                f"Neuron(index={self.index!r})",
                "a tuple of ints, one per axis after the first",
                "write Neuron(At('layer'), (channel, row, column))",
            )
        super().__post_init__()

    @property
    def site(self) -> Site | None:
        return self.at

    def resolve(self, target: Target, shown: Any, outputs: Callable[[], Any], batch: int) -> Tree:
        if target is not None:
            raise TargetError(f"target {target} with a Neuron score", "none", "the unit is Neuron's index")
        index_targets(tuple(self.index), shown, batch)
        return None

    def __call__(self, outputs: Any, target: Tree) -> Float[Tensor, " R"]:
        return outputs[(slice(None), *self.index)]


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Region(Score):
    """Mean output of class c over a region: sum(m z_c) / sum(m), for outputs [R, C, *space].

    Attributes:
        mask: [*space] shared, or [B, *space]; Boolean or weights, not all zero.
        target: the class; None for the class with the highest mean over each example's region.
    """

    mask: Tensor
    target: int | abc.Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor):
            raise ConfigError(f"Region(mask={type(self.mask).__name__})", "a torch.Tensor", "use torch.as_tensor")
        super().__post_init__()

    def resolve(self, target: Target, shown: Any, outputs: Callable[[], Any], batch: int) -> Tree:
        target = _agree(self.target, target)
        scores = main_output(shown)
        space = tuple(scores.shape[2:])
        mask = self.mask.to(scores.device, scores.dtype)
        if tuple(mask.shape) == space:
            mask = mask.expand(batch, *space)
        if not space or tuple(mask.shape) != (batch, *space):
            raise ScoreError(
                f"a region mask of shape {tuple(self.mask.shape)} for outputs {tuple(scores.shape[1:])} per example",
                f"shape {space} or {(batch, *space)}" if space else "outputs [rows, classes, *space]",
                "give the mask the spatial shape of the outputs",
            )
        if not bool(((mask.flatten(1).sum(1) > 0) & (mask.flatten(1) >= 0).all(1)).all()):
            raise ScoreError(
                "a region that is empty or has negative weights",
                "weights from 0 with positive total per example",
                "mark at least one position",
            )
        if target is not None:
            return index_targets(target, scores.flatten(2).mean(2), batch).to(scores.device), mask
        z = main_output(outputs())
        return (z * mask[:, None]).flatten(2).sum(2).argmax(1, keepdim=True), mask

    def __call__(self, outputs: Any, target: Tree) -> Float[Tensor, " R"]:
        index, mask = target
        z = pick(main_output(outputs), index)
        return (z * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


@dataclass(frozen=True)
class Sequence(Score):
    """Log-probability of tokens at positions: sum_i log softmax(z at position_i)[token_i], outputs [R, T, V].

    Attributes:
        positions: where in the output; negative counts from the end.
        tokens: [n] shared or [B, n]; None for each example's own top tokens.
    """

    positions: tuple[int, ...] = (-1,)
    tokens: abc.Sequence[int] | Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.positions, tuple | list) or not self.positions:
            raise ConfigError(
                f"Sequence(positions={self.positions!r})", "a tuple of one position or more", "write (-1,)"
            )
        super().__post_init__()

    def resolve(self, target: Target, shown: Any, outputs: Callable[[], Any], batch: int) -> Tree:
        scores = main_output(shown)
        if scores.ndim != 3:
            raise ScoreError(
                f"Sequence on outputs of shape {tuple(scores.shape[1:])} per example",
                "[steps, tokens]",
                "use Logit or Region for other outputs",
            )
        steps, words = scores.shape[1:]
        if any(not -steps <= p < steps for p in self.positions):
            raise TargetError(
                f"positions {self.positions}",
                f"{-steps} to {steps - 1}",
                "count positions from 0, or from -1 at the end",
            )
        target = _agree(self.tokens, target)
        if target is None:
            return main_output(outputs())[:, list(self.positions)].argmax(2)
        t = _check_int(list(target) if isinstance(target, tuple) else target)
        t = t.expand(batch, -1) if t.ndim == 1 else t
        if tuple(t.shape) != (batch, len(self.positions)):
            raise TargetError(
                f"tokens of shape {tuple(t.shape)}",
                f"({batch}, {len(self.positions)})",
                "count positions from 0, or from -1 at the end",
            )
        if bool((t < 0).any()) or bool((t >= words).any()):
            raise TargetError(f"tokens {t.tolist()}", f"0 to {words - 1}", "give token ids of the output's vocabulary")
        return t.to(scores.device)

    def __call__(self, outputs: Any, target: Tree) -> Float[Tensor, " R"]:
        z = main_output(outputs)[:, list(self.positions)]
        return F.log_softmax(z, 2).gather(2, target[:, :, None]).sum((1, 2))


def cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of each row's logits with its label."""
    return F.cross_entropy(main_output(outputs), labels, reduction="none")


@dataclass(frozen=True)
class Loss(Score):
    """The loss of each example against its label; positive attributions raise the loss.

    Attributes:
        fn: maps (outputs, labels) to [R]; cross-entropy unless given.
        labels: [B, ...], or give them as `target`.
    """

    fn: Callable[[Any, Tensor], Tensor] = cross_entropy
    labels: Any = None

    def resolve(self, target: Target, shown: Any, outputs: Callable[[], Any], batch: int) -> Tree:
        labels = _agree(self.labels, target)
        if labels is None:
            raise TargetError(
                "a Loss score without labels", "one label per example", "give target= or Loss(labels=...)"
            )
        if self.fn is cross_entropy:
            labels = list(labels) if isinstance(labels, tuple) else labels  # one a label, never an index
            return index_targets(labels, main_output(shown), batch)[:, 0].to(main_output(shown).device)
        return _as_tensor(labels, batch).to(main_output(shown).device)

    def __call__(self, outputs: Any, target: Tree) -> Float[Tensor, " R"]:
        return self.fn(outputs, target)


@dataclass(frozen=True)
class Custom(Score):
    """A user's function of the raw outputs, and of the target where one is given.

    Attributes:
        fn: maps outputs (or outputs and target) to one number per row.
    """

    fn: Callable[..., Tensor]

    def __call__(self, outputs: Any, target: Tree) -> Float[Tensor, " R"]:
        return self.fn(outputs) if target is None or not self._takes_target() else self.fn(outputs, target)

    def _takes_target(self) -> bool:
        try:
            found = inspect.signature(self.fn).parameters.values()
        except (TypeError, ValueError):
            return True
        needed = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
        return len(needed) > 1 or any(p.kind is p.VAR_POSITIONAL for p in found)

    def resolve(self, target: Target, shown: Any, outputs: Callable[[], Any], batch: int) -> Tree:
        if target is None:
            return None
        if not self._takes_target():
            raise TargetError(
                f"target {target} with a function of the outputs alone",
                "no target",
                "write lambda outputs, target: ..., or leave target= out",
            )
        t, held = _as_tensor(target, batch), tree.tensors(shown)
        return t.to(held[0].device) if held else t


def as_score(score: Any) -> Score:
    """Accept a score or any callable of the outputs.

    Raises:
        ScoreError: neither of the two.
    """
    if isinstance(score, Score):
        return score
    if isinstance(score, type) and issubclass(score, Score):
        raise ScoreError(f"the class {score.__name__} as score", "an instance", f"write {score.__name__}()")
    if callable(score):
        return Custom(cast("Callable[..., Tensor]", score))
    raise ScoreError(
        f"{kind_of(score)} as score",
        "a Score or a callable of the outputs",
        "write ap.Logit(), or a function of the outputs",
    )


def check_scores(values: Any, count: int, score: Score) -> Float[Tensor, " R"]:
    """Insist on one floating-point number per row.

    Raises:
        ScoreError: anything else.
    """
    if not isinstance(values, Tensor) or tuple(values.shape) != (count,) or not values.is_floating_point():
        got = f"shape {tuple(values.shape)}, {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise ScoreError(
            f"{type(score).__name__} gave {got} for {count} row(s)",
            f"floating point of shape ({count},)",
            "reduce over every axis but the first",
        )
    return values

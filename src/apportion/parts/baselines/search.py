"""What baselines share that search with the model."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.errors import BaselineError, ScoreError
from apportion.core.question import Question
from apportion.core.score import Contrast, Logit, LogOdds, LogProbability, Probability, main_output
from apportion.core.site import Input
from apportion.core.tree import Tree
from apportion.parts.baselines.simple import is_at_input


def everyone(q: Question) -> Int[Tensor, " B"]:
    """Name each example as the owner of one row."""
    return torch.arange(len(q), device=q.device)


def check_asks(q: Question, name: str) -> None:
    """Insist that the model can be asked about points where they stand, and that no derivative is wanted.

    Raises:
        BaselineError: a search at the input for a field at an inner site, or in a differentiable question.
    """
    if is_at_input(q) and not isinstance(q.field.site, Input):
        raise BaselineError(
            f"AtInput({name}) for a field at {q.field.site}",
            "a search where the field's site is",
            f"give {name} itself, or make the points with a field at the input and pass them as Given",
        )
    if q.differentiable:
        raise BaselineError(
            f"{name} in a differentiable question",
            "a baseline with a derivative",
            "make the points first and pass them as Given",
        )


def read_scores(q: Question, outputs: Any, name: str) -> Tensor:
    """Find what a model's outputs say about classes, and nothing else.

    Raises:
        BaselineError: no [rows, classes] with two classes or more.
    """
    try:
        scores = main_output(outputs)
    except ScoreError as error:
        raise BaselineError(error.given, "outputs [rows, classes]", f"{name} needs classes: use another") from error
    many = getattr(q.field.score, "multilabel", False)
    if q.field.score.site is not None or many or scores.ndim != 2 or scores.shape[1] < 2:
        given = "classes that exclude none" if many else f"outputs {tuple(scores.shape[1:])} per example"
        given = given if q.field.score.site is None else f"a score of {q.field.score.site}"
        raise BaselineError(
            f"{name} on {given}",
            "one score for each of two classes or more, the highest being the decision",
            "return logits (f, 0) for a decision by the sign of one number f, or use another baseline",
        )
    return scores


def number(outputs: Any) -> Float[Tensor, " R"] | None:
    """Read outputs that are one number a row, whose sign is the decision; None for others."""
    try:
        z = main_output(outputs)
    except ScoreError:
        return None
    return z.flatten() if z.ndim == 1 or z.shape[1:] == (1,) else None


def own_classes(q: Question, name: str) -> tuple[Int[Tensor, " E"] | None, Float[Tensor, "E *classes"]]:
    """Say for the examples of a home which class a search is about, and give their logits, for one row each.

    It is the target where the score is about a class, and each example's top class otherwise; None for models
    of one number, which comes in place of logits.
    """
    home = q.home
    outputs = home.outputs(home.x, everyone(home))
    if q.field.score.site is None and (one := number(outputs)) is not None:
        return None, one
    logits = read_scores(q, outputs, name)
    about = isinstance(q.field.score, Logit | Probability | LogProbability | LogOdds | Contrast)
    return (home.target[:, 0] if about else logits.argmax(1)), logits


def norm(points: Tree) -> Float[Tensor, " R"]:
    """Measure each row's Euclidean length, over all tensors of the tree, in float64.

    >>> norm((torch.tensor([[3.0]]), torch.tensor([4.0])))
    tensor([5.], dtype=torch.float64)
    """
    return tree.total(tree.apply(lambda t: t.double().square(), points)).sqrt()


def put(into: Tree, at: Tensor, rows: Tree) -> None:
    """Write rows at their places."""
    for whole, part in zip(tree.leaves(into), tree.leaves(rows), strict=True):
        whole[at] = part


def listed(q: Question, missed: Tensor) -> str:
    """Name the examples of a mask in a warning, the first ten of them."""
    found = q.in_root[missed].unique().tolist()
    return ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")

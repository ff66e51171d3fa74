"""Several methods, asked together: bound once, and what they ask alike is worked out once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from apportion.core import tree
from apportion.core.attribution import Attribution
from apportion.core.errors import ApportionError
from apportion.core.explainer import Explainer
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.score import Target
from apportion.core.sharing import Common, is_key
from apportion.core.tree import Tree

Answer = Attribution | Exception
"""What a method gave, or how it failed."""


def answers(
    field: Field,
    x: Tree,
    explainers: Sequence[Explainer],
    *,
    target: Target = None,
    ids: Sequence[Any] | None = None,
    seed: int = 0,
) -> Iterator[Answer]:
    """Explain the field at x by several methods, one after the other, each with what others have made already.

    Args:
        field: what is asked of which model.
        x: examples on the first axis.
        explainers: the methods.
        target: as in `Field.bind`.
        ids: one per example, or None for a hash of its content.
        seed: of all random numbers.

    Yields:
        What each method gave by itself, but for `cost.shared`, or its error; in the order of the methods.

    Raises:
        ApportionError: the examples, the model or the target are at fault; see `Field.bind`.
    """
    yield from answered(field.bind(x, target=target, ids=ids, seed=seed), explainers)


def answered(root: Question, explainers: Sequence[Explainer]) -> Iterator[Answer]:
    """Do what `answers` does for a question that is bound already, whose cost each method is charged.

    Args:
        root: the bound question, of which nothing has been asked yet.
        explainers: the methods.
    """
    with torch.inference_mode(False):
        common = Common(sum(leaf.numel() for leaf in tree.leaves(root.x)))
        account = root.account
        names = [type(e).__name__ for e in explainers]
        forks = {
            i: root.fork(common, name if names.count(name) == 1 else f"{name} (method {i + 1})", account)
            for i, name in enumerate(names)
        }
        asked = [asks(e, forks[i]) for i, e in enumerate(explainers)]
        for keys in asked:
            common.expect(keys)
        groups = [_group(e) for e in explainers]
    ready: dict[int, Answer] = {}
    for i, explainer in enumerate(explainers):
        if i not in ready:
            some = [j for j in range(i, len(groups)) if j == i or (groups[i] is not None and groups[j] == groups[i])]
            with torch.inference_mode(False):
                if len(some) == 1:
                    found = [_answer(explainer, forks.pop(i))]
                else:
                    walker = root.fork(common, "", account)
                    found = explainer.explain_all([(explainers[j], forks.pop(j)) for j in some], walker)
                ready |= zip(some, found, strict=True)
        common.release(asked[i])
        yield ready.pop(i)


def _answer(explainer: Explainer, q: Question) -> Answer:
    try:
        return explainer.explain(q)
    except Exception as error:  # whatever goes wrong in one method is told as its own
        return error


def asks(explainer: Explainer, q: Question) -> list[Hashable]:
    """List what an explainer shares with others of a call, each once; nothing where it cannot say."""
    try:
        return list(dict.fromkeys(filter(is_key, explainer.asks(q))))
    except Exception:  # it comes again when the method is asked; without its asks it shares nothing
        return []


def _group(explainer: Explainer) -> Hashable | None:
    name = explainer.together
    return name if name is not None and is_key(name) else None


def named(error: Exception, explainer: Explainer, place: str) -> Exception:
    """Give an error that says which method it is from."""
    whose = f"{type(explainer).__name__} ({place})"
    if isinstance(error, ApportionError):
        told = error.about(whose)
        told.__cause__ = error
        return told
    error.add_note(f"in {whose}")
    return error

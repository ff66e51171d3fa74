"""The engine: a backward pass in which every operation follows its rule, whatever it is called.

Operations are intercepted where PyTorch dispatches them, so that modules, functions, methods, in-place
spellings and reused layers are all the same. Two tracks make attributions differentiable: the values of
the true forward, with their own graph, and the signal track, whose backward is the rules'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from apportion.core import tree
from apportion.core.derivative import failed, is_memory
from apportion.core.eager import without_compilation
from apportion.core.errors import ApportionError, ConfigError, NoGradientPathError, NonFiniteError, RuleError, nearest
from apportion.core.frozen import FUNCTIONS
from apportion.core.protocols import ExamplesMixed, RulePass
from apportion.core.tree import Tree
from apportion.parts.rules import last
from apportion.parts.rules.mode import RuleMode
from apportion.parts.rules.node import Node, Places
from apportion.parts.rules.refusals import check_custom

if TYPE_CHECKING:
    from apportion.parts.rules.table import Rules


def run(
    rules: Rules,
    forward: Callable[[Tree], Tensor],
    z: Tree,
    reference: Tree | None,
    *,
    start: Literal["score", "one"],
    record: bool,
    differentiable: bool,
    alone: Sequence[torch.Size] | None = None,
    scale: float = 1,
) -> RulePass:
    """Run `RuleSet.run` for a rule set of this package.

    Args:
        rules: the rule set.
        forward: from the network's own input to the score.
        z: the chunk.
        reference: what it is compared with.
        start: as for `RuleSet.run`.
        record: as for `RuleSet.run`.
        differentiable: as for `RuleSet.run`.
        alone: the shapes that calls whose rules look at whole examples had in a pass of one row.
        scale: of the signals on their way back, undone at the end.

    Raises:
        ExamplesMixed: such a call has its rows on no axis of their own.
        RuleError: an operation the rules do not know, or one that cannot be seen.
        NonFiniteError: relevance is to start at 1 where the score is 0.
    """
    if start not in ("score", "one"):
        raise ConfigError(f"start={start!r}", "'score' or 'one'", "'score' lets relevance sum to the score, 'one' to 1")
    everything = record or differentiable
    mode = RuleMode(rules, sys._getframe(), everything=everything, differentiable=differentiable, record=record)
    mode.rows, mode.alone = tree.rows(z), alone
    try:
        return _pass(mode, forward, z, reference, start, scale)
    finally:
        mode.forget()  # also where the pass is refused


def _pass(
    mode: RuleMode,
    forward: Callable[[Tree], Tensor],
    z: Tree,
    reference: Tree | None,
    start: Literal["score", "one"],
    scale: float,
) -> RulePass:
    rules, everything, differentiable = mode.rules, mode.everything, mode.differentiable
    reference_value = None
    if reference is not None:
        mode.phase = "reference"
        first = tree.apply(lambda t: t.detach().requires_grad_().clone(), reference)  # no operation of the model
        mode.mark(tree.leaves(first))
        mode.provenance.from_input.update(dict.fromkeys(tree.leaves(first), True))
        with mode, without_compilation():
            reference_value = forward(first).detach()
        mode.phase = "main"
    starts, leafs = mode.start(z)
    with mode, without_compilation():
        value = forward(starts)
    if mode.mixed:
        raise ExamplesMixed
    if not value.requires_grad:
        raise NoGradientPathError("the score does not depend on the input", "a differentiable path", "")
    if mode.position != len(mode.tape):
        raise RuleError(
            "the reference pass ran more operations than the input's",
            "the same operations on both",
            "choose a baseline for which the model branches alike",
        )
    if not mode.saw(value):
        mode.unseen(value)
    _check_patterns(rules, mode.where)
    nodes = _visible_nodes(value, rules.custom, everything)
    unused = mode.unused()
    if unused:
        raise RuleError(
            f"{unused[0][0]}, which nothing follows: {unused[0][1]}",
            "rules that apply",
            "leave that rule out, or see ap.rules.audit(model, x, rules) for what the model does",
        )
    true_value = mode.truth[value] if differentiable else value.detach()
    signal = torch.ones_like(value)
    if start == "one":
        if not bool((true_value != 0).all()):
            raise NonFiniteError(
                "relevance starting at 1 where the score is 0", "a score that is not 0", "start='score'"
            )
        signal = 1 / true_value
    try:
        with last.applied(rules.last, value, nodes, mode.rows):
            found = torch.autograd.grad(
                value, leafs, signal if scale == 1 else signal * scale, create_graph=differentiable, allow_unused=True
            )
    except RuntimeError as error:
        if isinstance(error, ApportionError) or is_memory(error):
            raise
        raise failed("the model", error) from error
    sent = [torch.zeros_like(t) if s is None else s for s, t in zip(found, leafs, strict=True)]
    sent = sent if scale == 1 else [s.float() / scale for s in sent]
    return RulePass(
        true_value, tree.rebuild(z, sent), reference_value, mode.record or [], tuple(mode.warnings), tuple(mode.shapes)
    )


def graph(value: Tensor) -> Iterator[tuple[Any, Any]]:
    """Go over the steps from which a tensor was made: each node, and its class where that is a custom function."""
    seen: set[Any] = set()
    todo: list[Any] = [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node, getattr(type(node), "_forward_cls", None)
        todo += [n for n, _ in node.next_functions]


def _visible_nodes(value: Tensor, custom: tuple[str, ...], everything: bool) -> list[Any]:
    """List our nodes, and refuse steps the engine could not see: they would silently follow their own derivative."""
    found: list[Any] = []
    for node, owner in graph(value):
        if owner is Node:
            found.append(node)
        elif owner is not None and owner not in FUNCTIONS:
            check_custom(owner, custom, everything)
    return found


def _check_patterns(rules: Rules, where: Places) -> None:
    names = [n for n in where.names.values() if n]
    for pattern, _, _ in rules.named:
        known = next((where.names[m] for n, m in where.others.items() if fnmatchcase(n, pattern)), None)
        if known is not None and not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"rules for modules named {pattern!r}", f"{known!r}, the first name of that module", "use that name"
            )
        if not any(fnmatchcase(name, pattern) for name in ("", *names)):
            raise ConfigError(
                f"rules for modules named {pattern!r}", nearest(pattern, names), "see model.named_modules()"
            )

"""The registry: methods by name, with their Cards; it drives tests, command line and documentation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from apportion.core.card import Card
from apportion.core.errors import RegistryError, kind_of, nearest
from apportion.core.explainer import Explainer

E = TypeVar("E", bound=type[Explainer])

_METHODS: dict[str, type[Explainer]] = {}


def snake(name: str) -> str:
    """Spell a class name as a registry key.

    >>> snake("IntegratedGradients"), snake("GradCAM"), snake("LRP"), snake("GradCAMPlusPlus")
    ('integrated_gradients', 'grad_cam', 'lrp', 'grad_cam_plus_plus')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def spelled(name: str, known: Iterable[str], what: str, do: str) -> str:
    """Find a name among those known, whatever its capitals and what joins its words.

    Args:
        name: as a user wrote it.
        known: the names there are.
        what: what they are names of.
        do: the advice where there is none.

    Raises:
        RegistryError: unknown, with the nearest names, or no name at all.

    >>> [spelled(n, ["mo_rf", "grad_cam_plus_plus"], "metric", "") for n in ("MoRF", "morf", "mo-rf", "Grad-CAM++")]
    ['mo_rf', 'mo_rf', 'mo_rf', 'grad_cam_plus_plus']
    """
    if not isinstance(name, str):
        raise RegistryError(f"{kind_of(name)} as the name of a {what}", "a str", do)
    letters = {_letters(k): k for k in sorted(known)}
    if (wanted := _letters(name)) in letters:
        return letters[wanted]
    raise RegistryError(f"no {what} named {name!r}", nearest(wanted, letters, names=letters), do)


def _letters(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.replace("+", "plus")).lower()


def register(card: Card) -> Callable[[E], E]:
    """Give an explainer its Card and a name; the name is the snake case of the class.

    Raises:
        RegistryError: another class has the name.
    """

    def enter(cls: E) -> E:
        key = snake(cls.__name__)
        there = _METHODS.get(key)
        if there is not None and (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RegistryError(
                f"the name {key!r} is taken by {there.__module__}.{there.__qualname__}",
                "a name of its own",
                "give the class another name",
            )
        cls.card = card
        _METHODS[key] = cls
        return cls

    return enter


def methods() -> dict[str, Card]:
    """List the registered methods: name to Card."""
    return {name: _METHODS[name].card for name in sorted(_METHODS)}


def method(name: str) -> type[Explainer]:
    """Find a method by its name or that of its class, in any spelling.

    Raises:
        RegistryError: see `spelled`.
    """
    return _METHODS[spelled(name, _METHODS, "method", "list the names with ap.methods()")]


def methods_table() -> str:
    """Write the Cards as Markdown: an overview, then one section a method."""
    lines = ["| method | kind | sums to | passes per example | paper |", "|---|---|---|---|---|"]
    for name, card in methods().items():
        kind = card.kind.value if card.kind else "as its base"
        lines.append(
            f"| [{card.title}](#{name.replace('_', '-')}) | {kind} | {card.total or 'not applicable'} | {card.cost} | "
            f"{card.paper.authors} {card.paper.year} |"
        )
    for name, card in methods().items():
        lines += ["", f"({name.replace('_', '-')})=", f"## {card.title}", "", card.intent, ""]
        lines.append(f"- class `ap.{_METHODS[name].__name__}`, name `{name}`")
        if card.kind:
            lines.append(f"- answers: *{card.kind.question}* ({card.kind.value})")
        lines.append(f"- cost: {card.cost} ({'exact' if card.exact_cost else 'at most'})")
        lines.append(f"- source: {card.paper}")
        if card.families:
            lines.append("- families: " + "; ".join(f.value for f in card.families))
        for claim in card.claims:
            verb = "satisfies" if claim.holds else "violates"
            lines.append(f"- claimed: {verb} *{claim.principle.name.lower()}* ({claim.source})")
        if card.unjudged:
            lines.append(f"- no verdict: {card.unjudged}")
        for principle, holds in card.measured.items():
            verb = "holds" if holds else "fails"
            lines.append(f"- measured: *{principle.name.lower()}* {verb} ({principle.value})")
        lines += [f"- caution: {c}" for c in card.cautions]
    return "\n".join(lines) + "\n"

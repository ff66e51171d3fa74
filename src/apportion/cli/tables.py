"""What the commands print: tables and Cards, as plain text that a pipe gets whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import apportion
from apportion.cli.work import Estimate, Explained, named
from apportion.core.attribution import Attribution
from apportion.core.registry import methods
from apportion.metrics.metric import Judges
from apportion.metrics.metric import metric as metric_named
from apportion.metrics.metric import names as metric_cards

if TYPE_CHECKING:
    from apportion.show.report import Page, Panel
else:
    Page = Panel = Any  # methods are listed without what it takes to draw


def plain(text: str) -> Text:
    """Show text as it is: no markup, no control characters."""
    return Text("".join(c if c.isprintable() else "�" for c in text))


def table(head: Sequence[str], rows: Iterable[Sequence[str] | None], right: Iterable[int] = ()) -> None:
    """Print rows under a head; None draws a line.

    On a terminal cells are wrapped to its width; into a file or a pipe every row is one line.
    """
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(head))
    right = set(right)
    on_terminal = sys.stdout.isatty()
    for i, name in enumerate(head):
        made.add_column(name, justify="right" if i in right else "left", no_wrap=not on_terminal, overflow="fold")
    pending = False
    for row in rows:
        if row is None:
            pending = True
            continue
        if pending:
            made.add_section()
            made.add_row(*[""] * len(head))
        pending = False
        made.add_row(*map(plain, row))
    console = Console(
        file=sys.stdout, width=None if on_terminal else 10_000, highlight=False, soft_wrap=not on_terminal
    )
    if on_terminal:
        console.print(made)
        return
    with console.capture() as captured:
        console.print(made)
    sys.stdout.write(re.sub(r" +$", "", captured.get(), flags=re.M))


def print_methods() -> None:
    """List the methods with what they answer and cost."""
    rows = []
    for name, card in methods().items():
        kind = card.kind.value if card.kind else "as its base"
        rows.append(
            (name, card.title, kind, card.total or "-", card.cost, f"{_first(card.paper.authors)} {card.paper.year}")
        )
    table(("name", "title", "kind", "sums to", "passes per example", "paper"), rows)
    print("\napportion methods NAME shows one with its claims and cautions.")


def _first(authors: str) -> str:
    names = authors.split(", ")
    return names[0] if len(names) < 3 else f"{names[0]} et al."


def print_card(name: str) -> None:
    """Show the Card of a method."""
    cls = named(name)
    card = cls.card
    rows = [
        ("class", f"ap.{cls.__name__}"),
        ("answers", f"{card.kind.question} ({card.kind.value})" if card.kind else "what its base answers"),
        ("sums to", card.total or "not applicable: no total is claimed"),
        ("passes", f"{card.cost} ({'exact' if card.exact_cost else 'at most'})"),
        ("needs", ", ".join(sorted(n.value for n in card.needs)) or "nothing"),
        ("differentiable", "yes" if card.differentiable else "no"),
        ("source", str(card.paper)),
    ]
    for claim in card.claims:
        verb = "satisfies" if claim.holds else "violates"
        rows.append(("claimed", f"{verb} {_said(claim.principle.name)} ({claim.source})"))
    if card.unjudged:
        rows.append(("no verdict", card.unjudged))
    for principle, holds in card.measured.items():
        rows.append(("measured", f"{_said(principle.name)} {'holds' if holds else 'fails'}: {principle.value}"))
    rows += [("family", f.value) for f in card.families]
    rows += [("caution", caution) for caution in card.cautions]
    print(f"{card.title} ({name})\n{card.intent}\n")
    table(("", ""), rows)


def _said(name: str) -> str:
    return name.lower().replace("_", " ")


def gap(a: Attribution) -> str:
    """Write the gap in a few characters.

    >>> import apportion as ap
    >>> gap(ap.explain(lambda x: (x**2).sum(1), __import__("torch").tensor([[3.0]]), "gradient"))
    'not applicable'
    """
    if a.gap is None or a.relative_gap is None:
        return "not applicable"
    return f"{float(a.gap[0]):+.3g} ({float(a.relative_gap[0]):.1%})"


def short(text: str, most: int) -> str:
    """Cut the middle out of a long name, so that tables of results fit 100 columns.

    >>> short("a cat having a striped coat (282)", 20)
    'a cat hav…coat (282)'
    """
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[len(text) - most // 2 :]}"


def print_results(results: Sequence[Explained]) -> None:
    """Print one line for each picture, one for each of its maps, and what deserves a look."""
    from apportion.show.page import large_gap

    pictures: list[Sequence[str]] = []
    rows: list[Sequence[str] | None] = []
    notes: dict[str, list[str]] = {}
    gaps: dict[str, list[str]] = {}
    for one in results:
        classes = [f"{short(label, 28)} {chance:.2f}" for label, chance in one.page.classes[:2]]
        marked = one.page.telling
        thing = "" if marked is None else short(marked.name, 16)
        pictures.append((one.seen.name, *classes, *[""] * (2 - len(classes)), thing))
        for panel in one.panels:
            on = "" if marked is None else _inside(panel, one.page)
            rows.append((short(one.seen.name, 16), *_cells(panel, on)))
            for warning in panel.attribution.warnings:
                notes.setdefault(f"{panel.title}: {warning}", []).append(one.seen.name)
            if (missed := large_gap(panel.attribution)) is not None:
                gaps.setdefault(panel.title, []).append(f"{one.seen.name} {missed}")
        for title, why in one.passed_over.items():
            notes.setdefault(f"{title} does not apply: {why}", []).append(one.seen.name)
        rows += [(short(one.seen.name, 16), short(title, 34), "failed", "", "", "") for title, _ in one.page.failures]
        rows.append(None)
    table(("picture", "top class", "runner-up", "object"), pictures)
    print()
    table(("picture", "method", "gap", "in object", "passes", "seconds"), rows, right=(5,))
    print("\ngap: the sum of the values minus the total that the method claims, in units of the score;")
    print("  none where a method claims no total.")
    if any(one.page.marked for one in results):
        print("in object: share of the map's energy (squares of its values over channels and pixels) inside the")
        print("  object's box / share of the picture that the box covers. Boxes were drawn by hand.")
    print("passes: rows sent forward + backward.")
    print_failures(results)
    for title, where in gaps.items():
        text = f"{title} misses the total that it claims, by more than 10 % of it: {', '.join(where)}"
        print(f"note: {plain(text).plain}")
    for note, where in notes.items():
        of = "" if len(where) == len(results) else f" ({', '.join(where)})"
        print(f"note: {plain(note + of).plain}")


def print_failures(results: Sequence[Explained], file: Any = None) -> None:
    """Print the errors of methods, a line each."""
    for one in results:
        for title, why in one.page.failures:
            print(f"error: {plain(f'{one.seen.name}: {title}: {why}').plain}", file=file)


def _inside(panel: Panel, page: Page) -> str:
    from apportion.show.page import inside, share

    marked = page.telling
    if marked is None:
        return ""
    found = inside(panel.attribution, marked, page.size)
    return share(found.box, found.box_area)


def _cells(panel: Panel, on: str) -> tuple[str, ...]:
    a = panel.attribution
    passes = f"{int(a.cost.forward[0])} + {int(a.cost.backward[0])}"
    title = panel.title if len(panel.title) <= 34 else short(panel.title.partition(" (top −")[0], 34)
    return title, "none" if a.gap is None else gap(a), on, passes, f"{panel.seconds:.1f}"


def print_metrics() -> None:
    """List the metrics with what they judge and what is better."""
    rows = [
        (
            name,
            card.title,
            {"HIGHER": "higher", "LOWER": "lower", "NEITHER": "neither"}[card.direction.name],
            "a map" if card.judges is Judges.MAP else "an explainer",
            card.truth.partition(":")[0].partition(",")[0] or "-",
            f"{_first(card.paper.authors)} {card.paper.year}",
        )
        for name, card in metric_cards().items()
    ]
    table(("name", "title", "better", "judges", "compares with", "paper"), rows)
    print("\napportion metrics NAME shows one with its cautions.")


def print_metric(name: str) -> None:
    """Show the card of a metric."""
    cls = metric_named(name)
    card = cls.card
    low, high = card.range
    rows = [
        ("class", f"ap.metrics.{cls.__name__}"),
        ("better", card.direction.value),
        ("judges", card.judges.value),
        ("compares", card.truth or "with nothing"),
        ("range", f"{'−∞' if low is None else f'{low:g}'} to {'∞' if high is None else f'{high:g}'}"),
        ("by chance", card.chance or "not known beforehand"),
        ("passes", card.cost),
        ("source", str(card.paper)),
        *(("caution", caution) for caution in card.cautions),
    ]
    print(f"{card.title} ({name})\n{card.intent}\n")
    table(("", ""), rows)


def print_passes(expected: apportion.Estimate, seconds: float) -> None:
    """Say what an evaluation will take."""
    rows = [
        (name, f"{bound} {there:,}".strip(), f"{bound} {back:,}".strip())
        for name, there, back, bound in expected.rows
        if there or back or bound
    ]
    table(("for each picture", "forward", "backward"), rows, right=(1, 2))
    bound = f"{expected.bound} " if expected.bound else ""
    took = f"{round(seconds)} s" if seconds < 120 else f"{round(seconds) // 60} min {round(seconds) % 60} s"
    total = f"{bound}{expected.forward:,} + {expected.backward:,} passes a picture, {expected.examples} picture(s)"
    print(f"{total}: about {took}\n", flush=True)


def print_evaluation(found: apportion.Evaluation) -> None:
    """Print a line for each metric and method, and what deserves a look."""
    rows: list[Sequence[str] | None] = []
    last = ""
    for r in found.summary():
        if last and r["metric"] != last:
            rows.append(None)
        last = r["metric"]
        won = [control for control, beats in r["beats"].items() if beats]
        spread = f"[{r['low']:.3g}, {r['high']:.3g}]" if r["n"] > 1 else "unknown" if r["n"] else ""
        value = (f"{r['value']:.4g}" if r["n"] else "undefined", spread)
        judged = found.controls and r["n"] > 1
        told = "control" if r["control"] else ", ".join(won) if won else "nothing" if judged else ""
        rows.append((r["metric"], r["method"], *value, r["direction"].partition(" is")[0], str(r["n"]), told))
    table(("metric", "method", "value", "95 %", "better", "pictures", "beats"), rows, right=(2, 5))
    print("\nvalue: over the pictures, with the ends of its bootstrap interval.")
    print("beats: the controls that it is better than, beyond chance, on the same pictures; told from 6 pictures on.")
    for note in found.notes():
        print(f"note: {plain(note).plain}")


def print_estimate(expected: Estimate, pictures: int) -> None:
    """Say what is to come."""
    rows = [(n, *(str(c) if exact else f"at most {c}" for c in counts)) for n, *counts, exact in expected.rows]
    table(("method", "forward", "backward"), rows, right=(1, 2))
    forward, backward = sum(r[1] for r in expected.rows), sum(r[2] for r in expected.rows)
    seconds = round(expected.seconds * pictures)
    about = f"{seconds} s" if seconds < 120 else f"{seconds // 60} min {seconds % 60} s"
    most = "" if all(r[3] for r in expected.rows) else "at most "
    print(f"{most}{forward} + {backward} passes a picture, {pictures} picture(s): about {about}\n", flush=True)

"""The work of `apportion evaluate`: names to metrics and controls, drawn objects to truths, passes to seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

from apportion import metrics as judging
from apportion.bulk import Estimate
from apportion.cli import work
from apportion.core.card import Need
from apportion.core.errors import ConfigError, RegistryError
from apportion.core.explainer import Explainer
from apportion.core.external import Resized
from apportion.core.field import Field
from apportion.core.registry import snake
from apportion.metrics.metric import Metric
from apportion.parts import controls

METRICS = ("single_deletion", "sparseness")
"""What methods are judged by where no metric is named: a cheap one of faithfulness and one of complexity."""

CONTROLS = ("random", "edges")
"""Judged beside where nothing else is said."""

_OBJECT = "where the object is"
"""How cards of metrics begin to say that they need a region."""


def metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Find metrics by name, in any spelling, also several with commas between.

    Raises:
        RegistryError: there is none, with the nearest.
        ConfigError: one that compares with something a command does not have, or needs a setting.

    >>> list(metrics(["Sparseness,complexity"]))
    ['sparseness', 'complexity']
    """
    found = {}
    for name in _apart(names):
        try:
            cls = judging.metric(name)
        except RegistryError as error:
            raise RegistryError(error.given, error.expected, "list the metrics with `apportion metrics`") from error
        if cls.card.truth and not needs_object(cls):
            raise ConfigError(
                f"--metric {name} compares with {cls.card.truth}", "a metric that needs none", "use ap.evaluate"
            )
        if needed := [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]:
            raise ConfigError(
                f"--metric {name} without {', '.join(needed)}", "a metric with defaults", "use ap.evaluate"
            )
        found[snake(cls.__name__)] = cls()
    return found


def needs_object(metric: type[Metric] | Metric) -> bool:
    """Tell whether a metric compares with where the object is."""
    return metric.card.truth.startswith(_OBJECT)


def beside(names: Sequence[str]) -> dict[str, Explainer]:
    """Find controls by name; `none` for none.

    Raises:
        RegistryError: there is none, with the nearest.

    >>> list(beside(["center-gaussian"])), beside(["none"])
    (['center_gaussian'], {})
    """
    made = [controls.named(name)() for name in _apart(names) if name.lower() != "none"]
    return {snake(type(control).__name__): control for control in made}


def methods(choices: Sequence[work.Choice]) -> tuple[dict[str, Explainer], list[str]]:
    """Give the methods by name, with maps as large as pictures; and the members of sets that first learn from data."""
    ready, left = {}, []
    for choice in choices:
        learns = not choice.by_name and {Need.DATA, Need.LOSS} & choice.explainer.card.needs
        if learns:
            left.append(choice.name)
        else:
            ready[choice.name] = Resized(choice.explainer)
    return ready, left


def objects(seen: Sequence[work.Seen]) -> list[Any]:
    """Give the smallest object drawn on each picture, as regions.

    Raises:
        ConfigError: a picture without one.
    """
    found = []
    for one in seen:
        if not one.objects:
            raise ConfigError(
                f"a metric of localization for {one.name}, on which no object is drawn",
                "bundled pictures with objects, such as chelsea",
                "leave the metric out, or give truths in Python: ap.evaluate(..., truth=...)",
            )
        truth = min(one.objects.values(), key=lambda t: (t.box[2] - t.box[0]) * (t.box[3] - t.box[1]))
        high, wide = one.x.shape[1:]
        found.append(judging.Region(truth.mask(high, wide), (tuple(map(float, truth.box)),)))  # pyright: ignore[reportArgumentType]
    return found


def names(seen: Sequence[work.Seen]) -> list[str]:
    """Name pictures apart: further ones of the same name by a number."""
    count: dict[str, int] = {}
    out = []
    for one in seen:
        count[one.name] = count.get(one.name, 0) + 1
        out.append(one.name if count[one.name] == 1 else f"{one.name}#{count[one.name]}")
    return out


def seconds(field: Field, x: Tensor, target: int | None, expected: Estimate) -> float:
    """Time some passes, and say how long all of them will take; rough, without what metrics ask of methods."""
    q = field.bind(x[:1], target=target)
    rows, owner = work.chunk(field, q, 32)
    both, ahead = (work.fastest(lambda run=run: run(rows, owner)) / len(owner) for run in (q.value_and_grad, q.value))
    return len(x) * (expected.backward * both + max(0, expected.forward - expected.backward) * ahead)


def _apart(names: Sequence[str]) -> list[str]:
    return [part.strip() for listed in names for part in listed.split(",")]


def stacked(seen: Sequence[work.Seen]) -> Tensor:
    """Lay the pictures in one tensor."""
    return torch.stack([one.x for one in seen])

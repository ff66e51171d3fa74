"""What a sheet or a report shows of one picture, and the words for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from jaxtyping import Float
from torch import Tensor

from apportion.core.attribution import Attribution
from apportion.core.card import Kind
from apportion.core.errors import InputError
from apportion.show import maps


@dataclass(frozen=True, eq=False)
class Panel:
    """One method's answer about one picture.

    Attributes:
        title: the method's name.
        attribution: of one example.
        seconds: that it took.

    Raises:
        InputError: several examples, or values that are no map of a picture.
    """

    title: str
    attribution: Attribution
    seconds: float

    def __post_init__(self) -> None:
        if len(self.attribution) != 1:
            raise InputError(
                f"an attribution of {len(self.attribution)} examples in a panel", "one", "explain pictures one by one"
            )
        maps.picture_map(self.attribution)


@dataclass(frozen=True, eq=False)
class Page:
    """One picture with all that was found about it.

    Attributes:
        name: the picture's.
        picture: as the network saw it, before normalization, in [0, 1].
        classes: label and probability of the top classes, best first.
        target: what was explained, in words.
        panels: the methods' answers.
        extra_pictures: baselines, boundary points or counterfactuals, each [3, H, W] with a name.

    Raises:
        InputError: something that is no picture, or a map of another size.
    """

    name: str
    picture: Float[Tensor, "3 H W"]
    classes: tuple[tuple[str, float], ...]
    target: str
    panels: tuple[Panel, ...]
    extra_pictures: tuple[tuple[str, Tensor], ...] = ()

    def __post_init__(self) -> None:
        maps.to_rgb(self.picture)
        for panel in self.panels:
            maps.picture_map(panel.attribution, size=self.size)
        for _, extra in self.extra_pictures:
            maps.to_rgb(extra)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        high, wide = self.picture.shape[1:]
        return high, wide

    def by_kind(self) -> list[tuple[Kind, list[Panel]]]:
        """Separate the panels by the question they answer, in the order of `Kind`: they do not compare across."""
        order = list(Kind)
        panels = sorted(self.panels, key=lambda p: order.index(p.attribution.kind))
        return [(kind, list(some)) for kind, some in groupby(panels, key=lambda p: p.attribution.kind)]


def unit(attribution: Attribution) -> str:
    """Say what a map's numbers are in.

    >>> import torch, apportion as ap
    >>> unit(ap.Gradient()(ap.Field(torch.nn.Linear(2, 1)), torch.zeros(1, 2)))
    'score per unit of input'
    """
    return "score per unit of input" if attribution.kind is Kind.SENSITIVITY else "score"


def gap(attribution: Attribution) -> str:
    """Write the completeness gap of the first example, or why there is none.

    >>> import torch, apportion as ap
    >>> gap(ap.Gradient()(ap.Field(torch.nn.Linear(2, 1)), torch.zeros(1, 2)))
    'not applicable: a sensitivity does not sum to the score'
    """
    if attribution.gap is None or attribution.claimed_total is None or attribution.relative_gap is None:
        return attribution.gap_note
    claim, share = float(attribution.claimed_total[0]), float(attribution.relative_gap[0])
    return f"{signed(float(attribution.gap[0]))} ({share:.2%} of the claimed total, {signed(claim)})"


def passes(attribution: Attribution) -> str:
    """Write what an explanation cost.

    >>> import torch, apportion as ap
    >>> passes(ap.Gradient()(ap.Field(torch.nn.Linear(2, 1)), torch.zeros(1, 2)))
    '1 forward, 1 backward'
    """
    cost = attribution.cost
    shared = f"; {cost.shared}" if cost.shared else ""
    return f"{int(cost.forward[0])} forward, {int(cost.backward[0])} backward{shared}"


def signed(number: float) -> str:
    """Write three digits and a sign.

    >>> signed(1.2345), signed(-0.5)
    ('+1.23', '−0.500')
    """
    return f"{number:+#.3g}".replace("-", "−")


def score_name(attribution: Attribution) -> str:
    """Name the explained number and its target.

    >>> import torch, apportion as ap
    >>> score_name(ap.Gradient()(ap.Field(torch.nn.Linear(2, 3)), torch.zeros(1, 2), target=1))
    'Logit, target 1'
    """
    config = attribution.score
    name = config.get("type") or config.get("callable") or "score" if isinstance(config, dict) else "score"
    target = plain(attribution.target)
    while isinstance(target, list) and len(target) == 1:
        target = target[0]
    return str(name) if target is None else f"{name}, target {target}"


def settings(attribution: Attribution) -> str:
    """Write the configuration of an explanation as JSON, all that is needed to repeat it but the model and data."""
    record = {
        "method": attribution.method,
        "score": attribution.score,
        "site": attribution.site,
        "target": plain(attribution.target),
        "seed": attribution.seed,
        "postprocessing": list(attribution.postprocessing),
    }
    return json.dumps(record, indent=2, ensure_ascii=False, default=str)


def plain(value: Any) -> Any:
    """Turn tensors into lists, wherever they are.

    >>> import torch
    >>> plain((torch.tensor([3]), {"a": 1}))
    [[3], {'a': 1}]
    """
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def printable(text: str) -> str:
    r"""Write a name so that it can be stored and shown: control characters and undecodable bytes are escaped.

    >>> printable("a\x00b\nc"), printable("caf\udce9")
    ('a\\x00b\\nc', 'caf\\udce9')
    """
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in whole)

"""Pictures of path profiles: the score, its slope and what has been attributed, from baseline to example."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from apportion.core.errors import InputError, kind_of
from apportion.path_profile import PathProfile

_SCORE, _SUM, _SLOPE = "#1f4e9c", "#b4531f", "#5c5c5c"  # told apart in grey by their dashes as well


def profile(
    profiles: PathProfile | Mapping[str, PathProfile], example: int = 0, branch: int = 0, *, phi: float = 0.9
) -> Figure:
    """Draw profiles beside each other, one panel each; the part where the score is saturated is shaded.

    The score is drawn from that of the starting point, so that it ends at the total to be attributed, and the
    attribution so far should end there, too. The slope has an axis of its own, at the right.

    Args:
        profiles: one profile, or several by title, such as those of a logit and of its probability.
        example: which example.
        branch: which of its paths.
        phi: the share of its rise after which the score counts as saturated.

    Raises:
        InputError: no profiles, or an example or path that is not there.
        ConfigError: a φ that is no share.
    """
    named = {"": profiles} if isinstance(profiles, PathProfile) else profiles
    if not isinstance(named, Mapping) or not named or not all(isinstance(p, PathProfile) for p in named.values()):
        raise InputError(
            "no profile" if isinstance(named, Mapping) and not named else kind_of(profiles),
            "what ap.path_profile gives, or a dict of such by title",
            "write profile(p), or profile({'logit': p, 'probability': p2})",
        )
    for one in named.values():
        batch, k = one.start.shape
        if not (0 <= example < batch and 0 <= branch < k):
            raise InputError(
                f"example={example}, branch={branch} of a profile of {batch} example(s), {k} path(s) each",
                "indices within these",
                "count from 0",
            )
    figure = Figure(figsize=(5.4 * len(named), 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(named), squeeze=False)[0]
    for panel, (title, one) in zip(axes, named.items(), strict=True):
        _draw(panel, one, title, example, branch, phi)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def _draw(axes: Axes, one: PathProfile, title: str, example: int, branch: int, phi: float) -> None:
    there = ~torch.isnan(one.t[example, branch])
    t, value, slope, summed = (
        column[example, branch][there].tolist() for column in (one.t, one.value, one.slope, one.accumulated)
    )
    start, end = float(one.start[example, branch]), float(one.end[example])
    place = float(one.saturated_from(phi)[example, branch])
    axes.axhline(end - start, color="#8a8a8a", linewidth=0.8, linestyle=":")
    if place < 1:
        axes.axvspan(place, 1, color="#d9d9d9", alpha=0.6, linewidth=0, label=f"past {phi:.0%} of the rise")
    axes.plot(t, [v - start for v in value], color=_SCORE, label="score - score at the start")
    axes.plot(t, summed, color=_SUM, linestyle="--", label="attributed so far")
    right = axes.twinx()
    right.plot(t, slope, color=_SLOPE, linestyle=":", linewidth=1.2)
    axes.plot([], [], color=_SLOPE, linestyle=":", linewidth=1.2, label="‖gradient‖ (right axis)")
    right.set_ylim(bottom=0)
    right.tick_params(labelsize=8)
    valid = float(one.valid_share[example, branch])
    words = [title] if title else []
    words.append(f"valid pairs {valid:.0%}")
    if one.outside_share is not None:
        words.append(f"out of bounds {float(one.outside_share[example, branch]):.0%}")
    axes.set_title(", ".join(words), fontsize=9)
    axes.set_xlabel("place on the path (0: start, 1: example)", fontsize=8)
    axes.set_xlim(0, 1)
    axes.tick_params(labelsize=8)

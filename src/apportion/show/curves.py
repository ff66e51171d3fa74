"""Pictures of effect curves: each example's own (ICE) beside the interventional expectation (ACE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from apportion.core import tree
from apportion.core.errors import InputError, kind_of
from apportion.effect_curves import EffectCurves

_OTHERS, _OWN, _CAUSAL = "#b9b9b9", "#1f4e9c", "#b4531f"
_ACROSS = 4
"""Panels in a row."""


def curves(found: EffectCurves, example: int = 0, names: Sequence[str] | None = None) -> Figure:
    """Draw a panel per feature: ICE of the example in blue, of its class in grey, their mean in black, ACE dashed.

    All curves are shifted to 0 on average over the range, so that their shapes can be compared: the dashed one at the
    example's own value, marked by a dot, is its average causal effect. Where it leaves the mean of many ICE curves,
    the Taylor expansion behind it is not to be trusted.

    Args:
        found: from `ap.effect_curves`.
        example: whose curve and class.
        names: of the features shown, in their order.

    Raises:
        InputError: no curves, an example that is not there, or another number of names.
    """
    if not isinstance(found, EffectCurves):
        raise InputError(kind_of(found), "what ap.effect_curves gives", "write curves(ap.effect_curves(...))")
    batch, k, _ = found.individual.shape
    if not 0 <= example < batch:
        raise InputError(f"example={example} of curves of {batch} example(s)", "an index within these", "count from 0")
    if names is not None and len(names) != k:
        raise InputError(f"{len(names)} names for {k} feature(s)", "one name each", "leave names out for indices")
    titles = list(names) if names is not None else [f"feature {i}" for i in found.feature.tolist()]
    alike = torch.ones(batch, dtype=torch.bool)
    for t in [] if found.target is None else tree.leaves(found.target):
        alike &= (t == t[example]).reshape(batch, -1).all(1).cpu()
    across = min(_ACROSS, max(k, 1))
    down = -(-k // across)
    figure = Figure(figsize=(3.1 * across, 2.7 * down + 0.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for i, panel in enumerate(panels):
        if i >= k:
            panel.set_axis_off()
            continue
        _draw(panel, found, example, i, alike)
        panel.set_title(titles[i], fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def _draw(axes: Axes, found: EffectCurves, example: int, i: int, alike: torch.Tensor) -> None:
    alpha = found.alpha[i].cpu()
    own = found.individual[:, i].cpu()
    own = own - own.mean(1, keepdim=True)
    causal = found.expected[example, i].cpu()
    causal = causal - causal.mean()
    others = [b for b in alike.nonzero()[:, 0].tolist() if b != example]
    for n, b in enumerate(others):
        axes.plot(alpha, own[b], color=_OTHERS, linewidth=0.6, label="ICE of others" if n == 0 else None)
    axes.axhline(0, color="#8a8a8a", linewidth=0.6)
    axes.plot(alpha, own[example], color=_OWN, linewidth=1.6, label="ICE of the example")
    axes.plot(alpha, own[alike].mean(0), color="black", linewidth=1.2, label="mean of ICE")
    axes.plot(alpha, causal, color=_CAUSAL, linewidth=1.8, linestyle="--", label="ACE")
    at = float(found.at[example, i])
    if alpha[0] < alpha[-1] and float(alpha[0]) <= at <= float(alpha[-1]):
        place = (at - float(alpha[0])) / float(alpha[-1] - alpha[0]) * (len(alpha) - 1)
        left = min(int(place), len(alpha) - 2)
        height = float(causal[left]) + (place - left) * float(causal[left + 1] - causal[left])
        axes.plot([at], [height], "o", color=_CAUSAL, markersize=5)
    axes.tick_params(labelsize=7)


__all__ = ["curves"]

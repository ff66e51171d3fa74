"""Grad-CAM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from apportion.core.attribution import Attribution, Domain
from apportion.core.card import Card, Claim, Family, Kind, Need, Paper, Principle
from apportion.core.errors import ConfigError, NoGradientPathError, SiteError
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.site import Site

CARD = Card(
    title="Grad-CAM",
    paper=Paper(
        "Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra",
        2017,
        "Grad-CAM: visual explanations from deep networks via gradient-based localization",
        "ICCV 2017, arXiv:1610.02391",
    ),
    kind=Kind.SALIENCE,
    intent="The last feature maps, weighted by the mean gradient of their channel.",
    cost="1 forward, 1 backward (down to the layer)",
    families=(Family.GRADIENT_TIMES_INPUT, Family.MODIFIED_GRADIENT_TIMES_INPUT, Family.TAYLOR),
    claims=(
        Claim(Principle.ALLOCATION_FIDELITY, holds=False, source="Deng et al. 2025, Table VII"),
        Claim(Principle.MODEL_ROBUSTNESS, holds=False, source="Deng et al. 2025, Table VII"),
    ),
    needs=frozenset({Need.SPATIAL}),
    differentiable=True,
    cautions=(
        "The map has the layer's resolution; enlarging it (`.resize`) adds no detail.",
        "Averaging the gradient over space may point where the layer's activation did not contribute.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class GradCAM(Explainer):
    """relu(Σ_k α_k A_k) with α_k = mean over space of ∂f/∂A_k; Selvaraju et al. 2017, equations 1 and 2.

    Values [B, h, w] lie on the layer's grid, in units of the score per position.

    Attributes:
        layer: where A is read, [B, K, h, w]; "auto" takes the last module call with a spatial grid that the
            score depends on.
        relu: drop negative evidence, as published.

    Raises:
        SiteError: no such layer, or it has no spatial grid.

    >>> import torch, apportion as ap
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    >>> ap.GradCAM()(ap.Field(net), torch.ones(1, 1, 5, 5), target=0).values.shape
    torch.Size([1, 3, 3])
    """

    layer: Site | Literal["auto"] = "auto"
    relu: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.layer, Site) and self.layer != "auto":
            raise ConfigError(f"GradCAM(layer={self.layer!r})", "a site or 'auto'", f"write ap.At({self.layer!r})")
        super().__post_init__()

    def explain(self, q: Question) -> Attribution:
        site = last_spatial(q) if self.layer == "auto" else self.layer
        value, taps = q.tap(q.x, torch.arange(len(q)), [site])
        act, grad = taps[site]
        if act.ndim != 4 or grad is None:
            raise SiteError(
                f"{site} has shape {tuple(act.shape)}", "[B, channels, h, w]", "choose a convolutional layer"
            )
        cam = (grad.mean((2, 3), keepdim=True) * act).sum(1)
        return q.attribution(self, cam.relu() if self.relu else cam, domain=Domain.SITE, value=value)

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(1, 1)


def last_spatial(q: Question) -> Site:
    """Find the last module call on the way to the score that gives [B, K, h, w] with more than one position.

    Raises:
        SiteError: there is no such call in the whole pass.
        NoGradientPathError: the score is computed without them.
    """
    found = [s.site for s in q.sites() if len(s.shape) == 4 and math.prod(s.shape[2:]) > 1]
    if not found:
        raise SiteError(
            "a model without a layer of shape [B, K, h, w]",
            "a convolutional network",
            "choose another method, or in Python name a layer of this shape: layer=ap.At(...)",
        )
    reached = q.reaching(found)
    if not reached:
        names = ", ".join(str(s) for s in found[-3:])
        raise NoGradientPathError(
            f"the score depends on none of the spatial layers ({names})",
            "a layer on the way from input to score",
            "look for detach() or no_grad after them, or give layer=ap.At(...)",
        )
    return reached[-1]

"""Information bottleneck attribution, per sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution, Domain
from apportion.core.card import Card, Family, Kind, Need, Paper
from apportion.core.errors import ConfigError, SiteError
from apportion.core.explainer import Explainer, Passes
from apportion.core.field import Field
from apportion.core.progress import tick
from apportion.core.question import Question
from apportion.core.registry import register
from apportion.core.score import LogProbability, Score
from apportion.core.tree import Tree
from apportion.parts.baselines.simple import blur
from apportion.parts.grids import FoundGrid
from apportion.parts.subsets.pictures import asked
from apportion.parts.subsets.statistics import LayerStatistics

CARD = Card(
    title="Information bottleneck",
    paper=Paper(
        "Schulz, Sixt, Tombari, Landgraf",
        2020,
        "Restricting the flow: information bottlenecks for attribution",
        "ICLR 2020, arXiv:2001.00396",
    ),
    kind=Kind.SALIENCE,
    intent="How many bits of a layer, place by place, the class still needs when noise takes the place of the rest.",
    cost="1 + n k forward, n k backward (n steps one after another, k noisy copies); once: 1 forward per row of data",
    families=(Family.INFLUENTIAL_SUBSET,),
    unjudged="Deng et al. 2025 place it among the influential subsets and judge its faithfulness nowhere",
    needs=frozenset({Need.SPATIAL, Need.DATA}),
    signed=False,
    unit="bits",
    cautions=(
        "An upper bound only for units that fire in the statistics' data; those that never do count 0 bits, and "
        "results warn where the example fires them.",
        "Units are taken as independent and normal, which they are not; bits of different layers or values of beta do "
        "not compare.",
        "It depends on the layer, which has to be one that everything passes: what goes around it is not held back.",
        "Means and deviations of the layer must come from data like the example.",
        "Ten steps of a large rate are a rule of thumb, not convergence.",
        "beta counts the mean over units as in the authors' code; the paper's is beta divided by their number.",
    ),
)

_NEVER_ALL = 1e-6
"""How much noise stays at least: with none the information is infinite."""


def information(gate: Float[Tensor, "*shape"], standardized: Float[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """KL of N(λ r', (1 - λ)²) from N(0, 1), in nats, unit by unit; Schulz et al. 2020.

    >>> nats = information(torch.tensor([0.3]), torch.tensor([1.7]))
    >>> round(float(nats), 6), round(float(nats) / math.log(2), 5)
    (0.231725, 0.33431)
    """
    gate = gate.clamp(max=1 - _NEVER_ALL)
    variance = (1 - gate) ** 2
    return -0.5 * (1 + variance.log() - (gate * standardized) ** 2 - variance)


@register(CARD)
@dataclass(frozen=True)
class InformationBottleneck(Explainer):
    """The bits let through by λ* = argmin -log p_c(λ r + (1 - λ) ε) + β KL, ε as usual there; Schulz et al. 2020.

    Values are bits of the layer, summed over its channels, [B, h, w], or [B, N] for tokens [B, N, K]; never negative.
    `parts["bits"]` is their sum.

    Attributes:
        statistics: of the layer, from `ap.subsets.LayerStatistics.fit(field, data)`, which also says which layer.
        score: log p_c; None asks the field's own, whose units β then has to match.
        beta: β, of the information's mean over units.
        steps: of Adam.
        lr: its rate.
        copies: noisy copies a step.
        start: what λ starts at, before the sigmoid: nearly all comes through.
        sigma: of the blur of λ, in cells of the layer; 0 for none, as always for tokens, which pool nothing.
        least_std: deviations below count as this.
        least_active: units that are not 0 in at most this share of the data carry nothing.
        upsample: enlarge to the picture, as bits per pixel of it; those of class tokens and the like have no place
            there and are left out.

    Raises:
        ConfigError: no statistics.
        SiteError: the layer is another than the statistics say, or its tokens have no place on a picture.

    >>> import torch, apportion as ap
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(18, 2))
    >>> field, data = ap.Field(net), torch.rand(20, 1, 5, 5)
    >>> known = ap.subsets.LayerStatistics.fit(field, data, ap.At("1"))
    >>> a = ap.InformationBottleneck(known)(field, data[:1])
    >>> a.values.shape, a.unit, bool((a.values >= 0).all())
    (torch.Size([1, 3, 3]), 'bits', True)
    """

    _positive = ("steps", "lr", "copies", "least_std")
    _not_negative = ("beta", "sigma", "least_active")

    statistics: LayerStatistics | None = None
    score: Score | None = LogProbability()
    beta: float = 10.0
    steps: int = 10
    lr: float = 1.0
    copies: int = 10
    start: float = 5.0
    sigma: float = 1.0
    least_std: float = 0.01
    least_active: float = 0.01
    upsample: bool = False

    @property
    def known(self) -> LayerStatistics:
        """The statistics.

        Raises:
            ConfigError: there are none.
        """
        if self.statistics is None:
            raise ConfigError(
                "InformationBottleneck() without statistics of a layer",
                "some, from data like the example",
                "write InformationBottleneck(ap.subsets.LayerStatistics.fit(field, data))",
            )
        return self.statistics

    def fitted(self, field: Field, data: Tree) -> Explainer:
        return self if self.statistics is not None else replace(self, statistics=LayerStatistics.fit(field, data))

    def explain(self, q: Question) -> Attribution:
        known = self.known
        inner = q.inside(known.layer)
        r = inner.x
        assert isinstance(r, Tensor)  # a site is one
        if r.shape[1:] != known.mean.shape:
            raise SiteError(
                f"{known.layer} has shape {tuple(r.shape)}, and its statistics {tuple(known.mean.shape)}",
                "the layer they were taken of",
                "fit them anew, with this model and pictures of this size",
            )
        if not q.once(("passed by all", known.layer), lambda root: root.is_passed_by_all(known.layer)):
            q.warn(f"{known.layer} has ways around it: what they carry reaches the score and is not counted")
        idle = known.active.to(r) <= self.least_active
        if bool((fired := (r != 0) & idle).any()):
            b = int(fired.flatten(1).sum(1).argmax())
            q.warn(
                f"{int(fired[b].sum())} unit(s) of {known.layer} fire in example {b} and hardly ever did in the "
                "statistics' data: their bits count as 0, so the sum is no upper bound; take data like the example"
            )
        room = max(1, q.field.chunk // self.copies)
        blocks = torch.arange(len(q), device=q.device).split(room)
        channels = 1 if r.ndim == 4 else 2
        bits = torch.cat([self._search(inner, r, owner) for owner in blocks]).sum(channels) / math.log(2)
        total = bits.flatten(1).sum(1)
        if self.upsample:
            size = tree.leaves(q.inputs)[0].shape[2:]
            if bits.ndim == 2:
                bits = FoundGrid().find(q, tuple(r.shape), known.layer)(bits[..., None])[:, 0]
            share = bits[0].numel() / math.prod(size)
            bits = share * F.interpolate(bits[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        return q.attribution(self, bits, domain=Domain.SITE, parts={"bits": total})

    def gate(self, alpha: Float[Tensor, "R *unit"]) -> Float[Tensor, "R *unit"]:
        """Give λ, the sigmoid of what is learned, blurred where it is a map."""
        gate = alpha.sigmoid()
        return blur(gate, self.sigma, cut=2.0) if self.sigma and gate.ndim == 4 else gate

    def _search(self, inner: Question, r: Tensor, owner: Tensor) -> Float[Tensor, "R *unit"]:
        """Learn what some examples let through, all steps of it; nats for each unit."""
        known = self.known
        mean, std = known.mean.to(r), known.std.to(r).clamp(min=self.least_std)
        active = (known.active.to(r) > self.least_active).to(r.dtype)
        shown = r[owner]
        standardized = (shown - mean) / std
        noise, score = inner.stream("bottleneck"), asked(inner, self.score)
        each = torch.arange(len(owner), device=r.device).repeat(self.copies)
        copy = torch.arange(self.copies, device=r.device).repeat_interleave(len(owner))
        alpha = torch.full_like(shown, self.start).requires_grad_()
        optimizer = torch.optim.Adam([alpha], lr=self.lr)
        for step in range(self.steps):
            usual = mean + std * noise.normal(r, owner[each], step * self.copies + copy)
            with torch.enable_grad():
                gate = self.gate(alpha)
                carried = (information(gate, standardized) * active).flatten(1).mean(1).sum()
                (own,) = torch.autograd.grad(self.beta * carried, gate, retain_graph=True)
                held = gate.detach()[each]
                _, slope = inner.value_and_grad(held * shown[each] + (1 - held) * usual, owner[each], score)
                tree.add_rows(own, each, slope * (shown[each] - usual) / -self.copies)
                (alpha.grad,) = torch.autograd.grad(gate, alpha, own)
            optimizer.step()
            tick("information bottleneck, steps", step + 1, self.steps)
        with torch.no_grad():
            return information(self.gate(alpha), standardized) * active

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(1 + self.steps * self.copies, self.steps * self.copies, at_x=1)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        return (cls(steps=3, copies=2), cls(score=None, steps=2, copies=2, sigma=0.0, upsample=True))

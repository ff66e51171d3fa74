"""The base of local surrogates: sample around an example, fit, and say how far to trust the fit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.core.attribution import Attribution
from apportion.core.card import Kind
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer, Passes
from apportion.core.field import Field
from apportion.core.game import Game, hashed
from apportion.core.question import Question
from apportion.core.tree import Tree
from apportion.parts.masks.explainer import GameMethod
from apportion.parts.masks.samplers import (
    AllSubsets,
    Bernoulli,
    KernelWeighted,
    LeaveOneOut,
    Permutations,
    Sampler,
    SmoothGrids,
)
from apportion.parts.surrogate.kernels import Kernel
from apportion.parts.surrogate.neighborhoods import Drawn, Local, Neighborhood
from apportion.parts.surrogate.regressions import Fit, Regression, rounding
from apportion.parts.surrogate.selections import Selection
from apportion.parts.surrogate.trust import (
    FEWEST,
    Trust,
    coefficient_stability,
    different,
    held_out,
    unseen,
    variable_stability,
)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A surrogate of each example.

    Attributes:
        fit: the linear model.
        kept: the features it was allowed.
        weigh: gives the kernel's weight of samples.
        drawn: what it was fitted to.
        parts: what the method knows besides.
    """

    fit: Fit
    kept: Bool[Tensor, "B P"]
    weigh: Callable[[Float[Tensor, "B N P"]], Float[Tensor, "B N"]]
    drawn: Drawn
    parts: Mapping[str, Tensor]


def fit(
    drawn: Drawn,
    local: Local,
    weigh: Callable[[Tensor], Tensor],
    selection: Selection,
    regression: Regression,
    **parts: Tensor,
) -> Fitted:
    """Weigh samples, choose features, and fit a model of them."""
    w = weigh(drawn.z) * drawn.w
    kept = selection(drawn.z, drawn.v, w, local.present, local.center)
    return Fitted(regression(drawn.z, drawn.v, w, kept), kept, weigh, drawn, parts)


def by_kernel(kernel: Kernel, local: Local) -> Callable[[Tensor], Tensor]:
    """Give the kernel about the examples of a neighborhood."""
    return lambda z: kernel(z, local.center, local.present.sum(-1).double())


@dataclass(frozen=True)
class LocalFit(Explainer):
    """Base of methods whose values are the coefficients of a model fitted around the example."""

    _positive = ("samples",)

    samples: int = 500
    trust: Trust = Trust()

    @abstractmethod
    def around(self, q: Question) -> Local:
        """Say where around the examples, and what of each sample the surrogate sees."""

    @abstractmethod
    def fitted_to(self, local: Local, run: int) -> Fitted:
        """Draw the samples of a run and fit the surrogate to them."""

    def explain(self, q: Question) -> Attribution:
        local = self.around(q)
        first = self.fitted_to(local, 0)
        fits, kept = [first.fit], [first.kept]
        repeats, fitted = local.repeats(), local.numbered(first.drawn, 0).masked_fill(first.drawn.w <= 0, -1)
        others: list[tuple[Tensor, ...]] = []
        constant = _constant(first.drawn)
        for run in range(1, 1 + self.trust.reruns):
            again = self.fitted_to(local, run)
            fits.append(again.fit)
            kept.append(again.kept)
            z, v, w = again.drawn
            constant = constant & _constant(again.drawn)
            number = local.numbered(again.drawn, run)
            new = (w > 0) & unseen(fitted, number)
            new[:, : local.own] = False  # the example itself was in the fit
            others.append((v, first.fit.predict(z), first.weigh(z) * w * new, number, new))
        weight = first.weigh(first.drawn.z) * first.drawn.w
        effective = weight.sum(-1).square() / weight.square().sum(-1)
        lone = effective < 1 + 1e-3  # one sample is fitted by anything
        found: dict[str, Tensor] = {
            "intercept": first.fit.intercept,
            "r2": torch.where(lone, 0, first.fit.r2),
            "effective_samples": effective,
            **first.fit.parts,
            **first.parts,
        }
        if others and first.drawn.v.shape[1] > local.own and not bool(repeats.all()):
            v, predicted, w, number, new = (torch.cat(part, -1) for part in zip(*others, strict=True))
            count = different(number, new)
            judged = torch.stack(held_out(v, predicted, w), -1)
            judged = torch.where(lone[:, None], judged.clamp(max=0), judged)
            judged = torch.where((count < FEWEST)[:, None], torch.nan, judged)
            found["held_out_r2"], found["held_out_r2_interval"] = judged[:, 0], judged[:, 1:]
            found["held_out"] = count.double()
        if self.trust.reruns:
            each, errors = [f.coefficients for f in fits], [f.standard_error for f in fits]
            found["csi"] = coefficient_stability(each, errors, torch.stack(kept).any(0))
            found["vsi"] = variable_stability(each, kept, self.trust.top)
            for name in ("csi", "vsi"):  # what there is of a constant score is rounding, and its order means nothing
                found[name] = torch.where(constant, torch.nan, found[name])
        like = first.fit.intercept.new_zeros(0, dtype=q.fx.dtype)
        self._warn(q, local, first, found)
        parts = {name: part.to(like.dtype) for name, part in found.items()}
        error = first.fit.standard_error
        if "posterior_variance" not in first.fit.parts:
            error = torch.where(repeats[:, None], 0, error)  # without chance there is no error of sampling
        return local.answer(self, first.fit.coefficients, error, parts)

    def _warn(self, q: Question, local: Local, first: Fitted, found: Mapping[str, Tensor]) -> None:
        z, w = first.drawn.z, first.drawn.w[..., None] > 0
        low = torch.where(w, z, float("inf")).amin(1)
        high = torch.where(w, z, -float("inf")).amax(1)
        idle = first.kept & (low >= high)
        if bool(idle.any()):
            b = int(idle.any(1).nonzero()[0])
            q.warn(
                f"{int(idle[b].sum())} feature(s) of example {b} never changed in {z.shape[1]} samples, and have 0: "
                f"{local.if_idle}"
            )
        effective, asked = found["effective_samples"], first.kept.sum(-1) + 1
        few = (effective <= asked) & (effective < 0.5 * (first.drawn.w > 0).sum(-1)) | (effective < 1 + 1e-3)
        if bool(few.any()):
            b = int(few.nonzero()[0])
            q.warn(
                f"only {float(effective[b]):.1f} effective samples for {int(asked[b])} coefficients of example {b}: "
                "the samples are far from it, and neither coefficients nor R² mean anything; sample around it, widen "
                "the kernel or draw more"
            )
        repeats = local.repeats()
        if bool(repeats.any()):
            self._warn_of_fit(q, found["r2"], repeats, f"nothing held out: {local.if_repeats}")
        if bool(repeats.all()):
            return
        if not self.trust.reruns:
            q.warn("no re-runs: nothing is known of how far the surrogate holds on other samples, or of its stability")
            return
        if "held_out_r2" not in found:
            q.warn("nothing held out: a run has no sample but the example itself; draw more")
            return
        r2, (bottom, top) = found["held_out_r2"], found["held_out_r2_interval"].unbind(-1)
        none = r2.isnan() & ~repeats
        if bool(none.any()):
            most = int(found["held_out"][none].max())
            what = (
                f"nothing held out of {int(none.sum())} example(s): of what the re-runs drew, {most} sample(s) at most "
                f"were not in the fit, too few to judge it by ({FEWEST} will do); {local.if_few}"
            )
            self._warn_of_fit(q, found["r2"], none, what)
        if bool((r2 < self.trust.least_r2).any()):
            b = int(r2.nan_to_num(float("inf")).argmin())
            used, there = int(first.kept[b].sum()), int(local.present[b].sum())
            more = f"let it use more than {used} of {there} features, " if used < there else ""
            q.warn(
                f"held-out R² {float(r2[b]):.2f} [{float(bottom[b]):.2f}, {float(top[b]):.2f}] of example {b}, below "
                f"{self.trust.least_r2:g}: a linear model does not describe the score there; {more}{local.if_poor}"
            )
        for name, what in (("csi", "coefficients"), ("vsi", "the largest features")):
            if bool((found[name] < self.trust.least_stability).any()):
                b = int(found[name].nan_to_num(float("inf")).argmin())
                q.warn(
                    f"stability of {what} over {1 + self.trust.reruns} runs ({name.upper()}) "
                    f"{float(found[name][b]):.2f} of example {b}, below {self.trust.least_stability:g}: draw more"
                )

    def _warn_of_fit(self, q: Question, r2: Tensor, which: Tensor, what: str) -> None:
        """Say that some examples have nothing but the R² of the fit, and whether it is poor."""
        b = int(torch.where(which, r2, float("inf")).argmin())
        least = float(r2[b])
        bad = f", below {self.trust.least_r2:g}: a linear model does not describe the score there"
        poor = bad if least < self.trust.least_r2 else ""
        q.warn(f"{what}; the R² of the fit is {least:.2f} at least, of example {b}{poor}")


def _constant(drawn: Drawn) -> Bool[Tensor, " B"]:
    v, w = drawn.v, (drawn.w > 0).double()
    mean = (w * v).sum(-1, keepdim=True) / w.sum(-1, keepdim=True)
    return (w * (v - mean).square()).sum(-1) <= rounding(v, w)


class Coalitions(Local):
    """Coalitions of a game, which the surrogate sees as 0 and 1."""

    if_few = "draw more, or of few players take all coalitions, with ap.samplers.AllSubsets()"
    if_idle = "draw more samples, or remove more players at a time"

    def __init__(self, method: GameMethod, game: Game, sampler: Sampler, own: int, samples: int) -> None:
        self.method, self.game, self.sampler, self.own = method, game, sampler, own
        budget = max(1, samples - own)
        self.same = torch.tensor([sampler.repeats(int(n), budget) for n in game.sizes], device=game.question.device)
        if isinstance(sampler, LeaveOneOut):
            self.if_repeats = "every run leaves out the same players one by one, and as few samples fit anything"
        elif isinstance(sampler, KernelWeighted):
            self.if_repeats = "all coalitions but the empty one are in the fit"
        elif isinstance(sampler, AllSubsets):
            self.if_repeats = "all coalitions are in the fit, and there are no others"
        self.present = game.own.to(game.question.device)
        self.center = self.present.double()

    def draw(self, run: int, first: int, count: int, active: Bool[Tensor, " B"] | None = None) -> Drawn:
        game, batch = self.game, len(self.game.question)
        masks, weights = [], []
        if self.own:
            masks.append(game.own[:, None])
            weights.append(torch.ones(batch, 1, dtype=torch.float64))
        if (budget := first + count - self.own) > 0:
            for block in self.sampler.blocks(game, budget, f"surrogate, run {run}"):
                masks.append(block.masks.expand(batch, -1, -1) & game.own[:, None])
                weight = torch.ones(batch, block.size, dtype=torch.float64)
                if block.weight is not None:
                    weight = block.weight.double().expand(batch, -1)
                weights.append(weight if block.where is None else weight * block.where)
        mask, w = torch.cat(masks, 1), torch.cat(weights, 1)
        own = w[:, self.own :]  # the sampler's weights are scaled to 1 on average, as that of the example itself is
        w[:, self.own :] = own * (own > 0).sum(1, keepdim=True) / own.sum(1, keepdim=True).clamp(min=1e-300)
        mask, w = mask[:, first:], w[:, first:]
        if active is not None:
            w = w * active.cpu()[:, None]
        v = game.value(mask, where=None if bool((w > 0).all()) else w > 0)
        device = game.question.device
        return Drawn(mask.to(device).double(), v.double(), w.to(device))

    def repeats(self) -> Bool[Tensor, " B"]:
        return self.same

    def numbered(self, drawn: Drawn, run: int) -> Int[Tensor, "B N"]:
        number = hashed((drawn.z > 0.5).flatten(0, 1).cpu())
        return torch.from_numpy(number).to(drawn.z.device).reshape(drawn.v.shape)

    def answer(self, explainer: Explainer, coefficients: Tensor, error: Tensor, parts: Mapping[str, Tree]) -> Any:
        q = self.game.question
        return self.method.answer(q, self.game, coefficients, standard_error=error, parts=parts)


@dataclass(frozen=True)
class Surrogate(LocalFit, GameMethod):
    """Base of surrogates of coalitions, or of rows like those of a table.

    Attributes:
        groups: which elements form a player.
        fill: what stands in for absent players.
        reduce: over several draws of the fill.
        samples: how many are fitted, the example itself among them where it is one.
        trust: further runs, to judge the fit.
        sampler: how coalitions are drawn.
        with_x: whether the example itself is the first sample of a run.
        rows: a neighborhood of rows instead of coalitions; then groups, fill and sampler stay as they are.
    """

    sampler: Sampler = Bernoulli(0.5)
    with_x: bool = True
    rows: Neighborhood | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sampler, Permutations | SmoothGrids):
            raise ConfigError(
                f"{type(self).__name__}(sampler={type(self.sampler).__name__}())",
                "a sampler of single coalitions that keep or remove players: orders come whole, so that neither the "
                "number of samples is kept nor, of examples with fewer players, what is drawn; grids are soft",
                "use ap.samplers.Bernoulli(), UniformSizes() or, in LIME, KernelWeighted()",
            )
        if self.rows is None:
            return
        plain = {f: type(self).__dataclass_fields__[f].default for f in ("groups", "fill", "sampler")}
        for name, default in plain.items():
            if getattr(self, name) != default:
                raise ConfigError(
                    f"{name} beside rows of {type(type(self)).__name__} {type(self).__name__}",
                    "players with a fill, or rows of a table",
                    f"leave {name} out, or rows",
                )

    @property
    def kind(self) -> Kind:
        return super().kind if self.rows is None else self.rows.kind

    def around(self, q: Question) -> Local:
        if self.rows is not None:
            return self.rows.around(q)
        return Coalitions(self, self.game(q), self.sampler, int(self.with_x), self.samples)

    def fitted(self, field: Field, data: Tree) -> Explainer:
        base = super().fitted(field, data)
        if not isinstance(base, Surrogate) or base.rows is None:
            return base
        return replace(base, rows=base.rows.fitted(data))

    def passes(self, q: Question | None = None) -> Passes:
        return self.passes_for(self.samples, q)

    def passes_for(self, samples: int, q: Question | None) -> Passes:
        """Count the rows of all runs, of so many samples each, at most."""
        runs = 1 + self.trust.reruns
        if self.rows is not None:
            return Passes(runs * (samples - self.rows.own), 0, at_x=1)
        if q is None and isinstance(self.sampler, AllSubsets):
            raise ConfigError(
                "the passes of all subsets of some players", "their number", "ask passes(q) of a question"
            )
        players = 10_000 if q is None else self.game(q).players
        every = max(0, 2**players - 2)
        count = self.sampler.coalitions(players, max(1, samples - int(self.with_x)))
        return self.passes_of(min(every, runs * count), exact=False)

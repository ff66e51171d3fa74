"""BayLIME."""

from __future__ import annotations

from dataclasses import dataclass

from apportion.core.card import Card, Kind, Paper, Principle
from apportion.core.explainer import Explainer
from apportion.core.registry import register
from apportion.methods.surrogate.lime import CLAIMS, FAMILIES, LIME, NOISY
from apportion.parts.surrogate.regressions import BayesianRidge, Regression
from apportion.parts.surrogate.trust import Trust

CARD = Card(
    title="BayLIME",
    paper=Paper(
        "Zhao, Huang, Huang, Robu, Flynn",
        2021,
        "BayLIME: Bayesian local interpretable model-agnostic explanations",
        "UAI, arXiv:2012.03058",
    ),
    kind=Kind.SALIENCE,
    intent="LIME with a prior on the weights: their posterior mean, and how sure it is.",
    cost="as LIME",
    families=FAMILIES,
    claims=CLAIMS,
    measured={**NOISY, Principle.LINEARITY: False},
    exact_cost=False,
    cautions=(
        "The posterior takes the score for linear with normal noise; where it is curved, deviations are no coverage.",
        "A prior that is sure of itself is what the map shows.",
        "The intercept has no distribution.",
        "Depends on the score's unit: the same score in another is shrunk otherwise. Precisions that are given are in "
        "it, and so are hyperpriors and stopping rule of learned ones, felt where scores are far below 1.",
    ),
)


@register(CARD)
@dataclass(frozen=True)
class BayLIME(LIME):
    """Posterior means of LIME's coefficients under a normal prior; Zhao et al. 2021.

    `BayesianRidge()` learns both precisions from the samples, `BayesianRidge(mean, weight_precision)` only that of the
    noise (partial prior), and with `noise_precision` besides none (full prior). `parts` are LIME's, where
    `standard_error` is the posterior's deviation, with `posterior_variance`, both precisions and the `rounds` taken.

    Attributes:
        regression: the prior.

    >>> import torch, apportion as ap
    >>> sure = ap.surrogates.BayesianRidge(0.5, weight_precision=1e9, noise_precision=1.0)
    >>> ap.BayLIME(regression=sure, samples=20)(ap.Field(lambda x: x.sum(1)), torch.ones(1, 2)).values
    tensor([[0.5000, 0.5000]])
    """

    regression: Regression = BayesianRidge()

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        prior = BayesianRidge(0.0, weight_precision=1.0)
        return cls(samples=24, trust=Trust(reruns=1)), cls(samples=24, regression=prior, trust=Trust(reruns=1))

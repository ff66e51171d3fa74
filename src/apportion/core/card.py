"""Cards: what a method claims, who claims it, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum


class Kind(Enum):
    """The question a method answers (Ancona et al. 2019, section 2.2); the two are not comparable."""

    SENSITIVITY = "sensitivity"
    SALIENCE = "salience"

    @property
    def question(self) -> str:
        """The question in words."""
        return _QUESTIONS[self]

    @property
    def unit(self) -> str:
        """What such values are in, unless a method says otherwise."""
        return "score per unit of input" if self is Kind.SENSITIVITY else "score"


_QUESTIONS = {
    Kind.SENSITIVITY: "Where would a change of the input change the score?",
    Kind.SALIENCE: "What in the input made up the score's value?",
}


class Family(Enum):
    """Families of formulation (F) and of reformulation (R) of Deng et al. 2025."""

    MODIFIED_GRADIENT = "modified gradient (F)"
    GRADIENT_TIMES_INPUT = "gradient × input (F)"
    LAYERWISE_BACKPROPAGATION = "layer-wise backpropagation (F)"
    PERTURBATION = "perturbation (F)"
    INFLUENTIAL_SUBSET = "influential subset (F)"
    LOCAL_SURROGATE = "local surrogate (F)"
    ATTENTION = "attention (F)"
    ADDITIVE = "feature additive (R)"
    MODIFIED_GRADIENT_TIMES_INPUT = "modified gradient × input (R)"
    GAME = "cooperative game (R)"
    PATH = "path (R)"
    NONNEGATIVE_BACKPROPAGATION = "non-negative backpropagation (R)"
    REMOVAL = "feature removal (R)"
    TAYLOR = "Taylor interaction (R)"


class Principle(Enum):
    """Principles a method may satisfy; those with a check in `apportion.testing` are measured."""

    COMPLETENESS = "values sum to f(x) - f(x')"
    SENSITIVITY = "a feature that alone differs from the baseline and changes f gets a non-zero value"
    DUMMY = "a feature that f ignores gets zero"
    LINEARITY = "values of a f + b g are a times those of f plus b times those of g"
    SYMMETRY = "features that f treats alike, with equal values and baselines, get equal values"
    IMPLEMENTATION_INVARIANCE = "networks that are equal as functions get equal values"
    SHIFT_INVARIANCE = "values do not change when input and first bias are shifted against each other"
    DECISION_RELEVANCE = "the map depends on the class that is explained"
    OUTPUT_SENSITIVITY = "the map depends on the output"
    PARAMETER_SENSITIVITY = "the map depends on the parameters of every layer"
    LOCAL_ACCURACY = "values and f at the empty input sum to f(x)"
    MISSINGNESS = "a missing feature gets zero"
    CONSISTENCY = "a larger marginal contribution never gets a smaller value"
    ALLOCATION_FIDELITY = "independent and interaction effects go, whole, to the features that cause them"
    INPUT_ROBUSTNESS = "similar inputs with similar outputs get similar maps"
    MODEL_ROBUSTNESS = "similar models get similar maps"


class Total(StrEnum):
    """What the values of a method claim to sum to; each member is its own wording, empty for nothing."""

    NOTHING = ""
    DIFFERENCE = "f(x) - mean f(x')"
    VALUE = "f(x)"
    VALUE_LESS_PARTS = "f(x) - the parts, each a share of f(x) of its own"
    OF_BASE = "the mean of what the base claims"
    REDUCTION = "mean f(x') - f(x)"
    ONE = "1"


@dataclass(frozen=True)
class Paper:
    """A publication: authors, year, title, where."""

    authors: str
    year: int
    title: str
    where: str

    def __str__(self) -> str:
        return f"{self.authors} ({self.year}). {self.title}. {self.where}."


@dataclass(frozen=True)
class Claim:
    """What a source says of a principle: it holds, or it is violated."""

    principle: Principle
    holds: bool
    source: str


class Need(Enum):
    """What a method asks of the model or the data."""

    SPATIAL = "an inner layer with spatial axes"
    RELU = "a network without activations other than ReLU and ReLU6"
    NONNEGATIVE = "inputs that are not negative"
    DATA = "examples to learn from first"
    VECTORS = "examples that are rows of features, without further axes"
    LOSS = "a loss as score, and labels"


@dataclass(frozen=True)
class Card:
    """The record of a method.

    Attributes:
        title: its usual name.
        paper: where it was published.
        kind: the question it answers; None for wrappers, which answer their base's.
        intent: one sentence.
        families: where surveys place it.
        claims: what sources say.
        unjudged: why the survey whose verdicts `claims` give (Deng et al. 2025, Tables VI and VII) has none on it.
        measured: what the conformance suite finds on planted models, both ways.
        cost: its passes per example in words; `explainer.passes()` gives the numbers.
        exact_cost: whether the numbers are exact or an upper bound.
        needs: what it asks for.
        differentiable: whether the attribution can be differentiated with respect to the input.
        total: what the values claim to sum to.
        signed: whether a positive value raises the score and a negative one lowers it.
        scored: whether the values depend on the score that is explained.
        unit: what the values are in, empty for numbers without one; None where the kind tells, or a wrapper's base.
        cautions: known failings, to be shown beside results.
    """

    title: str
    paper: Paper
    kind: Kind | None
    intent: str
    cost: str
    families: tuple[Family, ...] = ()
    claims: tuple[Claim, ...] = ()
    unjudged: str = ""
    measured: Mapping[Principle, bool] = field(default_factory=dict)
    exact_cost: bool = True
    needs: frozenset[Need] = frozenset()
    differentiable: bool = False
    total: Total = Total.NOTHING
    signed: bool = True
    scored: bool = True
    unit: str | None = None
    cautions: tuple[str, ...] = ()

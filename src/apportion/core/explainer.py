"""Explainers: frozen recipes from a question to an attribution."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch

from apportion.core.attribution import Attribution
from apportion.core.card import Card, Kind
from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, kind_of
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.score import Target
from apportion.core.tree import Tree


class Passes(NamedTuple):
    """Rows evaluated per example.

    Attributes:
        forward: rows sent forward.
        backward: rows sent backward.
        at_x: 1 where f(x) itself is needed besides; free where choosing the target already gave it.
        once: further rows forward that a wrapper does not repeat, such as those at the baselines.
        once_backward: further rows backward likewise, such as those of a search for a baseline.
        exact: whether the numbers are exact for each example; upper bounds otherwise.
    """

    forward: int
    backward: int
    at_x: int = 0
    once: int = 0
    once_backward: int = 0
    exact: bool = True


@dataclass(frozen=True)
class Explainer(Configurable):
    """Base of the methods; a subclass is a frozen dataclass of parts with a Card and an `explain`."""

    example: ClassVar[str] = "ap.Gradient()"

    card: ClassVar[Card]

    def __call__(
        self,
        field: Field,
        x: Tree,
        *,
        target: Target = None,
        ids: Sequence[Any] | None = None,
        seed: int = 0,
        differentiable: bool = False,
    ) -> Attribution:
        """Explain the field at x.

        Args:
            field: what is asked of which model.
            x: examples on the first axis.
            target: the output explained; None for each example's own top class.
            ids: names of the examples, which key their random numbers; None uses their content.
            seed: of all random numbers.
            differentiable: keep the graph of the values back to x, for methods that declare they have one.

        Returns:
            Values on the field's site; positive raises the score.

        Raises:
            ConfigError: `differentiable` for a method that is not.
        """
        if differentiable and not self.differentiable:
            raise ConfigError(
                f"differentiable=True for {type(self).__name__}",
                "a method that is, by its Card",
                "use a method with card.differentiable, or leave it out",
            )
        if not isinstance(field, Field):
            raise ConfigError(f"{kind_of(field)} as field", "an ap.Field", "write ap.Field(model), or ap.explain")
        with torch.inference_mode(False):
            return self.explain(field.bind(x, target=target, ids=ids, seed=seed, differentiable=differentiable))

    @abstractmethod
    def explain(self, q: Question) -> Attribution:
        """Answer a bound question; wrappers call this of their base on derived questions."""

    @abstractmethod
    def passes(self, q: Question | None = None) -> Passes:
        """Count the rows evaluated per example: exact, or at most, as the Card says.

        Args:
            q: the question, for methods whose passes depend on the input, such as on its number of regions.
        """

    def fitted(self, field: Field, data: Tree) -> Explainer:
        """Give this explainer with what it must learn from data, as most have nothing to learn: itself.

        Args:
            field: what will be explained.
            data: examples like those to be explained.
        """
        base = getattr(self, "base", None)
        if not isinstance(base, Explainer):
            return self
        ready = base.fitted(field, data)
        return self if ready is base else replace(self, base=ready)  # pyright: ignore[reportCallIssue]

    def asks(self, q: Question) -> Iterable[Hashable]:
        """Name what this method asks that another one may ask too, so that a call with both makes it once.

        `AtX` stands for a pass at the examples; other keys are those of `Question.share`, by value, and of `once`, as
        ("once", key). What is not named is asked alone, with the same outcome.

        Args:
            q: the question it will be asked.
        """
        return ()

    @property
    def together(self) -> Hashable | None:
        """Name the passes that methods of the same name make together, by `explain_all`; None for none."""
        return None

    def explain_all(
        self, members: Sequence[tuple[Explainer, Question]], q: Question
    ) -> Sequence[Attribution | Exception]:
        """Answer for methods that have the same `together`, each as it would alone.

        Args:
            members: the methods, each with the question it is asked.
            q: the same question, for the passes they have in common; they are then charged its account.

        Returns:
            For each what it gave, or how it failed.
        """
        raise NotImplementedError

    @property
    def kind(self) -> Kind:
        """The question answered: the Card's, or the base's for a wrapper."""
        if self.card.kind is not None:
            return self.card.kind
        base = getattr(self, "base", None)
        return base.kind if isinstance(base, Explainer) else Kind.SENSITIVITY

    @property
    def unit(self) -> str:
        """What values are in, empty without a unit: by the Card, or by the base of a wrapper, or else by the kind."""
        card, base = getattr(type(self), "card", None), getattr(self, "base", None)
        if card is not None and card.unit is not None:
            return card.unit
        if card is not None and card.kind is None and isinstance(base, Explainer):
            return base.unit
        return self.kind.unit

    @property
    def cautions(self) -> tuple[str, ...]:
        """Known failings: the Card's, and those of the base of a wrapper; none without a Card."""
        base = getattr(self, "base", None)
        inner = base.cautions if isinstance(base, Explainer) else ()
        own = self.card.cautions if hasattr(type(self), "card") else ()
        return (*own, *inner)

    @property
    def signed(self) -> bool:
        """Whether a positive value raises the score and a negative one lowers it: by the Card, and the base's."""
        base = getattr(self, "base", None)
        return self.card.signed and (not isinstance(base, Explainer) or base.signed)

    @property
    def differentiable(self) -> bool:
        """Whether values can be differentiated with respect to x: by the Card, and the base's."""
        base = getattr(self, "base", None)
        return self.card.differentiable and (not isinstance(base, Explainer) or base.differentiable)

    @classmethod
    def variants(cls) -> tuple[Explainer, ...]:
        """Configurations the conformance suite runs, each a few hundred times: small ones cover as much.

        The default one is held to its cost, its claims and its principles, whether it stands here or not, unless it
        takes more than 300 passes; then only what stands here is.
        """
        return (cls(),)

"""Questions: a field asked about bound examples; everything is evaluated on rows with owners."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution, Domain, References
from apportion.core.calls import join, take
from apportion.core.config import to_config
from apportion.core.errors import SiteError
from apportion.core.evaluation import Evaluation
from apportion.core.field import Field, check_score
from apportion.core.looks import Looks
from apportion.core.precision import widened
from apportion.core.protocols import Answering, Owner
from apportion.core.referenced import Referenced
from apportion.core.score import Target
from apportion.core.site import Input, Site
from apportion.core.tree import Tree


class Question(Evaluation, Looks, Referenced):
    """A field bound to examples.

    Attributes:
        field: what is asked of which model.
        x: the examples at the field's site, [B, ...].
        inputs: the examples at the model's input.
        target: the resolved target, one row per example.
        asked: the target as the user gave it.
        seed: of all random numbers.
        differentiable: whether results keep their graph back to the user's x.
    """

    @classmethod
    def bind(
        cls, field: Field, x: Tree, target: Target, ids: Sequence[Any] | None, seed: int, differentiable: bool
    ) -> Question:
        """Resolve everything that is fixed for good; see `Field.bind`."""
        self = cls.begin(field, x, ids, seed, differentiable)
        self.asked = target
        batch = len(self)
        checked = self._checked = field.check_model(self)
        outputs: list[Any] = []
        if not isinstance(field.site, Input):
            self.x, outputs = self._read_site(self.inputs)
        known = outputs[0] if outputs else None

        def all_outputs() -> Any:
            nonlocal known
            if known is None:
                known = self._outputs(self.inputs, self._owners(), counted="at_x", at_input=True)
            return known

        target = field.score.resolve(target, checked.read, all_outputs, batch)
        self.target = None if target is None else tree.apply(tree.ordinary, target)
        check_score(self, checked)
        if caution := field.score.caution(checked.read):
            self.warn(caution)
        if known is not None:
            self._at_x = self._scored(field.score, known, self._owners())
            self._assert_finite(self._at_x, "the score", self._owners())
        field.check_precision(self)
        return self

    def _read_site(self, inputs: Tree) -> tuple[Tensor, list[Any]]:
        site = self.field.site

        def body(rows: Tree, owner: Tensor) -> tuple[Tensor, Any]:
            read = [site] if self.field.score.site is None else [site, self.field.score.site]
            with torch.set_grad_enabled(self.differentiable):
                outputs, values = self._call(self._normalized(rows), owner, read)
            return values[site], outputs if self.field.score.site is None else values[self.field.score.site]

        found = self._chunks(body, inputs, self._owners(), {"at_x": 1})
        value = torch.cat([f[0] for f in found])
        if value.shape[0] != len(self):
            raise SiteError(
                f"{site} has {value.shape[0]} rows for {len(self)} example(s)",
                "examples on the site's first axis",
                "choose a site before the examples are merged or reshaped",
            )
        if not value.is_floating_point():
            raise SiteError(f"{site} holds {value.dtype}", "floating point", "explain at a later site")
        return value if self.field.is_full else widened(value), [join([f[1] for f in found])]

    def at(self, rows: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Question:
        """Ask the same about derived rows, each an example of its own with its owner's target.

        Args:
            rows: points at the field's site.
            owner: the example each row belongs to.
            draw: a number that tells the rows of one owner apart, for their random streams.

        Returns:
            A question whose costs and warnings are this one's.
        """
        new = Question()
        new.field, new.seed, new.differentiable = self.field, self.seed, self.differentiable
        new.x = rows if self.differentiable else tree.apply(torch.Tensor.detach, rows)
        new.inputs, new._runner = self.inputs, self._runner
        new.target = take(self.target, owner)
        new._ids, new._of, new._in_root = None, self._root, self._in_root[owner]
        new._home, new._in_home = self.home, self._in_home[owner]
        new._references = new._home._references
        outer = self.stream
        new._stream = lambda purpose: outer(purpose).derive(owner, draw)
        return new

    def anew(self, rows: Tree, owner: Owner, draw: Int[Tensor, " R"]) -> Question:
        """Ask as `at` does, with baselines made for these rows and not for their owners, as if they were the user's.

        So a map of x + δ is compared with the blur of x + δ, or with the nearest adversarial point of it.

        Args:
            rows: as for `at`.
            owner: whose target each has.
            draw: tells them apart.
        """
        new = self.at(rows, owner, draw)
        new._home, new._in_home, new._references = None, new._owners(), {}
        return new

    def inside(self, site: Site) -> Question:
        """Ask the same about the same examples at an inner site, whose values there are then its x.

        One row forward for each; its costs and warnings are this one's.

        Raises:
            SiteError: a site without one row per example.
        """
        if not isinstance(self.field.site, Input):
            raise SiteError(
                f"{site} inside a question about {self.field.site}",
                "a field at the model's input",
                "leave site= out of the field",
            )
        owner = self._owners()
        x = self.tap(self.x, owner, [site], grad=False)[1][site].value
        if x.shape[0] != len(self):
            raise SiteError(
                f"{site} has {x.shape[0]} rows for {len(self)} example(s)",
                "examples on the site's first axis",
                "choose a site before the examples are merged or reshaped",
            )
        new = self.at(self.x, owner, torch.zeros_like(owner))
        new.x, new.below, new._stream = x, self.x, self.stream
        new.field = copy.copy(self.field)
        new.field.site = site
        return new

    def attribution(
        self,
        explainer: Answering,
        values: Tree,
        *,
        claimed_total: Tensor | None = None,
        domain: Domain | None = None,
        value: Tensor | None = None,
        references: References | None = None,
        parts: Mapping[str, Tree] | None = None,
        groups: Tree = None,
    ) -> Attribution:
        """Wrap values with everything this question knows.

        Args:
            explainer: whose values they are.
            values: one number per element of the domain.
            claimed_total: what they should sum to; dropped for a sensitivity.
            domain: the field's site unless given.
            value: f(x), where the method's own passes gave it.
            references: the baselines used.
            parts: named companions.
            groups: the labels of values on groups.
        """
        if value is not None:
            self._at_x = value
        value = self.fx
        tensors: dict[str, Tensor] = {}
        root = self is self._root
        for leaf in tree.leaves(values):
            if leaf.is_floating_point() and leaf.shape[0] == len(self):
                self._assert_finite(leaf, "the attribution", self._owners())
        site, engine = self.field.site, self.field.engine if root else {}
        if engine.get("compiled") == []:
            rows = self.field.chunk
            self.warn(
                "compile=True has compiled nothing: there was no pass without gradient of "
                f"{-(-rows // 2):,} to {rows:,} rows; give a batch_size that the method fills, or leave compile out "
                "where it has no such passes"
            )
        return Attribution(
            values=values,
            kind=explainer.kind,
            unit=explainer.unit,
            domain=domain or (Domain.INPUT if isinstance(site, Input) else Domain.SITE),
            value=value,
            claimed_total=claimed_total,
            cost=self.cost,
            method=to_config(explainer, tensors) if root else {},
            score=to_config(self.field.score, tensors) if root else {},
            site=to_config(site, tensors) if root else {},
            target=_shown(self.target),
            seed=self.seed,
            warnings=self.warnings,
            cautions=explainer.cautions,
            parts=dict(parts or {}),
            references=references,
            tensors=tensors,
            engine=engine | self._told_of_rules() if root else {},
            groups=groups,
        )

    def _told_of_rules(self) -> dict[str, Any]:
        return {"deviation_under_rules": self._under_rules} if self._under_rules else {}


def _shown(target: Tree) -> Tree:
    """Show targets of one index each as [B]."""
    one_index = isinstance(target, Tensor) and target.ndim == 2 and target.shape[1] == 1
    return target.squeeze(1) if one_index else target

"""Attributions: values with everything needed to judge and to repeat them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from html import escape
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.card import Kind
from apportion.core.config import Json, from_config, is_reproducible
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.tree import Tree
from apportion.core.write import read_tensors, write_tensors


class Domain(Enum):
    """What the values are attached to."""

    INPUT = "input"
    SITE = "site"
    GROUPS = "groups"
    TOKENS = "tokens"
    COALITIONS = "coalitions"
    GLOBAL = "global"


@runtime_checkable
class Groups(Protocol):
    """A partition of the elements into players."""

    def labels(self, like: Tree) -> Tree:
        """Name each element's player: integers [1 | B, ...] that broadcast to `like`; -1 is in no group."""
        ...


@dataclass(frozen=True, eq=False)
class Cost:
    """Rows spent on each example.

    Attributes:
        forward: rows sent forward by the method.
        backward: rows sent backward by it.
        at_x: rows spent on f(x), the target and the site's own value.
        checks: rows spent once per field on checking the model.
        shared: those among all these rows that an earlier method of the same call had spent, so that this one did
            not; None where there are none.
        shared_with: in `shared`, these methods.
    """

    forward: Int[Tensor, " B"]
    backward: Int[Tensor, " B"]
    at_x: Int[Tensor, " B"]
    checks: int = 0
    shared: Cost | None = None
    shared_with: tuple[str, ...] = ()

    @property
    def own(self) -> Cost:
        """The rows spent for this result alone: all but the shared ones; over a call's results they sum to the passes.

        >>> one = torch.tensor([1])
        >>> Cost(3 * one, one, one, shared=Cost(2 * one, one, 0 * one, shared_with=("Gradient",))).own.forward
        tensor([1])
        """
        less = self.shared
        if less is None:
            return self
        rows = (getattr(self, n) - getattr(less, n) for n in ("forward", "backward", "at_x"))
        return Cost(*rows, checks=self.checks - less.checks)


@dataclass(frozen=True, eq=False)
class References:
    """The baselines an explanation was made against, k per example.

    Attributes:
        value: the target's score there.
        top_class: the highest output there, or None where outputs are not classes.
        equal_share: the share of features equal to the baseline, which get 0 by construction.
        rows: the baselines themselves, [B, k, ...].
    """

    value: Float[Tensor, "B k"]
    top_class: Int[Tensor, "B k"] | None
    equal_share: Float[Tensor, "B k"]
    rows: Tree


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """The result of every explainer.

    Attributes:
        values: one number per element of the domain, examples first; positive raises the score.
        kind: the question answered.
        domain: what the values are attached to.
        value: f(x).
        claimed_total: what the method says the values sum to, one number for each map; None for nothing.
        parts: named companions: standard errors, split halves, maps per baseline.
        references: the baselines used; None without.
        cost: rows spent.
        method: the explainer's configuration.
        score: the score's configuration.
        site: the site's configuration.
        target: the resolved target of each example.
        seed: of all random numbers.
        warnings: what deserves a look.
        cautions: known failings of the method, from its Card.
        postprocessing: what was done to the values afterwards, in order.
        tensors: tensors the configurations name by digest.
        engine: how the passes ran: in which precision, with what folded, how far from float32.
        unit: what the values are in, empty for numbers without a unit; None for what the kind implies.
        groups: of values on groups, which element is in which: integers [1 | B, ...] shaped as the input, -1 for none.
    """

    values: Tree
    kind: Kind
    domain: Domain
    value: Float[Tensor, " B"]
    claimed_total: Float[Tensor, " T"] | None
    cost: Cost
    method: Json
    score: Json
    site: Json
    target: Any
    seed: int
    warnings: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()
    parts: Mapping[str, Tree] = field(default_factory=dict)
    references: References | None = None
    postprocessing: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    unit: str | None = None
    groups: Tree = None

    def __post_init__(self) -> None:
        if self.kind is Kind.SENSITIVITY and self.claimed_total is not None:
            raise ConfigError(
                "a claimed total for a sensitivity",
                "None: sensitivities do not sum to anything",
                "give the Card kind=Kind.SALIENCE, or leave claimed_total out",
            )

    @property
    def gap(self) -> Float[Tensor, " B"] | None:
        """Sum of the values minus what they claim to sum to, in units of the score; None if nothing is claimed."""
        return None if self.claimed_total is None else tree.total(self.values) - self.claimed_total

    @property
    def relative_gap(self) -> Float[Tensor, " B"] | None:
        """|gap| over |claimed total|; infinite where that is 0 and the gap is not; None without a claim."""
        if self.claimed_total is None or self.gap is None:
            return None
        size = self.claimed_total.abs()
        return torch.where(self.gap == 0, torch.zeros_like(size), self.gap.abs() / size)

    @property
    def gap_note(self) -> str:
        """The gap in words, or why there is none."""
        if self.kind is Kind.SENSITIVITY:
            return "not applicable: a sensitivity does not sum to the score"
        if self.gap is None or self.relative_gap is None:
            if self.postprocessing:
                return f"not applicable after {self.postprocessing[-1]}"
            return "not applicable: the method claims no total"
        worst = int(self.gap.abs().argmax())
        return f"at most {self.gap.abs()[worst]:.3g} ({self.relative_gap[worst]:.2%} of the claimed total)"

    @property
    def reproducible(self) -> bool:
        """Whether the stored configurations hold no user code."""
        return is_reproducible(self.method) and is_reproducible(self.score) and is_reproducible(self.site)

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        name = self.method.get("type", "?") if isinstance(self.method, dict) else "?"
        shapes = [tuple(leaf.shape) for leaf in tree.leaves(self.values)]
        lines = [
            f"Attribution by {name} ({self.kind.value}) of {len(self)} example(s), {self.domain.value} {shapes}",
            f"  value {[round(v, 4) for v in self.value[:5].tolist()]}{' ...' if len(self) > 5 else ''}",
            f"  gap {self.gap_note}",
            f"  passes per example: {int(self.cost.forward.max())} forward, {int(self.cost.backward.max())} backward",
        ]
        if (less := self.cost.shared) and bool((less.forward + less.backward).any()):
            rows = f"{int(less.forward.max())} forward, {int(less.backward.max())} backward"
            lines.append(f"  of which shared with {', '.join(less.shared_with)}: {rows}")
        lines += [f"  after: {' → '.join(self.postprocessing)}"] if self.postprocessing else []
        lines += [f"  warning: {w}" for w in self.warnings]
        lines += [f"  caution: {c}" for c in self.cautions]
        return "\n".join(lines)

    def explainer(self) -> Any:
        """Rebuild the explainer from the record.

        Raises:
            ConfigError: it holds user code.
        """
        return from_config(self.method, dict(self.tensors))

    # -- pictures: the room is imported when it is asked for, so that Pillow and Matplotlib stay optional ----

    def show(self, x: Tensor | None = None, **options: Any) -> Any:
        """Draw the values as signed maps, and over the pictures they explain where those are given.

        Args:
            x: the explained pictures, [B, 1 | 3, H, W] in [0, 1].
            **options: `colors`, `percentile`, `opacity` and `most`; see `apportion.show.figure.show`.

        Returns:
            A Pillow image, which notebooks display and `.save(path)` writes.

        Raises:
            ConfigError: the image extra is not installed.
            InputError: the values are no map of a picture.
        """
        from apportion.show.figure import show

        return show(self, x, **options)

    def _repr_html_(self) -> str:
        try:
            from apportion.show.report import html_of
        except ConfigError:  # without the extra, text
            return f"<pre>{escape(repr(self))}</pre>"
        return html_of(self)

    # -- reductions, each a new object ------------------------------------------------------------

    def _after(self, note: str, values: Tree, *, keeps_total: bool, domain: Domain | None = None) -> Attribution:
        return replace(
            self,
            values=values,
            domain=domain or self.domain,
            claimed_total=self.claimed_total if keeps_total else None,
            parts={},
            postprocessing=(*self.postprocessing, note),
        )

    def abs(self) -> Attribution:
        """Take magnitudes; nothing is claimed of their sum."""
        return self._after("abs", tree.apply(torch.abs, self.values), keeps_total=False)

    def channel_sum(self, axis: int = 1) -> Attribution:
        """Sum over the channel axis, which stays with length 1; totals are kept."""
        return self._after(
            f"channel_sum({axis})",
            tree.apply(lambda v: v.sum(self._axis(axis, v), keepdim=True), self.values),
            keeps_total=True,
        )

    def channel_max_abs(self, axis: int = 1) -> Attribution:
        """Take the largest magnitude over the channel axis (Simonyan et al. 2013)."""
        return self._after(
            f"channel_max_abs({axis})",
            tree.apply(lambda v: v.abs().amax(self._axis(axis, v), keepdim=True), self.values),
            keeps_total=False,
        )

    @staticmethod
    def _axis(axis: int, values: Tensor) -> int:
        if not 0 < axis < values.ndim:
            raise InputError(
                f"axis {axis} of values of shape {tuple(values.shape)}",
                f"1 to {values.ndim - 1}",
                "name the axis of the channels, 1 for pictures",
            )
        return axis

    def pool(self, groups: Groups) -> Attribution:
        """Sum the values of each group, which makes regions the unit; totals are kept if all is in a group.

        Args:
            groups: the partition; groups of one number may span several inputs.

        Returns:
            Values [B, players].

        Raises:
            InputError: something that is no partition, or does not fit.
        """
        if not isinstance(groups, Groups):
            raise InputError(
                f"{kind_of(groups)} as groups",
                "one of ap.groups",
                "write ap.groups.Labels(tensor) for labels of your own",
            )
        sums: Tensor | None = None
        labels = [
            torch.as_tensor(one).to(v.device).expand(len(one), *v.shape[1:])
            for one, v in zip(tree.leaves(groups.labels(self.values)), tree.leaves(self.values), strict=True)
        ]
        players = 1 + max(int(one.max()) for one in labels)
        covered = all(bool((one >= 0).all()) for one in labels)
        for one, v in zip(labels, tree.leaves(self.values), strict=True):
            flat = one.expand_as(v).flatten(1)
            part = v.new_zeros(len(v), players + 1).scatter_add_(1, flat.masked_fill(flat < 0, players), v.flatten(1))
            sums = part if sums is None else sums + part
        assert sums is not None  # a tree has a leaf
        done = self._after("pool", sums[:, :players], keeps_total=covered, domain=Domain.GROUPS)
        return replace(done, groups=tree.rebuild(self.values, labels))

    def spread(self, *, share: bool = False) -> Attribution:
        """Give each element the value of its group; 0 to elements in none.

        Args:
            share: divide by the number of elements of the group, which keeps totals.

        Returns:
            Values shaped as what was explained; as one example, of values of all examples together.

        Raises:
            InputError: values that are not on groups.

        >>> import apportion as ap
        >>> field, halves = ap.Field(lambda x: x.sum(1)), ap.groups.Labels(torch.tensor([0, 0, 0, 1]))
        >>> a = ap.Gradient()(field, torch.ones(1, 4)).pool(halves)
        >>> a.values, a.spread(share=True).values
        (tensor([[3., 1.]]), tensor([[1., 1., 1., 1.]]))
        """
        if self.groups is None or not isinstance(self.values, Tensor):
            raise InputError(
                f"values on the domain {self.domain.value!r}",
                "values on groups, with their labels",
                "give a method groups=..., or pool values first",
            )
        values = self.values

        def laid(label: Tensor) -> Tensor:
            flat = label.expand(len(values), *label.shape[1:]).flatten(1)
            return flat.masked_fill(flat < 0, values.shape[1])

        flat = [laid(label) for label in tree.leaves(self.groups)]
        if share:
            size = values.new_zeros(len(values), values.shape[1] + 1)
            for f in flat:
                size.scatter_add_(1, f, torch.ones_like(f, dtype=size.dtype))
            values = values / size[:, :-1].clamp(min=1)
        padded = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
        pairs = zip(flat, tree.leaves(self.groups), strict=True)
        maps = [padded.gather(1, f).reshape(len(f), *label.shape[1:]) for f, label in pairs]
        note = "spread(share=True)" if share else "spread"
        at_input = self.site in ({}, {"type": "Input"})
        domain = Domain.INPUT if at_input else Domain.SITE
        domain = Domain.GLOBAL if self.domain is Domain.GLOBAL else domain
        done = self._after(note, tree.rebuild(self.groups, maps), keeps_total=share, domain=domain)
        return replace(done, groups=None)

    def resize(self, size: tuple[int, ...]) -> Attribution:
        """Interpolate maps on a site's grid to another size, bilinearly; nothing is claimed of their sum.

        Args:
            size: positive ints, one for each spatial axis.

        Raises:
            InputError: another size, or values that are no maps of as many axes.
        """
        whole = isinstance(size, tuple | list) and all(isinstance(n, int) and not isinstance(n, bool) for n in size)
        if not whole or not size or min(size) < 1:
            raise InputError(
                f"resize({size!r})", "a tuple of positive ints, one per spatial axis", "write a.resize((224, 224))"
            )

        def grow(v: Tensor) -> Tensor:
            v = v[:, None] if v.ndim == len(size) + 1 else v
            if v.ndim != len(size) + 2 or len(size) not in (1, 2):
                raise InputError(
                    f"values of shape {tuple(v.shape)} to size {size}",
                    "maps with 1 or 2 spatial axes",
                    "give one number per spatial axis, as in a.resize((224, 224))",
                )
            return F.interpolate(v, size, mode="bilinear" if len(size) == 2 else "linear", align_corners=False)

        return self._after(f"resize{size}", tree.apply(grow, self.values), keeps_total=False)

    def to(self, device: torch.device | str) -> Attribution:
        """Move every tensor to a device."""
        return self._moved(lambda t: t.to(device))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Attribution:
        def go(value: Any) -> Any:
            if isinstance(value, Tensor):
                return move(value)
            if isinstance(value, Cost | References):
                return replace(value, **{f.name: go(getattr(value, f.name)) for f in fields(value)})
            if isinstance(value, dict | tuple | list):
                return tree.apply(go, value)
            return value

        names = ("values", "value", "claimed_total", "cost", "references", "parts", "target", "groups")
        return replace(self, **{n: go(getattr(self, n)) for n in names})

    # -- storage ----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with the record in its header, whole or not at all.

        Named tuples are stored by position: `load` gives plain tuples in their place, since reading a file
        builds no classes of the user's.

        Raises:
            OutputError: the directory is missing or may not be written to, or the disk is full.
        """
        tensors: dict[str, Tensor] = {}

        def put(value: Any, name: str) -> Any:
            if isinstance(value, Tensor):
                name = f"{len(tensors)} {name}"  # keys of trees may hold slashes
                tensors[name] = value
                return {"tensor": name}
            if isinstance(value, Enum):
                return value.value
            if isinstance(value, Cost | References):
                return {f.name: put(getattr(value, f.name), f"{name}/{f.name}") for f in fields(value)}
            if isinstance(value, Mapping):
                return {"dict": {k: put(v, f"{name}/{k}") for k, v in value.items()}}
            if isinstance(value, tuple | list):
                kind = "tuple" if isinstance(value, tuple) else "list"
                return {kind: [put(v, f"{name}/{i}") for i, v in enumerate(value)]}
            return value

        plain = ("method", "score", "site")
        record = {f.name: put(getattr(self, f.name), f.name) for f in fields(self) if f.name not in plain}
        record |= {n: getattr(self, n) for n in plain}
        write_tensors(path, tensors, {"apportion": {"version": 1, **record}})

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Read a file written by `save`; nothing in it is executed.

        Raises:
            ConfigError: the file is not one of ours.
        """
        record, tensors = read_tensors(path, "apportion", "Attribution.save")
        try:
            return cls._from_record(record, tensors, str(path))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{path} has a damaged record ({type(error).__name__}: {error})",
                "a file written by Attribution.save",
                "write the result again with a.save(path)",
            ) from error

    @classmethod
    def _from_record(cls, record: Any, tensors: dict[str, Tensor], path: str) -> Attribution:
        version = record.pop("version")
        if version != 1:
            raise ConfigError(f"{path} has format version {version}", "version 1", "use a newer release to read it")

        def take(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            if "tensor" in value:
                return tensors[value["tensor"]]
            for kind, make in (("tuple", tuple), ("list", list)):
                if kind in value:
                    return make(take(v) for v in value[kind])
            if "dict" in value:
                return {k: take(v) for k, v in value["dict"].items()}
            return {k: take(v) for k, v in value.items()}

        plain = ("method", "score", "site")
        out = {k: v if k in plain else take(v) for k, v in record.items()}
        out["kind"], out["domain"] = Kind(out["kind"]), Domain(out["domain"])
        less = out["cost"].pop("shared", None)
        out["cost"] = Cost(**out["cost"], shared=Cost(**less) if less else None)
        out["references"] = None if out["references"] is None else References(**out["references"])
        return cls(**out)

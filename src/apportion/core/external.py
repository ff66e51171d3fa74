"""Maps and explainers from elsewhere, in the form of ours, so that everything that judges ours judges them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution
from apportion.core.card import Kind
from apportion.core.errors import ConfigError, InputError, kind_of
from apportion.core.explainer import Explainer, Passes
from apportion.core.question import Question


@dataclass(frozen=True, eq=False)
class Unregistered(Explainer):
    """An explainer without a Card: what it answers is said by its maker, and nothing is claimed of it."""

    @property
    def kind(self) -> Kind:
        """The question answered; salience unless said otherwise."""
        return Kind(getattr(self, "answers", "salience"))

    @property
    def unit(self) -> str:
        """No unit is known."""
        return ""

    @property
    def cautions(self) -> tuple[str, ...]:
        """None are known here."""
        return ()

    @property
    def signed(self) -> bool:
        """Taken as signed, since nothing says otherwise."""
        return True

    @property
    def differentiable(self) -> bool:
        """Not as far as is known."""
        return False

    def passes(self, q: Question | None = None) -> Passes:
        """Count f(x), which stands beside the map; what makes that is not known here."""
        return Passes(0, 0, 1)


@dataclass(frozen=True, eq=False)
class GivenMap(Unregistered):
    """A map that was made elsewhere: by another library, or read from a file.

    Attributes:
        values: [B, ...], shaped as the input; or [B, 1, ...] or [B, ...] without the channel axis of pictures.
        name: what results call it.
        answers: what values say: what the score is made of (salience), or how it changes (sensitivity).

    Raises:
        ConfigError: values that are no floating-point array.
        InputError: another number of maps than examples, or a shape that does not fit.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.sum(1)), torch.ones(1, 3)
    >>> ap.GivenMap(torch.tensor([[1.0, 2.0, 3.0]]), "by hand")(field, x).values
    tensor([[1., 2., 3.]])
    """

    values: Any
    name: str = "given"
    answers: Literal["salience", "sensitivity"] = "salience"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.values
        if isinstance(given, Attribution) or not isinstance(given, Tensor | np.ndarray | list | tuple | dict):
            raise ConfigError(
                f"{kind_of(given)} as values of GivenMap", "a tensor or an array", "give the numbers alone"
            )
        taken = tree.apply(_as_tensor, given) if isinstance(given, dict | list | tuple) else _as_tensor(given)
        object.__setattr__(self, "values", taken)

    def explain(self, q: Question) -> Attribution:
        """Hand the map on."""
        if q is not q.root:
            raise InputError(
                f"the map {self.name!r} asked for at points other than the examples",
                "an explainer, which can explain them",
                "give ap.External(function) for what another library computes",
            )
        return q.attribution(self, tree.apply(lambda v, x: fitted(v, x, self.name), self.values, q.x))


@dataclass(frozen=True, eq=False)
class External(Unregistered):
    """An explainer from elsewhere: a function of examples and targets that gives maps.

    Attributes:
        call: takes x [R, ...] and targets [R] (None for models with one output), gives maps as `GivenMap` takes them.
        name: what results call it.
        answers: whether values say how the score changes (sensitivity), or what it is made of (salience).

    Raises:
        InputError: maps that do not fit the examples.

    >>> import apportion as ap
    >>> twice = ap.External(lambda x, target: 2 * x, "twice the input")
    >>> twice(ap.Field(lambda x: x.sum(1)), torch.ones(1, 3)).values
    tensor([[2., 2., 2.]])
    """

    call: Callable[[Any, Any], Any]
    name: str = "external"
    answers: Literal["salience", "sensitivity"] = "salience"

    def explain(self, q: Question) -> Attribution:
        """Ask the function; what it runs is not counted."""
        target = q.target
        if isinstance(target, Tensor) and target.ndim == 2 and target.shape[1] == 1:
            target = target[:, 0]
        with torch.enable_grad():
            made = self.call(tree.apply(lambda t: t.detach().clone(), q.x), target)
        if isinstance(made, Attribution):
            made = made.values
        if not isinstance(made, Tensor | np.ndarray | dict | list | tuple):
            raise InputError(
                f"{kind_of(made)} from {self.name!r}", "a tensor or an array of maps", "return one map an example"
            )
        values = _as_tensor(made) if isinstance(made, Tensor | np.ndarray) else tree.apply(_as_tensor, made)
        return q.attribution(self, tree.apply(lambda v, x: fitted(v, x, self.name), values, q.x))


@dataclass(frozen=True)
class Resized(Unregistered):
    """A method whose maps lie on a layer's grid, enlarged to the input bilinearly, which the result records.

    Metrics need one number a pixel. Enlarging adds no detail, and how it is done changes scores: so it is asked for.

    Attributes:
        base: the method; maps that have the input's size already stay as they are.

    >>> import apportion as ap
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, stride=2), torch.nn.Flatten(), torch.nn.Linear(18, 2)).eval()
    >>> a = ap.Resized(ap.GradCAM(ap.At("0")))(ap.Field(net), torch.rand(1, 1, 7, 7))
    >>> a.values.shape, a.postprocessing
    (torch.Size([1, 1, 7, 7]), ('resize(7, 7)',))
    """

    base: Explainer

    @property
    def name(self) -> str:
        """What results call it."""
        return type(self.base).__name__

    @property
    def kind(self) -> Kind:
        return self.base.kind

    @property
    def unit(self) -> str:
        return self.base.unit

    @property
    def cautions(self) -> tuple[str, ...]:
        return self.base.cautions

    @property
    def signed(self) -> bool:
        return self.base.signed

    def passes(self, q: Question | None = None) -> Passes:
        return self.base.passes(q)

    def asks(self, q: Question) -> Iterable[Hashable]:
        return self.base.asks(q)

    @property
    def together(self) -> Hashable | None:
        return None if self.base.together is None else ("resized", self.base.together)

    def explain(self, q: Question) -> Attribution:
        """Ask the base, and enlarge."""
        return self._enlarged(self.base.explain(q), q)

    def explain_all(
        self, members: Sequence[tuple[Explainer, Question]], q: Question
    ) -> Sequence[Attribution | Exception]:
        """Let the bases go together."""
        some = [(m.base, own) for m, own in members if isinstance(m, Resized)]
        found = self.base.explain_all(some, q)
        return [a if isinstance(a, Exception) else self._enlarged(a, q) for a in found]

    def _enlarged(self, a: Attribution, q: Question) -> Attribution:
        x, values = q.x, a.values
        if not isinstance(x, Tensor) or not isinstance(values, Tensor) or values.shape[2:] == x.shape[2:]:
            return a
        return a.resize(tuple(x.shape[2:]))


def _as_tensor(value: Any) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writ")  # nothing here writes to it
            t = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{kind_of(value)} as values", "numbers", "give a tensor or an array of floats") from error
    if not t.is_floating_point():
        raise ConfigError(f"values of {t.dtype}", "floating point", "convert them with .float()")
    return t


def fitted(values: Tensor, x: Tensor, name: str) -> Tensor:
    """Lay values beside an input: of its shape, or with one channel for all."""
    if values.ndim == x.ndim - 1 and values.shape == (x.shape[0], *x.shape[2:]):
        values = values[:, None]
    one = values.ndim == x.ndim and x.ndim > 2 and values.shape == (x.shape[0], 1, *x.shape[2:])
    if values.shape != x.shape and not one:
        alike = len(values) == len(x) if values.ndim else False
        have, of = (tuple(t.shape[1:] if alike else t.shape) for t in (values, x))
        raise InputError(
            f"maps of shape {have} from {name!r} for examples of {of}"
            if alike
            else f"a map of shape {have} from {name!r} for input {of}",
            "the shape of the input, with one channel or all, one map an example",
            "resize the map to the input first: ap.Resized(method) does",
        )
    return values.to(device=x.device, dtype=torch.promote_types(values.dtype, torch.float32))

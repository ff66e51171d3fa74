"""Fields: what is asked of which model. It alone batches, sets precision and keeps the twin."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apportion.core import kept, tree
from apportion.core.config import Configurable, whole
from apportion.core.errors import ConfigError, InputError, ModelError, NonFiniteError, ScoreError, kind_of
from apportion.core.fast import Plan, digest, is_alike
from apportion.core.kept import Held
from apportion.core.memory import CLOSE, budget
from apportion.core.precision import Precision, check_device, check_precision, complaint, deviation
from apportion.core.score import Logit, Score, Target, as_score
from apportion.core.sharing import is_key
from apportion.core.site import Input, Site, SiteInfo
from apportion.core.state import State, is_open, survey
from apportion.core.tree import Tree
from apportion.core.twin import Twin, check_ready, fingerprint, unwrap

if TYPE_CHECKING:
    from apportion.core.question import Question
else:
    Question = Any  # questions import fields; shapes are checked at run time in tests

_LARGEST_CHUNK = 1 << 14
_LEAST_CHUNK = 16
_FUNCTORCH = cast(Any, torch._C)._functorch


@dataclass(frozen=True)
class Normalize(Configurable):
    """The affine normalization the model expects: z = (x - mean) / std per channel (axis 1).

    >>> Normalize((0.5,), (0.25,))(torch.tensor([[[1.0]]]))
    tensor([[[2.]]])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ConfigError(
                f"Normalize(mean={self.mean}, std={self.std})",
                "as many positive std as mean",
                "give one positive std for each mean",
            )

    def __call__(self, x: Float[Tensor, "R C *rest"]) -> Float[Tensor, "R C *rest"]:
        """Normalize each channel."""
        if x.ndim < 2 or x.shape[1] not in (len(self.mean), *([x.shape[1]] if len(self.mean) == 1 else [])):
            raise InputError(
                f"input of shape {tuple(x.shape)} with {len(self.mean)} channel mean(s)",
                "matching axis 1",
                "give one mean and std per channel, or one for all",
            )
        shape = (1, -1, *[1] * (x.ndim - 2))
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).reshape(shape)
        std = torch.tensor(self.std, dtype=x.dtype, device=x.device).reshape(shape)
        return (x - mean) / std


@dataclass(frozen=True)
class Shared:
    """Marks a tensor in `extra` that is the same for all examples and has no example axis."""

    value: Tensor


@dataclass(eq=False)
class Checked:
    """What checking the model on one example showed.

    Attributes:
        outputs: the model's outputs for one example.
        read: what the score reads of that example: the outputs or an inner site.
        read_pair: the same of two examples in one pass; None where passes have one row.
        row_bytes: memory kept per row for the backward pass.
        rows: rows spent.
        sites: the addressable tensors of a pass, once they were listed.
        met: where a pass first meets each parameter, once that was looked for.
    """

    outputs: Any
    read: Any
    read_pair: Any
    row_bytes: int
    rows: int
    sites: list[SiteInfo] | None = None
    met: dict[str, int] | None = None


@dataclass
class _Own:
    """What one field's thread has seen besides.

    Attributes:
        score_is_checked: whether the score was found to treat rows alone.
        deviation: how far from float32 a lowered precision is.
        measured_on: a digest of the weights it was measured on.
    """

    score_is_checked: bool = False
    deviation: dict[str, Any] | None = None
    measured_on: tuple[Any, Any] = ((), None)


class Field:
    """A model, a score and a site: the scalar function that is explained.

    The model is never touched: it runs as a twin whose weights are shared and need no gradient. A field
    may be used from several threads; each has its own twin.
    """

    def __init__(
        self,
        model: Any,
        score: Score | Callable[..., Tensor] | None = None,
        site: Site | None = None,
        *,
        extra: Any = None,
        bounds: tuple[float, float] | None = None,
        normalize: Normalize | None = None,
        precision: Precision = None,
        batch_size: SupportsIndex | Literal["auto"] = "auto",
        allow_unused: bool = False,
        fast: bool = True,
        compile: bool = False,
    ) -> None:
        """State the question.

        Args:
            model: a module or any callable; `x` is passed as its argument, tuples as several, dicts by name.
            score: reads one number per example off the outputs; the logit of the target unless given. A
                callable takes the raw outputs and returns [rows].
            site: where values are attributed; the model's input unless given.
            extra: further arguments: a tuple (positional, after x) or a dict (by name). Tensors have one
                entry per example on the first axis, unless wrapped in `Shared`.
            bounds: lowest and highest admissible input, in the units of x.
            normalize: the normalization between x and the network's own input.
            precision: dtype the model is cast to; or "bf16", "fp16" or "tf32" for passes in fewer digits around
                float32 weights, rows and sums, whose distance from float32 is measured. None leaves it.
            batch_size: rows per pass; "auto" fits memory and backs off when it runs out.
            allow_unused: give zeros, with a warning, for an input the score does not depend on.
            fast: fold batch-norms and lay pictures out channels last where that only changes the rounding.
            compile: run passes without gradient through torch.compile, which takes long once for each thread and
                number of rows; what it gives is compared with the model's own outputs.

        Raises:
            ConfigError: an impossible option.
            ModelError: something that cannot be called.
        """
        self.model = unwrap(model)
        self.score = as_score(Logit() if score is None else score)
        self.site = Input() if site is None else site
        if not isinstance(self.site, Site):
            raise ConfigError(
                f"{kind_of(site)} as site",
                "Input(), At(...) or AtOp(...)",
                "write ap.At('name of the layer'); field.sites(x) lists them",
            )
        number = whole(batch_size)
        if not (isinstance(batch_size, str) and batch_size == "auto") and (number is None or number < 1):
            raise ConfigError(f"batch_size={batch_size!r}", "a positive int or 'auto'", "leave it out for 'auto'")
        check_precision(precision)
        for name, given in (("allow_unused", allow_unused), ("fast", fast), ("compile", compile)):
            if not isinstance(given, bool):
                raise ConfigError(f"{name}={given!r}", "True or False", f"write {name}=True or {name}=False")
        if compile and isinstance(precision, str):
            raise ConfigError(
                f"compile=True with precision={precision!r}",
                "one of the two: compiled passes are held to the model's own digits",
                "leave one out",
            )
        if bounds is not None and not _is_range(bounds):
            raise ConfigError(
                f"bounds={bounds!r}",
                "(low, high), finite, with low < high",
                "write bounds=(0, 1) for pictures in [0, 1]",
            )
        if normalize is not None and not isinstance(normalize, Normalize):
            raise ConfigError(
                f"normalize={normalize!r}", "ap.Normalize(mean, std) or None", "give one positive std for each mean"
            )
        if isinstance(model, type | torch.export.ExportedProgram) or not callable(model):
            check_ready(model)
        self.extra = extra if isinstance(extra, tuple | dict) or extra is None else (extra,)
        low, high = bounds or (None, None)
        self.bounds = None if bounds is None else (_plain(low), _plain(high))
        self.normalize = normalize
        self.precision: torch.dtype | None = None if isinstance(precision, str) else precision
        self.lowered: Any = precision if isinstance(precision, str) else None
        self.allow_unused, self.fast, self.compile = allow_unused, fast, compile
        self._batch_size: int | Literal["auto"] = "auto" if number is None else number
        self._rowwise = False
        self._chunk = number
        self._fits: dict[Any, int] = {}
        self._present: Any = None
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process: the twins, and the rows per pass that fit here."""
        kept = {k: v for k, v in vars(self).items() if k != "_local"}
        return kept | {"_chunk": None if self.is_automatic else self._batch_size, "_fits": {}, "_present": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._local = threading.local()

    def with_model(self, model: Any, *, rowwise: bool = False) -> Field:
        """Ask the same of another model: score, site, extra arguments and all options stay.

        Args:
            model: the other one.
            rowwise: do not look whether its rows depend on each other, as of sums of calls of a model that was looked
                at: where those cancel, rounding that changes with the batch is all there is.

        >>> Field(lambda x: x.sum(1), batch_size=3).with_model(lambda x: 2 * x.sum(1)).bind(torch.ones(1, 2)).fx
        tensor([4.])
        """
        if isinstance(model, type | torch.export.ExportedProgram) or not callable(model):
            check_ready(model)
        new = type(self).__new__(type(self))
        new.__setstate__(self.__getstate__() | {"model": unwrap(model)})
        new._rowwise = rowwise
        return new

    def with_copy(self, model: nn.Module) -> Field:
        """Ask the same of a copy of this field's model, whose weights may hold other numbers and be written to.

        How a model behaves does not depend on these: what checks have shown of the model, in this thread, is taken
        over, and so is what can be folded. The copy runs itself, without a twin of its own, where it may.
        """
        new = self.with_model(model, rowwise=self._rowwise)
        own = self.prepared
        if self.precision is None and own.is_open and own.twin.note is None:
            new._local.around = kept.autocast()
            new._local.held = replace(own, twin=Twin(model, None, itself=True), state=survey(model), checked={})
        new.prepare().is_ours = True
        held, mine = new.prepared, own.twin.tensors()
        theirs, plan = held.twin.tensors(), own.twin.plan
        if [t.shape for t in mine] == [t.shape for t in theirs] and plan is not None:
            held.twin.plan = plan.moved({id(a): b for a, b in zip(mine, theirs, strict=True)})
            held.twin.plan.refresh()
            held.checked.update(own.checked)
            new._fits = dict(self._fits)
        return new

    def __repr__(self) -> str:
        return f"Field({type(self.model).__name__}, {self.score}, {self.site})"

    def bind(
        self,
        x: Tree,
        target: Target = None,
        ids: Sequence[Any] | None = None,
        seed: int = 0,
        *,
        differentiable: bool = False,
    ) -> Question:
        """Ask the field about examples: targets, extra arguments and random streams are fixed here, once.

        Args:
            x: examples on the first axis; a tensor, or a tuple, list or dict of tensors.
            target: an int, a list or tensor of ints, a tuple indexing the output axes, or None for the top class.
            ids: one hashable name per example; None uses a hash of its content.
            seed: of all random numbers.
            differentiable: keep the graph of results back to x, which must require gradient.

        Raises:
            InputError: wrong type, dtype, shape or device of x, or values out of bounds.
            NonFiniteError: NaN or infinity in x or the outputs.
            ModelError: the model is not in a state to be explained.
            TargetError: the target does not fit the outputs.
        """
        from apportion.core import question

        with torch.inference_mode(False):
            return question.Question.bind(self, x, target, ids, seed, differentiable)

    def sites(self, x: Tree) -> list[SiteInfo]:
        """List the tensors `At` can address, in the order of one forward pass on the first example."""
        from apportion.core import question

        with torch.inference_mode(False):
            return question.Question.begin(self, x, any_dtype=True).sites()

    @property
    def chunk(self) -> int:
        """Rows per pass at present."""
        return self._chunk or 1

    @property
    def engine(self) -> dict[str, Any]:
        """How this thread's passes run, for the record."""
        found: dict[str, Any] = {"passes": str(self.twin().plan or "as the model says")}
        if self.lowered is not None:
            found |= {"precision": self.lowered, "deviation": getattr(self._local, "deviation", None)}
        elif self.precision is not None:
            found["precision"] = str(self.precision).removeprefix("torch.")
        if self.compile:
            found["compiled"] = [r for c in self.twin().compiled.values() if (r := c.record) is not None]
        return found

    @contextmanager
    def in_full(self) -> Iterator[None]:
        """Run this thread's passes in float32 for a while."""
        before = self.is_full
        self._local.full = True
        try:
            yield
        finally:
            self._local.full = before

    @property
    def is_full(self) -> bool:
        """Whether passes have all their digits."""
        return self.lowered is None or getattr(self._local, "full", False)

    @property
    def scale(self) -> float:
        """By what gradients are multiplied on their way back; other than 1 in fp16 only."""
        return getattr(self._local, "scale", 1.0) if self.lowered == "fp16" and not self.is_full else 1.0

    @scale.setter
    def scale(self, scale: float) -> None:
        self._local.scale = scale

    @property
    def is_automatic(self) -> bool:
        """Whether rows per pass are chosen here."""
        return self._batch_size == "auto"

    def shrink(self, to: int) -> None:
        """Remember that only so many rows of the present shape fit."""
        self._chunk = max(1, to)
        if self._present is not None:
            self._fits[self._present] = self._chunk

    def _choose(self, shapes: Any) -> None:
        """Take the rows per pass that fit examples of some shapes, where that is known."""
        if self.is_automatic:
            self._present, self._chunk = shapes, self._fits.get(shapes)

    # -- the twin and the checks ------------------------------------------------------------------

    def twin(self) -> Twin:
        """Give this thread's twin."""
        return self.prepared.twin

    @property
    def prepared(self) -> Held:
        """This thread's twin and what is known of it, as they are."""
        held: Held | None = getattr(self._local, "held", None)
        return self.prepare() if held is None else held

    def prepare(self) -> Held:
        """See that the model can be explained, and give this thread's twin and what is known of it.

        The twin is built anew if the model's structure or storage changed, and where not all of the model can be
        seen. Of an unchanged model it is that of an earlier field, where one asked in the same way.

        Raises:
            ModelError: see `check_ready`.
        """
        held: Held | None = getattr(self._local, "held", None)
        if not isinstance(self.model, nn.Module):
            held = held or Held(Twin(self.model, self.precision), State((), ()), check_ready(self.model))
            self._local.held = held
            return held
        now, around = survey(self.model), kept.autocast()
        same = held is not None and held.is_open and getattr(self._local, "around", around) == around
        self._local.around = around
        if held is None or not same or held.state.mark != now.mark:
            settings = self._settings()
            held = None if settings is None else kept.find(self.model, settings, now)
            if held is None:
                facts = check_ready(self.model)
                held = Held(Twin(self.model, self.precision), now, facts, is_open=is_open(self.model))
                if settings is not None:
                    kept.keep(self.model, settings, held)
            self._local.held = held
        held.written(now)
        held.twin.refresh()
        return held

    def _settings(self) -> Any:
        """Say, by value, on what a check of the model depends besides it; None where that cannot be said."""
        if self.extra or self.compile or self.precision is not None:  # cast weights are too large to keep
            return None
        settings = (
            self.fast,
            self.compile,
            self._batch_size == 1,
            self._rowwise,
            self.lowered,
            self.site,
            self.normalize,
            kept.autocast(),
        )
        return settings if is_key(settings) else None

    def own(self, checked: Checked) -> _Own:
        """Give what this thread has seen besides the model's checks."""
        if not hasattr(self._local, "own"):
            self._local.own = WeakKeyDictionary()
        return self._local.own.setdefault(checked, _Own())

    def admit(self, x: Tree, *, keep_graph: bool = False, any_dtype: bool = False) -> Tree:
        """Check the user's input, and detach it unless its graph is wanted.

        Raises:
            InputError, NonFiniteError, ModelError: see `bind`.
        """
        flat, names = tree.leaves(x), tree.names(x)
        for leaf, name in zip(flat, names, strict=True):
            self._admit_leaf(leaf, name, any_dtype or not isinstance(self.site, Input))
        if not flat:
            raise InputError("an empty tree as input", "at least one tensor", "pass the examples")
        counts = {int(leaf.shape[0]) for leaf in flat}
        if len(counts) != 1:
            shapes = {n: tuple(leaf.shape) for n, leaf in zip(names, flat, strict=True)}
            raise InputError(
                f"inputs of shapes {shapes}",
                "the same number of examples on each first axis",
                "give every input one row per example; what has none goes to extra=, wrapped in ap.Shared",
            )
        if self.normalize is not None and len(flat) > 1:
            raise InputError("several inputs with normalize=", "a single tensor", "normalize inside the model")
        held = self.prepare()
        held.facts.check_device(flat[0].device)
        self._check_dtype(held.facts.dtypes, flat, names)
        if self.lowered is not None:
            check_device(self.lowered, flat)
        cast = self.precision
        if keep_graph and not any(t.requires_grad for t in flat):
            raise InputError(
                "differentiable=True with an x that requires no gradient",
                "x.requires_grad_()",
                "call x.requires_grad_() first",
            )
        x = x if keep_graph else tree.apply(torch.Tensor.detach, x)
        return tree.apply(lambda t: tree.ordinary(t.to(cast) if cast and t.is_floating_point() else t), x)

    def _admit_leaf(self, leaf: Any, name: str, any_dtype: bool) -> None:
        if not isinstance(leaf, Tensor):
            raise InputError(f"{name} is a {type(leaf).__name__}", "a torch.Tensor", "convert with torch.as_tensor")
        if not tree.is_dense(leaf):
            raise InputError(
                f"{name} is sparse or nested", "dense tensors", "convert it with x.to_dense(), or x.to_padded_tensor(0)"
            )
        if leaf.ndim == 0:
            raise InputError(f"{name} is a single number", "examples on the first axis", "pass x[None]")
        if leaf.shape[0] == 0:
            raise InputError(
                f"{name} of shape {tuple(leaf.shape)}, an empty batch",
                "at least one example",
                "leave empty batches out",
            )
        if leaf.numel() == 0:
            raise InputError(
                f"{name} of shape {tuple(leaf.shape)}, without elements", "at least one feature", "check how x was made"
            )
        if leaf.is_meta:
            raise InputError(f"{name} is on the meta device", "a tensor that holds numbers", "load the data first")
        if not any_dtype and not leaf.is_floating_point():
            raise InputError(
                f"{name} has dtype {leaf.dtype}: whole numbers, as of tokens, no gradient and nothing between",
                "floating point, for every method, those that only remove and mask included",
                "explain at the embedding, Field(model, site=At('name.of.the.embedding')), where ap.fills.MaskToken "
                "and ap.groups.RealTokens remove tokens; or pass it in extra=",
            )
        if leaf.is_floating_point() and not tree.is_finite(leaf):
            bad = int((~torch.isfinite(leaf)).reshape(len(leaf), -1).any(1).nonzero()[0])
            raise NonFiniteError(
                f"{name} is NaN or infinite in example {bad}", "finite inputs", "remove or repair that example"
            )
        if self.bounds is not None and isinstance(self.site, Input):
            low, high = float(leaf.detach().min()), float(leaf.detach().max())
            slack = 1e-6 * (self.bounds[1] - self.bounds[0])
            if low < self.bounds[0] - slack or high > self.bounds[1] + slack:
                raise InputError(
                    f"{name} ranges over [{low:.4g}, {high:.4g}]",
                    f"values within bounds {self.bounds}",
                    "scale x, or declare the bounds it has",
                )

    def _check_dtype(self, dtypes: frozenset[torch.dtype], flat: list[Tensor], names: list[str]) -> None:
        if self.precision is not None:
            return
        for leaf, name in zip(flat, names, strict=True):
            if len(dtypes) == 1 and leaf.is_floating_point() and leaf.dtype not in dtypes:
                own = next(iter(dtypes))
                raise InputError(
                    f"{name} is {leaf.dtype}, the model's weights are {own}",
                    "one dtype",
                    f"pass x.to({own}), or Field(..., precision={leaf.dtype})",
                )

    def rows_of_extra(self) -> int | None:
        """Count the examples that extra arguments have rows for; None where they are the same for all."""
        found: list[int] = []

        def count(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim:
                found.append(len(value))
            return value

        tree.apply(count, self.extra or {})
        return found[0] if found else None

    def split_extra(self, batch: int) -> tuple[Any, dict[str, Any]]:
        """Give positional and named extra arguments, checked against the number of examples."""

        def ready(value: Tensor) -> Tensor:
            cast = self.precision is not None and value.is_floating_point()
            return tree.ordinary(value.detach().to(self.precision) if cast else value.detach())

        def check(value: Any) -> Any:
            if isinstance(value, Shared):
                return Shared(ready(value.value)) if isinstance(value.value, Tensor) else value
            if not isinstance(value, Tensor):
                return value
            if not tree.is_dense(value):
                raise InputError(
                    "a sparse or nested tensor in extra", "dense tensors", "make it dense, or wrap it in ap.Shared(...)"
                )
            if value.ndim and value.shape[0] != batch:
                raise InputError(
                    f"an extra tensor of shape {tuple(value.shape)} for {batch} example(s)",
                    "one entry per example on the first axis",
                    "wrap it in ap.Shared(...) if it is the same for all examples",
                )
            return ready(value)

        extra = tree.apply(check, self.extra) if self.extra else self.extra
        return (extra, {}) if isinstance(extra, tuple) else ((), extra or {})

    def check_precision(self, q: Question) -> None:
        """Measure how far from float32 a lowered precision is, once for each kind of example, and warn of it.

        Weights written to past their versions have it measured anew, too: all numbers are looked at.
        """
        if self.lowered is None:
            return
        own = self.own(self.check_model(q))
        weights = digest(self.twin().tensors())
        if own.deviation is None or not is_alike(weights, own.measured_on):
            own.deviation, own.measured_on = deviation(q), weights
        self._local.deviation, self.scale = own.deviation, own.deviation.get("loss_scale", 1.0)
        if message := complaint(self.lowered, own.deviation):
            q.warn(message)

    def check_model(self, q: Question) -> Checked:
        """See how the model behaves, in float32 where passes have fewer digits; see `_check_model`."""
        with self.in_full():
            return self._check_model(q)

    def _check_model(self, q: Question) -> Checked:
        """Run the model on the first example, twice, and beside another; remember the outcome.

        Raises:
            ModelError: outputs change between equal calls, or depend on the other examples.
        """
        x, held = q.inputs, self.prepared
        shapes = tuple((tuple(t.shape[1:]), t.dtype, t.device) for t in tree.leaves(x))
        key = (self.score.site, *shapes)
        plan = held.twin.plan
        if plan is not None and plan.refresh() and not held.is_ours:
            held.checked.clear()  # other weights: what is equal to rounding may no longer be
        self._choose(shapes)
        known: Checked | None = held.checked.get(key)
        first = torch.zeros(1, dtype=torch.long)
        if known is not None and (plan is not None or q.differentiable):
            self._fit(shapes, known)
            return known
        if not q.differentiable:
            held.twin.plan, held.twin.learns = self._plan(), True
        storages: dict[int, int] = {}
        module = self.twin().module
        before = None if module is None else fingerprint(module)
        with _kept_rng() as drew:  # over both: the second call must not meet the same random state
            spent = 2
            try:
                with _saved(storages):
                    one, read = q.look(first, grad=True)
            except ModelError as error:
                if "saved tensor hooks" not in str(error.__cause__):
                    raise
                with Made(storages):  # a model that differentiates by torch.func
                    one, read = q.look(first, grad=True)
                spent += 1
            again, _ = q.look(first, grad=True)  # in the same mode: kernels may differ between the two
            plan = self.twin().plan
            if plan is not None and plan.is_on and not _same(one, again, 1e-6):
                if not _same(one, again, 1e-5):
                    plan.give_up("outputs differed by more than 1e-5")
                again, _ = q.look(first, grad=True, plain=True)
                spent += 1
        if not _same(one, again, 1e-6 if tree.leaves(x)[0].device.type == "cpu" else 1e-5):
            if drew():
                raise ModelError(
                    "the model draws random numbers", "a deterministic forward pass", "switch the noise off"
                )
            raise ModelError(
                "two calls with the same input gave different outputs",
                "a model that keeps no state between calls",
                "reset or remove its state (caches, counters, running statistics)",
            )
        if module is not None and fingerprint(module) != before:  # it wrote to itself: see whether that matters
            if plan is not None:
                plan.give_up("the model writes to itself")
            kept.forget(self.model, held)
            spent += 2 * self._forgets(q)
        pair, read_pair = torch.tensor([0, min(1, len(q) - 1)]), None
        if self._batch_size != 1 and not self._rowwise:
            both, read_pair = q.look(pair, companion=True)
            second, _ = q.look(pair, companion=True, only=1)
            spent += 3
            if both is not None and not all(_same(*_rows(o, both, i), 1e-3) for i, o in enumerate((one, second))):
                raise ModelError(
                    "an example's output depends on the other examples of its batch, or on those before it",
                    "independent examples",
                    "call model.eval(); make the forward pass forget what it saw; or pass batch_size=1",
                )
        inputs = sum(t[0].numel() * t.element_size() for t in tree.leaves(x))
        fixed = {t.untyped_storage().data_ptr() for t in self.twin().tensors()}
        row_bytes = sum(size for where, size in storages.items() if where not in fixed) + 4 * inputs
        checked = Checked(one, read, read_pair, row_bytes, spent)
        held.checked[key] = checked
        q.looked(spent)
        if plan is not None:
            plan.refresh()
        self._fit(shapes, checked)
        return checked

    def _fit(self, shapes: Any, checked: Checked) -> None:
        """Choose rows per pass for examples of some shapes, unless that was done before."""
        if self.is_automatic and shapes not in self._fits:
            self._fits[shapes] = _fitting_rows(checked.row_bytes, shapes[0][2])
            self._choose(shapes)

    def _plan(self) -> Plan | None:
        """Say why passes run as the model says; None where the first pass is to find out."""
        if not self.fast:
            return Plan(why_not="fast=False")
        if not isinstance(self.site, Input) or self.score.site is not None:
            return Plan(why_not="the site is inside the model")
        return Plan(why_not="hooks of your own") if self.prepared.facts.hooked else None

    def _forgets(self, q: Question) -> int:
        """See that a model which saw the first example treats another as a model that saw none.

        Raises:
            ModelError: it does not.
        """
        used = self.prepared
        pair = torch.tensor([0, min(1, len(q) - 1)])
        after, _ = q.look(pair, companion=True, only=1)
        try:
            self._local.held = replace(used, twin=Twin(self.model, self.precision))
            fresh, _ = q.look(pair, companion=True, only=1)
        finally:
            self._local.held = used
        if after is not None and fresh is not None and not _same(after, fresh, 1e-6):
            raise ModelError(
                "an example's output depends on the examples the model saw before",
                "a model that keeps no state between calls",
                "reset or remove its state (caches, counters, running statistics)",
            )
        return 1


def _saved(storages: dict[int, int]) -> AbstractContextManager[object]:
    """Weigh what a pass keeps for its way back."""

    def weigh(t: Tensor) -> Tensor:
        inner = t
        while _FUNCTORCH.is_functorch_wrapped_tensor(inner):  # which has no storage of its own
            inner = _FUNCTORCH.get_unwrapped(inner)
        if inner._is_zerotensor():  # a tangent that takes no memory
            return t.detach()
        storage = inner.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # a node that keeps its own output would never be freed

    return torch.autograd.graph.saved_tensors_hooks(weigh, lambda t: t)


class Made(TorchDispatchMode):
    """Weighs all that a pass makes, which is no less than what it keeps."""

    def __init__(self, storages: dict[int, int]) -> None:
        """Start.

        Args:
            storages: to add to, by where they lie.
        """
        super().__init__()
        self._storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in [t for t in tree.tensors(out) if not t._is_zerotensor()]:
            storage = t.untyped_storage()
            where = storage.data_ptr()
            self._storages[where] = max(storage.nbytes(), self._storages.get(where, 0))
        return out


def check_score(q: Question, checked: Checked) -> None:
    """See that a score of one row is the same alone and beside another, and the same twice.

    Raises:
        ScoreError: it is not.
    """
    own = q.field.own(checked)
    if own.score_is_checked:
        return
    score, first = q.field.score, torch.zeros(1, dtype=torch.long)
    with _kept_rng():
        beside = None
        if checked.read_pair is not None:
            beside = q.score_rows(checked.read_pair, torch.tensor([0, min(1, len(q) - 1)]))[:1]
        alone = q.score_rows(checked.read, first)
        again = q.score_rows(checked.read, first)
    name = type(score).__name__
    if not _same(alone, again, 1e-6):
        raise ScoreError(f"{name} gave different numbers for the same outputs", "a pure function", "take the noise out")
    if beside is not None and not _same(alone, beside, 1e-3):
        raise ScoreError(
            f"{name} of a row depends on the other rows: {float(alone):.4g} alone, {float(beside):.4g} beside another",
            "one number for each row by itself",
            "reduce over axis 1 and further, never over axis 0 (softmax(1), not softmax(0))",
        )
    own.score_is_checked = True


def _rows(alone: Any, both: Any, at: int) -> tuple[list[Tensor], list[Tensor]]:
    """Give each output that has one row in the one and two in the other: its row, and that row of the two."""
    pairs = zip(tree.tensors(alone), tree.tensors(both), strict=False)
    rows = [(a, b[at : at + 1]) for a, b in pairs if a.ndim and b.ndim and (a.shape[0], b.shape[0]) == (1, 2)]
    return [a for a, _ in rows], [b for _, b in rows]


def _plain(number: Any) -> Any:
    return number.item() if isinstance(number, np.number) else number


def _is_range(bounds: Any) -> bool:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        return False
    numbers = all(isinstance(b, int | float | np.number) and not isinstance(b, bool) for b in bounds)
    return numbers and all(map(math.isfinite, bounds)) and bool(bounds[0] < bounds[1])


def _same(a: Any, b: Any, tolerance: float) -> bool:
    both = [[t.detach() for t in tree.tensors(o) if t.is_floating_point()] for o in (a, b)]
    for s, t in zip(*both, strict=True):
        if s.shape != t.shape:
            return False
        if torch.equal(s, t):
            continue
        scale = 1e-6 + s.nan_to_num(0, 0, 0).abs().amax()
        if not bool(((s == t) | ((s - t).abs() <= tolerance * scale)).all()):
            return bool(torch.isnan(s).any())  # reported elsewhere, with where
    return True


@contextmanager
def _kept_rng() -> Iterator[Callable[[], bool]]:
    """Leave the global random state as it was, and tell whether it was used."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    used = False
    try:
        yield lambda: used
    finally:
        used = not torch.equal(cpu, torch.get_rng_state())
        torch.set_rng_state(cpu)
        if cuda is not None:
            used = used or any(not torch.equal(a, b) for a, b in zip(cuda, torch.cuda.get_rng_state_all(), strict=True))
            torch.cuda.set_rng_state_all(cuda)


def _fitting_rows(row_bytes: int, device: torch.device) -> int:
    """Choose rows per pass so that what the backward pass keeps fits into a share of free memory.

    On a CPU it also stays near the cache, and within what its allocator holds on to, unless that leaves few rows.
    """
    row_bytes = max(1, row_bytes)
    most = budget(device) // row_bytes
    if device.type == "cpu":
        most = min(most, max(_LEAST_CHUNK, CLOSE * torch.get_num_threads() // row_bytes))
    return max(1, min(_LARGEST_CHUNK, most))

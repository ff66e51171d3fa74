"""The runner: calls the model's twin on rows, in chunks that fit, and keeps account of it."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch
from jaxtyping import Int
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils._device import DeviceContext

from apportion.core import fast, tree
from apportion.core.compiled import Compiled
from apportion.core.derivative import is_memory
from apportion.core.errors import ApportionError, InputError, ModelError, NonFiniteError, OutOfMemoryError
from apportion.core.field import Field, Shared
from apportion.core.frozen import Frozen
from apportion.core.precision import lowered, tensor_cores, widened
from apportion.core.site import Probe, Site, SiteInfo
from apportion.core.tree import Tree
from apportion.core.twin import Twin

T = TypeVar("T")
Examples = Int[Tensor, " R"]
"""For each row, the user's example it belongs to."""


class Called(NamedTuple):
    """What one call of the model gave.

    Attributes:
        outputs: the model's outputs.
        values: the tensors read at sites.
        seen: the sites passed, where they were traced.
    """

    outputs: Any
    values: Mapping[Site, Tensor]
    seen: list[SiteInfo]


class Runner:
    """Runs one field for the examples of one question and all questions derived from it.

    Attributes:
        field: what is asked of which model.
        spent: rows sent forward, backward and for f(x), per example.
        warnings: messages recorded so far, each once.
        everyone: the index of each example.
        finite: what was seen to be finite of late, with its version.
        found_slopes: the sites where the score was seen to be more than steps.
        compared: rows run as written to see that compiled passes give the same.
    """

    def __init__(self, field: Field, batch: int, device: torch.device) -> None:
        """Start the accounts.

        Args:
            field: what is asked of which model.
            batch: the number of examples.
            device: where they are.
        """
        self.field, self.device = field, device
        self._batch, self._size = batch, 0
        self.everyone = torch.arange(batch, device=device)
        self._waits = device.type == "cpu"  # elsewhere reading owners would make the host wait for its device
        self.spent = {k: torch.zeros(batch, dtype=torch.long) for k in ("forward", "backward", "at_x")}
        self.warnings: dict[str, None] = {}
        self.found_slopes: set[str] = set()
        self.compared = 0
        self.finite: deque[tuple[ref[Tensor], int]] = deque(maxlen=4)
        self._extra = field.split_extra(batch)

    def call(
        self,
        z: Tree,
        examples: Examples,
        read: Sequence[Site] = (),
        override: Mapping[Site, Tensor] | None = None,
        *,
        differentiate: bool = False,
        trace: bool = False,
    ) -> Called:
        """Call the twin on rows that all fit.

        Args:
            z: rows at the network's own input.
            examples: whose further arguments go with each row.
            read: sites to read.
            override: sites to replace, with what.
            differentiate: whether what is read will be differentiated.
            trace: whether to list the sites passed.

        Raises:
            ModelError: the model raised, or its outputs have other rows.
            SiteError: a site does not address one tensor of the pass.
        """
        twin, count = self.field.twin(), len(examples)
        looks = bool(read or override or trace)
        probe = Probe(twin.module, read, override or {}, differentiate=differentiate, trace=trace) if looks else None
        watched = looks or _is_watched()

        def digits() -> AbstractContextManager[object]:
            return nullcontext() if self.field.is_full else lowered(self.field.lowered, self.device)

        def run(
            mode: AbstractContextManager[object],
            rows: Tree,
            whose: Tensor = examples,
            via: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda call: call,
        ) -> Any:
            args, kwargs = _arguments(rows)
            extra = tree.apply(lambda v: _extra_rows(v, whose), self._extra[0])
            named = tree.apply(lambda v: _extra_rows(v, whose), self._extra[1])
            alone = _without_frozen() if isinstance(mode, fast.Fast) else nullcontext()
            with twin.running() as call, digits(), alone, mode, probe or nullcontext():
                outputs = via(call)(*args, *extra, **kwargs, **named)
            return outputs if self.field.is_full else widened(outputs)

        compiled = None if watched else self._compiled(twin, z, count)
        try:
            if compiled is None:
                outputs = fast.run(twin, run, z, watched=watched)
                if twin.plan is not None:
                    self.compared += twin.plan.repeats * count
                    twin.plan.repeats = 0
            else:
                outputs, compared = compiled.run(run, z, examples, type(self.field.model).__name__)
                self.compared += compared
        except ApportionError:
            raise
        except Exception as error:
            if is_memory(error):
                raise
            raise _failure(self.field.model, error, count, [tuple(t.shape) for t in tree.leaves(z)]) from error
        given = tree.tensors(outputs)
        flat = [t for t in given if t.ndim == 0 or t.shape[0] != count]
        if flat and len(flat) == len(given):
            raise ModelError(
                f"outputs of shape {tuple(flat[0].shape)} for {count} row(s)",
                "rows on the outputs' first axis",
                "return one row of outputs per example",
            )
        return Called(outputs, {}, []) if probe is None else Called(outputs, probe.values, probe.seen)

    def _compiled(self, twin: Twin, z: Tree, count: int) -> Compiled | None:
        """Give the compiled pass for some rows, where they fill half a pass and none of them is differentiated."""
        if not self.field.compile or torch.is_grad_enabled() or not count <= self._size <= 2 * count:
            return None
        key = (self._size, *[(tuple(t.shape[1:]), t.dtype) for t in tree.leaves(z)])
        if key not in twin.compiled:
            twin.compiled[key] = Compiled(self._size, self.device)
        return twin.compiled[key]

    def chunks(
        self, body: Callable[[Any, Tensor], T], rows: Tree, owner: Tensor, examples: Examples, count: dict[str, int]
    ) -> list[T]:
        """Run `body` on rows in chunks that fit, halving when memory runs out, without losing work.

        Args:
            body: called with rows and their owners.
            rows: all rows.
            owner: handed on to `body`.
            examples: whose account each row is on.
            count: how often each row counts, by account.
        """
        total = len(owner)
        for leaf in tree.leaves(rows):
            if leaf.shape[0] != total:
                raise InputError(
                    f"rows of shape {tuple(leaf.shape)} with {total} owner(s)",
                    "one owner per row",
                    "pass owner=torch.arange(len(q)) for the examples themselves",
                )
        out: list[T] = []
        start = 0
        while start < total:
            size = min(self.field.chunk, total - start)
            whole, at = size == total, slice(start, start + size)
            before, self._size = self._size, self.field.chunk
            try:
                with tensor_cores(None if self.field.is_full else self.field.lowered):
                    out.append(body(rows if whole else tree.index(rows, at), owner if whole else owner[at]))
                start += size
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_memory(error):
                    raise
                self.refuse_smaller(size, error)
            finally:
                self._size = before
            self.back_off(size)  # only here has the error let go of the failed pass's tensors
        self._due.append((examples, count))
        if self._waits:
            self._settle()
        return out

    @property
    def spent(self) -> dict[str, Tensor]:
        """Rows sent so far, by kind, per example."""
        self._settle()
        return self._spent

    @spent.setter
    def spent(self, spent: dict[str, Tensor]) -> None:
        self._spent, self._due = spent, []

    def _settle(self) -> None:
        """Put the passes made since on the accounts."""
        due, self._due = self._due, []
        for examples, count in due:
            all_once = self.is_everyone(examples)
            tally = torch.ones(()).long() if all_once else torch.bincount(examples.cpu(), minlength=self._batch)
            for what, times in count.items():
                self._spent[what].add_(tally, alpha=times)

    def is_everyone(self, examples: Examples) -> bool:
        """Tell rows that are the examples, each once and in order, by where the numbers lie, which may miss some."""
        return examples.data_ptr() == self.everyone.data_ptr() and examples.shape == self.everyone.shape

    def refuse_smaller(self, size: int, error: BaseException) -> None:
        """Give up where fewer rows cannot be tried.

        Raises:
            OutOfMemoryError: one row was too many, or the user fixed the number.
        """
        if size == 1:
            raise OutOfMemoryError(
                f"memory ran out on a single row: {error}", "room for one row", "lower precision or a larger device"
            ) from error
        if not self.field.is_automatic:
            raise OutOfMemoryError(
                f"memory ran out on {size} rows", "a batch that fits", "lower batch_size, or leave it at 'auto'"
            ) from error

    def back_off(self, size: int) -> None:
        """Halve the rows per pass."""
        self.field.shrink(size // 2)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.warnings[f"memory ran out at {size} rows a pass: went on with {size // 2}"] = None

    def saw_finite(self, t: Tensor) -> bool:
        """Tell whether a tensor was found finite of late, and is unchanged: a map may be a gradient as it came."""
        return not t.is_inference() and any(seen() is t and version == t._version for seen, version in self.finite)

    def note_finite(self, t: Tensor) -> None:
        """Keep in mind that a tensor is finite."""
        if not t.is_inference():  # which count no versions
            self.finite.append((ref(t), t._version))

    def refuse_values(self, t: Tensor, what: str, examples: Examples, do: str = "") -> None:
        """Complain of numbers that are not all finite.

        Args:
            t: one row per row.
            what: the name for messages.
            examples: whose rows they are.
            do: the next step, where it is a special one.

        Raises:
            NonFiniteError: always, with the first example that has them.
        """
        finite = torch.isfinite(t)
        bad = ~finite.reshape(len(t), -1).all(1)
        example = int(examples[int(bad.nonzero()[0])])
        raise NonFiniteError(
            f"{what} is NaN or infinite for example {example} ({int(bad.sum())} of {len(t)} rows)",
            "finite numbers",
            do or _wider(None if self.field.is_full else self.field.lowered),
        )


def _wider(lowered: str | None) -> str:
    if lowered == "fp16":
        return "numbers end at 65,504 in fp16: use precision='bf16', or leave precision out"
    return "check the example; compute in Field(..., precision=torch.float64)"


def _is_watched() -> bool:
    """Tell whether someone looks at single operations, or differentiates more than once."""
    modes = [m for m in _get_current_function_mode_stack() if not isinstance(m, DeviceContext)]
    return not all(isinstance(m, Frozen) for m in modes) or (not modes and torch.is_grad_enabled())


@contextmanager
def _without_frozen() -> Iterator[None]:
    """Take `Frozen` off for a mode that does its work: every question about a tensor would go through both."""
    stack = _get_current_function_mode_stack()
    if not stack or not isinstance(stack[-1], Frozen):
        yield
        return
    with _pop_mode_temporarily():
        yield


def _extra_rows(value: Any, in_root: Tensor) -> Any:
    if isinstance(value, Shared):
        return value.value
    return value[in_root.to(value.device)] if isinstance(value, Tensor) and value.ndim else value


def _arguments(z: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(z, Mapping):
        return (), dict(z)
    return (tuple(z), {}) if isinstance(z, tuple | list) else ((z,), {})


def _failure(model: Any, error: Exception, rows: int, shapes: list[tuple[int, ...]]) -> ApportionError:
    """Turn an exception from inside the model into one that says what was asked of it."""
    kind = f"{type(model).__name__} raised {type(error).__name__} on {rows} row(s) of input shapes {shapes}: {error}"
    if isinstance(model, torch.fx.GraphModule):
        return ModelError(
            f"the exported program failed on {rows} row(s): {error}",
            "a program exported with a dynamic batch axis",
            "torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))",
        )
    if any(words in str(error) for words in ("functorch", "torch.func", "BatchedTensor")):
        return ModelError(
            kind,
            "operations outside torch.vmap and other transforms of torch.func, where passes are looked into",
            "call the layers on the whole batch instead of mapping them, or take a method of gradients or removals",
        )
    return ModelError(kind, "a model that accepts these inputs", "call it yourself on x[:1] to see")

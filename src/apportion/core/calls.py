"""Calls: rows of a question through the model in chunks, scored and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.core import tree
from apportion.core.bound import Bound
from apportion.core.derivative import gradients, is_memory, only_in_steps
from apportion.core.errors import ApportionError, ConfigError, NoGradientPathError, ScoreError
from apportion.core.frozen import Frozen
from apportion.core.precision import widened
from apportion.core.progress import tick
from apportion.core.protocols import Owner
from apportion.core.score import Score, check_scores, inherited, scoring
from apportion.core.site import Input, Site
from apportion.core.tree import Tree

S = TypeVar("S", bound=Score)
T = TypeVar("T")


class Calls(Bound):
    """How everything that is asked reaches the model."""

    # -- rows in chunks ---------------------------------------------------------------------------

    def _chunks(
        self, body: Callable[[Any, Tensor], T], rows: Tree, owner: Tensor, count: dict[str, int], *, detach: bool = True
    ) -> list[T]:
        owner = owner.to(self.device)
        with torch.inference_mode(False), torch.enable_grad():
            if detach and not self.differentiable:
                rows, owner = tree.apply(lambda t: tree.ordinary(t.detach()), (rows, owner))
            examples = owner if self is self._root else self._in_root[owner]
            try:
                return self._runner.chunks(body, rows, owner, examples, count)
            finally:
                self._root._checks += self._runner.compared
                self._runner.compared = 0

    def _assert_finite(self, t: Tensor, what: str, owner: Tensor, do: str = "") -> None:
        if self._runner.saw_finite(t):
            return
        if not tree.is_finite(t):
            self._runner.refuse_values(t, what, self._in_root[owner.to(self.device)], do)
        self._runner.note_finite(t)

    def grid(self, steps: int, what: str = "passes") -> Iterator[tuple[Int[Tensor, " R"], Owner]]:
        """Go over all (step, example) pairs in blocks of one pass; each example meets its steps in order.

        Args:
            steps: how many rows each example gets.
            what: what runs, for progress.

        Yields:
            The step and the owner of each row of a block.
        """
        batch = len(self)
        total, start = steps * batch, 0
        while start < total:
            size = min(self.field.chunk, total - start)
            flat = torch.arange(start, start + size, device=self.device)
            yield flat // batch, flat % batch
            start += size
            tick(what, start, total)

    # -- calling the model ------------------------------------------------------------------------

    def _outputs(
        self, rows: Tree, owner: Tensor, counted: str, at_input: bool = False, score: Score | None = None
    ) -> Any:
        use = self.field.score if score is None else score

        def body(part: Tree, own: Tensor) -> Any:
            with torch.set_grad_enabled(self.differentiable):
                if at_input:
                    return self._read_call(self._normalized(part), own, use)
                return self._outputs_of(part, own, use)

        return join(self._chunks(body, rows, owner, {counted: 1}))

    def _normalized(self, inputs: Tree) -> Tree:
        return inputs if self.field.normalize is None else tree.apply(self.field.normalize, inputs)

    def _network_rows(self, rows: Tree) -> Tree:
        return self._normalized(rows) if isinstance(self.field.site, Input) else rows

    def _outputs_of(self, rows: Tree, owner: Tensor, *scores: Score) -> Any:
        return self._outputs_from(self._network_rows(rows), owner, *scores)

    def _outputs_from(self, z: Tree, owner: Tensor, *scores: Score) -> Any:
        """Give what the scores read, where rows are at the network's own input or at the inner site."""
        sites = {s.site for s in scores}
        if len(sites) > 1:
            raise ConfigError(f"scores that read {sites}", "scores of one site in one pass", "ask in two calls")
        inner = sites.pop() if sites else None
        outputs, values = self._call_from(z, owner, [] if inner is None else [inner])
        return outputs if inner is None else values[inner]

    def _read_call(self, z: Tree, owner: Tensor, score: Score) -> Any:
        outputs, values = self._call(z, owner, [] if score.site is None else [score.site])
        return outputs if score.site is None else values[score.site]

    def _call_at(self, rows: Tree, owner: Tensor, read: Sequence[Site], *, differentiate: bool) -> tuple[Any, Any]:
        return self._call_from(self._network_rows(rows), owner, read, differentiate=differentiate)

    def _call_from(
        self, z: Tree, owner: Tensor, read: Sequence[Site], *, differentiate: bool = False
    ) -> tuple[Any, Mapping[Site, Tensor]]:
        if isinstance(self.field.site, Input):
            return self._call(z, owner, read, differentiate=differentiate)
        below = (
            tree.index(self._root.inputs, self._in_root[owner]) if self.below is None else tree.index(self.below, owner)
        )
        return self._call(self._normalized(below), owner, read, {self.field.site: z}, differentiate=differentiate)

    def _call(
        self,
        z: Tree,
        owner: Tensor,
        read: Sequence[Site] = (),
        override: Mapping[Site, Tensor] | None = None,
        *,
        differentiate: bool = False,
    ) -> tuple[Any, Mapping[Site, Tensor]]:
        if differentiate and torch.is_grad_enabled():  # so that a site's gradient counts all its uses
            z, override = tree.apply(_carrying, z), {k: _carrying(t) for k, t in (override or {}).items()}
        called = self._runner.call(
            z, owner if self is self._root else self._in_root[owner], read, override, differentiate=differentiate
        )
        return called.outputs, called.values

    # -- scores and derivatives -------------------------------------------------------------------

    def _target_of(self, score: Score, read: Any, owner: Tensor) -> Tree:
        """Give each row's target; a score other than the field's may have one of its own, resolved once."""
        root, home = self._root, self.home
        if id(score) in home._overrides:
            return take(home._overrides[id(score)][1], self._in_home[owner])
        shared, given = inherited(score, self.field.score, root.target)
        if shared and self is root and self._runner.is_everyone(owner):
            return None if self.target is None else tree.apply(Tensor.clone, self.target)  # scores may write to it
        if shared:
            return take(self.target, owner)
        if id(score) not in root._overrides:

            def outputs() -> Any:
                return root._outputs(root.inputs, root._owners(), counted="at_x", at_input=True, score=score)

            root._overrides[id(score)] = (score, score.resolve(given, read, outputs, len(root)))
        return take(root._overrides[id(score)][1], self._in_root[owner])

    def adopt(self, score: S, target: Tree) -> S:
        """Take a score with a target for each row of `home`, which may be others than the user's examples."""
        self.home._overrides[id(score)] = (score, target)
        return score

    def _scored(self, score: Score, outputs: Any, owner: Tensor) -> Tensor:
        target = self._target_of(score, outputs, owner)
        try:
            with scoring():
                values = score(outputs if self.field.is_full else widened(outputs), target)
        except ApportionError:
            raise
        except Exception as error:
            if is_memory(error):
                raise
            shapes = [tuple(t.shape) for t in tree.tensors(outputs)]
            raise ScoreError(
                f"{score_name(score)} raised {type(error).__name__} on outputs of shapes {shapes}: {error}",
                "a function that gives one number per row",
                "call it yourself on model(x) to see",
            ) from error
        return check_scores(values, len(owner), score)

    def _lean(self) -> AbstractContextManager[object]:
        """Keep no more than first derivatives with respect to the rows need."""
        plan = self.field.twin().plan
        no_layers = plan is not None and not plan.has_layers
        return nullcontext() if self.differentiable or no_layers else Frozen()

    def _leaf(self, t: Tensor) -> Tensor:
        if self.differentiable:
            return t if t.requires_grad else t.detach().requires_grad_()
        return t.detach().requires_grad_()

    def _differentiate(
        self, v: Tensor, leafs: list[Tensor], names: list[str], *, keep: bool, at: str = ""
    ) -> list[Tensor]:
        """Differentiate, with complaints that name the tensors, and the sites where those are others than ours."""
        where = at or str(self.field.site)
        if not v.requires_grad:
            raise NoGradientPathError(
                f"{type(self.field.score).__name__} does not depend on {where} through differentiable steps",
                "a differentiable path from the site to the score",
                "look for detach(), no_grad, rounding or argmax in the model, or explain another site",
            )
        more = self.differentiable
        grads = gradients(
            self.field.model, v.sum(), leafs, retain_graph=keep or more, create_graph=more, scale=self.field.scale
        )
        return self._reached(v, grads, leafs, names, at)

    def _reached(
        self, v: Tensor, grads: Sequence[Tensor | None], leafs: list[Tensor], names: list[str], at: str = ""
    ) -> list[Tensor]:
        """See that the score depends on tensors smoothly, as its gradients say."""
        where = at or str(self.field.site)
        found = self._runner.found_slopes  # looked for once: no host waits for a device in later passes
        if at not in found and not any(map(self._is_any, grads)) and only_in_steps(v, leafs):
            raise NoGradientPathError(
                f"{type(self.field.score).__name__} changes with {where} only in steps (round, floor, sign), "
                "whose derivative is 0",
                "a differentiable path from the site to the score",
                "take the rounding out, or explain with a method that removes features",
            )
        found.add(at)
        return self._used(list(grads), leafs, names, at)

    def _is_any(self, g: Tensor | None) -> bool:
        """Tell whether a gradient is other than 0 somewhere; a sum is a tenth of the work of looking at each."""
        if g is None:
            return False
        total = g.detach().sum().item()
        if tree.is_number(total):
            self._runner.note_finite(g)
        return bool(total) or bool(g.any())

    def _used(self, grads: list[Tensor | None], leafs: list[Tensor], names: list[str], at: str = "") -> list[Tensor]:
        unused = [n for n, g in zip(names, grads, strict=True) if g is None]
        if unused:
            if len(unused) == len(grads) or not self.field.allow_unused:
                raise NoGradientPathError(
                    f"the score does not depend on {', '.join(unused)}",
                    "a site on the way to the score" if at else "a score that uses every explained input",
                    "read another site; field.sites(x) lists them"
                    if at
                    else "move it to extra=, or pass Field(..., allow_unused=True) for zeros",
                )
            self.warn(f"the score does not depend on {', '.join(unused)}: zeros")
        return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leafs, strict=True)]


def score_name(score: Score) -> str:
    """Name a score, and the function it wraps, for messages."""
    fn = getattr(score, "fn", None)
    return f"{type(score).__name__}({getattr(fn, '__name__', fn)})" if fn is not None else type(score).__name__


def _carrying(t: Tensor) -> Tensor:
    return t if t.requires_grad or not t.is_floating_point() else t.detach().requires_grad_()


def take(target: Tree, owner: Tensor) -> Tree:
    """Give each row its owner's target; None stays None."""
    return None if target is None else tree.apply(lambda t: t.index_select(0, owner.to(t.device)), target)


def join(parts: list[Any]) -> Any:
    """Concatenate chunks of trees or of raw outputs."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim else torch.stack(parts)
    return tree.map_tensors(lambda *each: join(list(each)), *parts)

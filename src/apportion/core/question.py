"""Questions: a field asked about bound examples; everything is evaluated on rows with owners."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.attribution import Attribution, Cost, Domain, References
from apportion.core.config import to_config, whole
from apportion.core.derivative import gradients, only_in_steps
from apportion.core.errors import (
    ApportionError,
    BaselineError,
    ConfigError,
    InputError,
    NoGradientPathError,
    RuleError,
    ScoreError,
    SiteError,
    kind_of,
)
from apportion.core.field import Field, check_score
from apportion.core.frozen import Frozen
from apportion.core.hooks import own_hooks
from apportion.core.progress import tick
from apportion.core.protocols import Answering, Backward, Baseline, Owner, RulePass, RuleSet, Tap
from apportion.core.runner import Runner, is_memory
from apportion.core.score import Score, Target, as_score, check_scores, inherited, top_class
from apportion.core.site import Input, Site, SiteInfo
from apportion.core.streams import Stream, content_ids, plain_id
from apportion.core.tree import Tree

T = TypeVar("T")


class Question:
    """A field bound to examples.

    Attributes:
        field: what is asked of which model.
        x: the examples at the field's site, [B, ...].
        inputs: the examples at the model's input.
        target: the resolved target, one row per example.
        seed: of all random numbers.
        differentiable: whether results keep their graph back to the user's x.
    """

    def __init__(self) -> None:
        """Made by `Field.bind` and `at` only."""
        self.field: Field
        self.x: Tree
        self.inputs: Tree
        self.target: Tree
        self.seed: int
        self.differentiable: bool
        self._ids: Sequence[Any] | None
        self._root: Question
        self._in_root: Tensor
        self._stream: Callable[[str], Stream]
        self._at_x: Tensor | None = None
        self._runner: Runner
        self._references: dict[Any, tuple[Baseline, References]]
        self._overrides: dict[int, tuple[Score, Tree]] = {}
        self._checks: int
        self._sites: list[SiteInfo] | None = None
        self._reaching: dict[tuple[Site, ...], list[Site]] = {}
        self._memo: dict[Hashable, Any] = {}

    # -- binding ----------------------------------------------------------------------------------

    @classmethod
    def bind(
        cls, field: Field, x: Tree, target: Target, ids: Sequence[Any] | None, seed: int, differentiable: bool
    ) -> Question:
        """Resolve everything that is fixed for good; see `Field.bind`."""
        self = cls.begin(field, x, ids, seed, differentiable)
        batch = len(self)
        checked = field.check_model(self)
        self._checks = checked.rows
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
        return self

    @classmethod
    def begin(
        cls,
        field: Field,
        x: Tree,
        ids: Sequence[Any] | None = None,
        seed: int = 0,
        differentiable: bool = False,
        *,
        any_dtype: bool = False,
    ) -> Question:
        """Take the examples in, before anything is asked of them."""
        number = whole(seed)
        if number is None:
            raise ConfigError(f"seed={seed!r}", "an int", "give a whole number")
        seed = number
        self = cls()
        self.field, self.seed, self.differentiable = field, seed, differentiable
        self.inputs = self.x = field.admit(x, keep_graph=differentiable, any_dtype=any_dtype)
        twin = field.twin(refresh=True)
        batch = len(self)
        if ids is not None:
            given: Any = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids
            if isinstance(given, str | bytes) or not isinstance(given, Iterable):
                raise InputError(f"ids={ids!r}", "one id per example, in a list", "or leave ids out")
            named = [plain_id(name) for name in given]
            if len(named) != batch:
                raise InputError(f"{len(named)} ids for {batch} example(s)", "one id per example", "or leave ids out")
            ids = named
        self._ids, self._root, self._in_root = ids, self, torch.arange(batch, device=self.device)
        self._runner, self._references = Runner(field, batch, self.device), {}
        self._stream = lambda purpose: Stream.of(seed, self.ids, purpose)
        self.target = None
        if twin.note:
            self.warn(twin.note)
        if hooked := own_hooks(field.model):
            self.warn(f"hooks of your own ({hooked}) ran in every pass, on rows and modules made here")
        self._checks = 0
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
        return value, [_join([f[1] for f in found])]

    def __len__(self) -> int:
        return tree.rows(self.x)

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        return tree.leaves(self.inputs)[0].device

    @cached_property
    def ids(self) -> Sequence[Any]:
        """Names of the examples: the given ones, or a hash of their content; derived rows have their owner's."""
        if self is not self._root:
            return [self._root.ids[i] for i in self._in_root.tolist()]
        return self._ids if self._ids is not None else content_ids(self.inputs)

    def _owners(self) -> Tensor:
        return torch.arange(len(self), device=self.device)

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
        new.inputs, new._runner = self._root.inputs, self._runner
        new.target = take(self.target, owner)
        new._ids, new._root, new._in_root = None, self._root, self._in_root[owner]
        new._references = self._root._references
        outer = self._stream
        new._stream = lambda purpose: outer(purpose).derive(owner, draw)
        return new

    @property
    def root(self) -> Question:
        """The question first bound, whose examples are the user's."""
        return self._root

    def once(self, key: Hashable, make: Callable[[Question], T]) -> T:
        """Work something out about the user's examples once, and give the same to all who ask by its key."""
        memo = self._root._memo
        if key not in memo:
            memo[key] = make(self._root)
        return memo[key]

    @property
    def in_root(self) -> Int[Tensor, " B"]:
        """For each example here, its index in the root."""
        return self._in_root

    def warn(self, message: str) -> None:
        """Record a warning on every result of this question, once."""
        self._runner.warnings[message] = None

    def stream(self, purpose: str) -> Stream:
        """Give random rows for a purpose, keyed by seed, example and draw."""
        return self._stream(purpose)

    # -- evaluation -------------------------------------------------------------------------------

    def value(self, rows: Tree, owner: Owner, score: Any = None) -> Float[Tensor, " R"]:
        """Score rows.

        Args:
            rows: points at the field's site, any number.
            owner: the example each row belongs to.
            score: another score; without a target of its own it shares the question's.

        Returns:
            One number per row, in units of the score.
        """
        return self._value(rows, owner, score, counted="forward")

    def _value(self, rows: Tree, owner: Tensor, score: Any, counted: str) -> Tensor:
        use = self.field.score if score is None else as_score(score)

        def body(part: Tree, own: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.differentiable):
                return self._scored(use, self._outputs_of(part, own, use), own)

        out = torch.cat(self._chunks(body, rows, owner, {counted: 1}))
        self._assert_finite(out, "the score", owner)
        return out

    @property
    def fx(self) -> Float[Tensor, " B"]:
        """f(x): free where choosing the target already gave it."""
        if self._at_x is None:
            counted = "at_x" if self is self._root else "forward"
            self._at_x = self._value(self.x, self._owners(), None, counted)
        return self._at_x

    @overload
    def value_and_grad(self, rows: Tree, owner: Owner) -> tuple[Tensor, Tree]: ...
    @overload
    def value_and_grad(self, rows: Tree, owner: Owner, score: Score) -> tuple[Tensor, Tree]: ...
    @overload
    def value_and_grad(self, rows: Tree, owner: Owner, score: tuple[Score, ...]) -> tuple[list[Tensor], list[Tree]]: ...

    def value_and_grad(self, rows: Tree, owner: Owner, score: Any = None) -> tuple[Any, Any]:
        """Score rows and differentiate the score with respect to each.

        Args:
            rows: points at the field's site.
            owner: the example each row belongs to.
            score: another score, or several, for which one forward pass serves.

        Returns:
            Values [R] and gradients shaped as rows; lists of them for several scores.
        """
        many = isinstance(score, tuple)
        scores = [as_score(s) for s in score] if many else [self.field.score if score is None else as_score(score)]

        def body(part: Tree, own: Tensor) -> tuple[list[Tensor], list[Tree]]:
            leafs = [self._leaf(t) for t in tree.leaves(part)]
            with self._lean():
                outs = self._outputs_of(tree.rebuild(part, leafs), own, *scores)
            values, grads = [], []
            for i, s in enumerate(scores):
                v = self._scored(s, outs, own)
                found = self._differentiate(v, leafs, tree.names(part), keep=i + 1 < len(scores))
                grads.append(tree.rebuild(part, found))
                values.append(v if self.differentiable else v.detach())
            return values, grads

        found = self._chunks(body, rows, owner, {"forward": 1, "backward": len(scores)})
        values = [torch.cat([f[0][i] for f in found]) for i in range(len(scores))]
        grads = [_join([f[1][i] for f in found]) for i in range(len(scores))]
        for v, g in zip(values, grads, strict=True):
            self._assert_finite(v, "the score", owner)
            for leaf, name in zip(tree.leaves(g), tree.names(g), strict=True):
                self._assert_finite(leaf, f"the gradient with respect to {name}", owner)
        return (values, grads) if many else (values[0], grads[0])

    def steered(
        self,
        rows: Tree,
        owner: Owner,
        goal: Callable[[Any, Tree], tuple[Tensor, Tree]],
        beside: Tree,
        site: Site | None = None,
    ) -> tuple[Float[Tensor, " R"], Tree, Tree, Tree]:
        """Score rows, and in the same pass a goal that may differ from row to row; differentiate both.

        Args:
            rows: points at the field's site.
            owner: the example each row belongs to.
            goal: takes what the model makes of some rows and what stands beside them, and gives a number to
                be differentiated, and notes to be kept, for each.
            beside: what the goal knows of each row.
            site: where the goal looks; the model's outputs unless given.

        Returns:
            Values, gradients of the score, gradients of the goal, and the notes.
        """
        use = self.field.score
        read = list(dict.fromkeys(s for s in (use.site, site) if s is not None))

        def body(part: tuple[Tree, Tree], own: Tensor) -> tuple[Tensor, Tree, Tree, Tree]:
            here, known = part
            leafs, names = [t.detach().requires_grad_() for t in tree.leaves(here)], tree.names(here)
            with self._lean():
                outputs, values = self._call_at(tree.rebuild(here, leafs), own, read, differentiate=False)
            v = self._scored(use, outputs if use.site is None else values[use.site], own)
            aim, notes = goal(outputs if site is None else values[site], known)
            grad = self._differentiate(v, leafs, names, keep=True)
            way = self._differentiate(aim, leafs, names, keep=False)
            notes = tree.apply(torch.Tensor.detach, notes)
            return v.detach(), tree.rebuild(here, grad), tree.rebuild(here, way), notes

        found = self._chunks(body, (rows, beside), owner, {"forward": 1, "backward": 2})
        value, grad, way, notes = (_join([f[i] for f in found]) for i in range(4))
        self._assert_finite(value, "the score", owner)
        for what, each in (("the gradient", grad), ("the gradient of the way", way)):
            for leaf, name in zip(tree.leaves(each), tree.names(each), strict=True):
                self._assert_finite(leaf, f"{what} with respect to {name}", owner)
        return value, grad, way, notes

    def _lean(self) -> AbstractContextManager[object]:
        """Keep no more than first derivatives with respect to the rows need."""
        return nullcontext() if self.differentiable else Frozen()

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
        grads = gradients(self.field.model, v.sum(), leafs, retain_graph=keep or more, create_graph=more)
        if not any(g is not None and bool(g.any()) for g in grads) and only_in_steps(v, leafs):
            raise NoGradientPathError(
                f"{type(self.field.score).__name__} changes with {where} only in steps (round, floor, sign), "
                "whose derivative is 0",
                "a differentiable path from the site to the score",
                "take the rounding out, or explain with a method that removes features",
            )
        return self._used(list(grads), leafs, names, at)

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

    def outputs(self, rows: Tree, owner: Owner) -> Any:
        """Give the model's raw outputs for rows, without gradient."""
        return self._outputs(rows, owner, counted="forward")

    def _outputs(
        self, rows: Tree, owner: Tensor, counted: str, at_input: bool = False, score: Score | None = None
    ) -> Any:
        use = self.field.score if score is None else score

        def body(part: Tree, own: Tensor) -> Any:
            with torch.set_grad_enabled(self.differentiable):
                if at_input:
                    return self._read_call(self._normalized(part), own, use)
                return self._outputs_of(part, own, use)

        return _join(self._chunks(body, rows, owner, {counted: 1}))

    def hvp(self, rows: Tree, owner: Owner, vectors: Tree) -> tuple[Tensor, Tree, Tree]:
        """Score rows, their gradient, and the Hessian times a vector per row.

        Args:
            rows: points at the field's site.
            owner: the example each row belongs to.
            vectors: one direction per row, shaped as rows.

        Returns:
            Values, gradients, and Hessian-vector products; zero where the score is piecewise linear.
        """
        joined = (rows, vectors)

        def body(part: tuple[Tree, Tree], own: Tensor) -> tuple[Tensor, Tree, Tree]:
            leafs = [t.detach().requires_grad_() for t in tree.leaves(part[0])]
            v = self._scored(
                self.field.score, self._outputs_of(tree.rebuild(part[0], leafs), own, self.field.score), own
            )
            if not v.requires_grad:
                self._differentiate(v, leafs, tree.names(part[0]), keep=False)
            first = gradients(self.field.model, v.sum(), leafs, create_graph=True)
            g = self._used(list(first), leafs, tree.names(part[0]))
            inner = sum(((a * b).sum() for a, b in zip(g, tree.leaves(part[1]), strict=True)), v.new_zeros(()))
            second: Sequence[Tensor | None] = [None] * len(leafs)
            if inner.requires_grad:
                second = gradients(self.field.model, inner, leafs)
            h = [torch.zeros_like(t) if s is None else s for s, t in zip(second, leafs, strict=True)]
            like = part[0]
            return (
                v.detach(),
                tree.rebuild(like, [t.detach() for t in g]),
                tree.rebuild(like, [t.detach() for t in h]),
            )

        found = self._chunks(body, joined, owner, {"forward": 1, "backward": 2})
        value, grad, product = (_join([f[i] for f in found]) for i in range(3))
        for leaf in tree.leaves(product):
            self._assert_finite(leaf, "the Hessian-vector product", owner)
        return value, grad, product

    def tap(
        self, rows: Tree, owner: Owner, sites: Sequence[Site], *, grad: bool = True, score: Any = None
    ) -> tuple[Float[Tensor, " R"], dict[Site, Tap]]:
        """Read several sites, and the score's gradients there, in one pass.

        Args:
            rows: points at the field's site.
            owner: the example each row belongs to.
            sites: what to read.
            grad: whether to differentiate; the pass goes back no further than the first site.
            score: another score.

        Returns:
            Values [R], and for each site its activation and gradient.
        """
        use = self.field.score if score is None else as_score(score)

        def body(part: Tree, own: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
            read = list(sites) + ([use.site] if use.site is not None and use.site not in sites else [])
            with torch.set_grad_enabled(grad), self._lean():
                outputs, values = self._call_at(part, own, read, differentiate=grad)
                v = self._scored(use, outputs if use.site is None else values[use.site], own)
            acts = [values[s] for s in sites]
            grads: list[Tensor] = []
            if grad:
                names = [str(s) for s in sites]
                grads = self._differentiate(v, acts, names, keep=False, at=", ".join(names))
            if self.differentiable:
                return v, acts, grads
            return v.detach(), [a.detach() for a in acts], grads

        found = self._chunks(body, rows, owner, {"forward": 1, **({"backward": 1} if grad else {})})
        value = torch.cat([f[0] for f in found])
        self._assert_finite(value, "the score", owner)
        taps = {}
        for i, s in enumerate(sites):
            g = torch.cat([f[2][i] for f in found]) if grad else None
            taps[s] = Tap(torch.cat([f[1][i] for f in found]), g)
            for t, what in ((taps[s].value, "the activation"), (g, "the gradient")):
                if t is not None and t.shape[0] == len(owner):
                    self._assert_finite(t, f"{what} at {s}", owner)
        return value, taps

    def read(self, inputs: Tree, owner: Owner) -> Tree:
        """Give the value of the field's site when the model's input is `inputs`; itself for the input site."""
        site = self.field.site
        if isinstance(site, Input):
            return inputs

        def body(part: Tree, own: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.differentiable):
                return self._call(self._normalized(part), own, [site])[1][site]

        return torch.cat(self._chunks(body, inputs, owner, {"forward": 1}))

    def carry(self, make: Baseline) -> Tree:
        """Make points at the model's input, for the user's examples, and give the field's site there.

        Args:
            make: gives [B, k, ...] points for a question whose x is the model's input.

        Returns:
            [B, k, ...] points at the field's site.
        """
        outer = copy.copy(self)
        outer.x = self.inputs
        points = make(outer)
        k = tree.leaves(points)[0].shape[1]
        owner = self._owners().repeat_interleave(k)
        found = self.read(tree.apply(lambda t: t.flatten(0, 1), points), owner)
        return tree.apply(lambda t: t.unflatten(0, (len(self), k)), found)

    def backward(
        self,
        rows: Tree,
        owner: Owner,
        rules: RuleSet,
        reference: Tree | None = None,
        *,
        start: Literal["score", "one"] = "score",
        record: bool = False,
        differentiable: bool = False,
    ) -> Backward:
        """Send rows forward, and backward under a rule set.

        Args:
            rows: points at the field's site.
            owner: the example each row belongs to.
            rules: how each operation sends its signal back.
            reference: one reference row per row, for rules that compare with it.
            start: whether relevance starts as the score itself or as 1.
            record: keep every operation's signals.
            differentiable: let the outcome be differentiated with respect to `rows`.

        Returns:
            Signals at the network's own input, after the declared normalization.

        Raises:
            RuleError: an operation the rule set does not know.
        """
        score = self.field.score
        module = self.field.twin().module
        if module is not None and any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
            raise RuleError(
                "a TorchScript module, whose operations cannot be intercepted",
                "an eager module",
                "pass the original",
            )

        def body(part: tuple[Tree, Tree], own: Tensor) -> tuple[RulePass, Tree, Tree | None]:
            network = self._network_rows(part[0])
            ref = None if reference is None else self._network_rows(part[1])

            def forward(z: Tree) -> Tensor:
                return self._scored(score, self._outputs_from(z, own, score), own)

            done = rules.run(forward, network, ref, start=start, record=record, differentiable=differentiable)
            for message in done.warnings:
                self.warn(message)
            return done, network, ref

        paired = (rows, rows if reference is None else reference)
        count = {"forward": 1 + (reference is not None), "backward": 1}
        found = self._chunks(body, paired, owner, count, detach=not differentiable)
        value = torch.cat([f[0].value for f in found])
        self._assert_finite(value.detach(), "the score", owner)
        signal = _join([f[0].signal for f in found])
        for leaf in tree.leaves(signal):
            self._assert_finite(leaf.detach(), f"the {rules.kind}", owner)
        ref_value = None if reference is None else torch.cat([_not_none(f[0].reference_value) for f in found])
        gap = value.detach() - self.value(rows, owner) if rules.surrogate else None
        return Backward(
            value,
            signal,
            rules.kind,
            _join([f[1] for f in found]),
            None if reference is None else _join([f[2] for f in found]),
            ref_value,
            gap,
            [f[0].tape for f in found],
        )

    def observe(
        self,
        body: Callable[[Callable[[Tree, Owner], Tensor], Any, Owner], T],
        rows: Any,
        owner: Owner,
        times: int,
    ) -> list[T]:
        """Let a body run the forward passes of each chunk itself, so that it can watch them.

        Args:
            body: called with a function that scores rows of this chunk, the chunk, and its owners.
            rows: one row per owner, or a tuple of such trees, cut into chunks together.
            owner: the example each row belongs to.
            times: how often the body sends each row forward; 0 for passes that are counted as checks.

        Returns:
            What the body made of each chunk, in order.
        """

        def forward(part: Tree, own: Tensor) -> Tensor:
            value = self._scored(self.field.score, self._outputs_of(part, own, self.field.score), own)
            self._assert_finite(value.detach(), "the score", own)
            return value

        found = self._chunks(lambda part, own: body(forward, part, own), rows, owner, {"forward": times})
        self._root._checks += 0 if times else len(owner)
        return found

    @property
    def cost(self) -> Cost:
        """Rows spent so far, by this question and all that share its account."""
        spent = (self._runner.spent[k].clone() for k in ("forward", "backward", "at_x"))
        return Cost(*spent, checks=self._root._checks)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was recorded by `warn` so far."""
        return tuple(self._runner.warnings)

    # -- calling the model ------------------------------------------------------------------------

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
        inputs = self._normalized(tree.index(self._root.inputs, self._in_root[owner]))
        return self._call(inputs, owner, read, {self.field.site: z}, differentiate=differentiate)

    def _call(
        self,
        z: Tree,
        owner: Tensor,
        read: Sequence[Site] = (),
        override: Mapping[Site, Tensor] | None = None,
        *,
        differentiate: bool = False,
    ) -> tuple[Any, Mapping[Site, Tensor]]:
        called = self._runner.call(z, self._in_root[owner], read, override, differentiate=differentiate)
        return called.outputs, called.values

    def reaching(self, sites: Sequence[Site], alive: Callable[[Site, Tensor], bool] | None = None) -> list[Site]:
        """Choose the sites that the score depends on differentiably, by one pass on the first example.

        Args:
            sites: among which to choose.
            alive: what more must be true of a site and the score's gradient there.
        """
        root = self._root
        key = tuple(sites)
        if alive is None and key in root._reaching:
            return root._reaching[key]
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        rows = tree.apply(lambda t: tree.ordinary(t.detach()[:1]), root.x)
        score = self.field.score
        read = [*sites, *([score.site] if score.site is not None and score.site not in sites else [])]
        with torch.inference_mode(False), torch.enable_grad(), self._lean():
            outputs, values = root._call_at(rows, first, read, differentiate=True)
            v = root._scored(score, outputs if score.site is None else values[score.site], first)
        able = [s for s in sites if v.requires_grad and values[s].requires_grad]
        found = gradients(self.field.model, v.sum(), [values[s] for s in able]) if able else []
        root._checks += 1
        here = [(s, g) for s, g in zip(able, found, strict=True) if g is not None]
        if alive is not None:
            return [s for s, g in here if alive(s, g)]
        root._reaching[key] = [s for s, _ in here]
        return root._reaching[key]

    def shape(self, site: Site) -> tuple[int, ...]:
        """Give the shape of a site for the first example alone, by a pass that counts as a check."""
        root = self._root
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        rows = tree.apply(lambda t: tree.ordinary(t.detach()[:1]), root.x)
        with torch.inference_mode(False), torch.no_grad():
            _, values = root._call_at(rows, first, [site], differentiate=False)
        root._checks += 1
        return tuple(values[site].shape)

    def sites(self) -> list[SiteInfo]:
        """List the addressable tensors of one forward pass on the first example."""
        root = self._root
        if root._sites is None:
            first = torch.zeros(1, dtype=torch.long, device=self.device)
            with torch.inference_mode(False), torch.no_grad():
                root._sites = self._runner.call(
                    root._normalized(tree.index(root.inputs, first)), first, trace=True
                ).seen
            root._checks += 1
        return root._sites

    def look(
        self, owner: Tensor, *, grad: bool = False, companion: bool = False, only: int | None = None
    ) -> tuple[Any, Any]:
        """Run the model on some examples outside all accounts, for checking it.

        Args:
            owner: examples.
            grad: whether to build the graph.
            companion: change the second row where it equals the first.
            only: run that row alone.

        Returns:
            The outputs, and what the score reads; None for both where memory ran out and fewer rows are left to try.
        """
        owner = owner.to(self.device)
        rows = tree.apply(lambda t: t.detach()[owner], self.inputs)
        if companion:
            rows = tree.apply(_told_apart, rows)
        if only is not None:
            owner, rows = owner[only : only + 1], tree.apply(lambda t: t[only : only + 1], rows)
        inner = self.field.score.site
        sites = [s for s in (self.field.site, inner) if s is not None and not isinstance(s, Input)]
        try:
            with torch.inference_mode(False), torch.set_grad_enabled(grad), self._lean():
                if grad and isinstance(self.field.site, Input):
                    rows = tree.apply(lambda t: t.clone().requires_grad_(), rows)
                outputs, values = self._call(self._normalized(rows), owner, sites, differentiate=grad)
        except (RuntimeError, MemoryError) as error:
            if not is_memory(error):
                raise
            self._runner.refuse_smaller(len(owner), error)
            self._runner.back_off(len(owner))
            return None, None
        read = outputs if inner is None else values[inner]
        for t in tree.tensors(outputs):
            if t.is_floating_point() and t.ndim and t.shape[0] == len(owner):
                marked = torch.zeros_like(t).masked_fill_(t.isnan(), torch.nan)  # -inf may mask a class on purpose
                self._assert_finite(marked, "the model's output", owner)
        return tree.map_tensors(torch.Tensor.detach, outputs), tree.map_tensors(torch.Tensor.detach, read)

    # -- scores, chunks, checks -------------------------------------------------------------------

    def score_rows(self, read: Any, owner: Tensor) -> Float[Tensor, " R"]:
        """Score outputs that are there already, for checking the score."""
        with torch.no_grad():
            return self._scored(self.field.score, read, owner.to(self.device))

    def _target_of(self, score: Score, read: Any, owner: Tensor) -> Tree:
        """Give each row's target; a score other than the field's may have one of its own, resolved once."""
        shared, given = inherited(score, self.field.score, self._root.target)
        if shared:
            return take(self.target, owner)
        root = self._root
        if id(score) not in root._overrides:

            def outputs() -> Any:
                return root._outputs(root.inputs, root._owners(), counted="at_x", at_input=True, score=score)

            root._overrides[id(score)] = (score, score.resolve(given, read, outputs, len(root)))
        return take(root._overrides[id(score)][1], self._in_root[owner])

    def _scored(self, score: Score, outputs: Any, owner: Tensor) -> Tensor:
        target = self._target_of(score, outputs, owner)
        try:
            values = score(outputs, target)
        except ApportionError:
            raise
        except Exception as error:
            if is_memory(error):
                raise
            shapes = [tuple(t.shape) for t in tree.tensors(outputs)]
            raise ScoreError(
                f"{_score_name(score)} raised {type(error).__name__} on outputs of shapes {shapes}: {error}",
                "a function that gives one number per row",
                "call it yourself on model(x) to see",
            ) from error
        return check_scores(values, len(owner), score)

    def _chunks(
        self, body: Callable[[Any, Tensor], T], rows: Tree, owner: Tensor, count: dict[str, int], *, detach: bool = True
    ) -> list[T]:
        owner = owner.to(self.device)
        with torch.inference_mode(False), torch.enable_grad():
            if detach and not self.differentiable:
                rows, owner = tree.apply(lambda t: tree.ordinary(t.detach()), (rows, owner))
            return self._runner.chunks(body, rows, owner, self._in_root[owner], count)

    def _assert_finite(self, t: Tensor, what: str, owner: Tensor, do: str = "") -> None:
        self._runner.assert_finite(t, what, self._in_root[owner.to(self.device)], do)

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

    # -- baselines and results --------------------------------------------------------------------

    def references(self, baseline: Baseline) -> References:
        """Give each example's baselines, made once for the user's examples, with what is asked of them.

        Raises:
            BaselineError: wrong shape, dtype, device or values.
        """
        if isinstance(baseline, type) or not callable(baseline):
            name = f"the class {baseline.__name__}" if isinstance(baseline, type) else f"{kind_of(baseline)}"
            raise BaselineError(
                f"{name} as baseline",
                "an instance of one of ap.baselines",
                "write ap.baselines.Zero(), or ap.baselines.Given(tensor) for a tensor of your own",
            )
        key = id(baseline)
        if key not in self._references:
            self._references[key] = (baseline, self._root._make_references(baseline))
        made = self._references[key][1]
        if self is self._root:
            return made
        rows = tree.index(made.rows, self._in_root)
        top = None if made.top_class is None else made.top_class[self._in_root]
        share = _equal_share(self.x, rows)
        return References(made.value[self._in_root], top, share, rows)

    def _make_references(self, baseline: Baseline) -> References:
        rows = baseline(self)
        if not self.differentiable:
            rows = tree.apply(torch.Tensor.detach, rows)  # a tensor of the user's may carry a graph
        if tree.names(rows) != tree.names(self.x):
            raise BaselineError(
                f"baselines {tree.names(rows)}",
                f"the input's structure {tree.names(self.x)}",
                "return a tree like q.x with k baselines each",
            )
        for leaf, x, name in zip(tree.leaves(rows), tree.leaves(self.x), tree.names(self.x), strict=True):
            k = leaf.shape[1] if leaf.ndim == x.ndim + 1 else 0
            if tuple(leaf.shape) != (x.shape[0], k, *x.shape[1:]) or not k:
                raise BaselineError(
                    f"baselines of shape {tuple(leaf.shape)} for {name} of shape {tuple(x.shape)}",
                    f"shape ({x.shape[0]}, k, {', '.join(map(str, x.shape[1:]))})",
                    "return k baselines per example on the second axis",
                )
            if leaf.dtype != x.dtype or leaf.device != x.device:
                raise BaselineError(
                    f"a baseline of {leaf.dtype} on {leaf.device}",
                    f"{x.dtype} on {x.device}, as the input",
                    "convert it with .to(x)",
                )
            if not bool(torch.isfinite(leaf).all()):
                raise BaselineError(
                    f"a baseline for {name} that is NaN or infinite", "finite values", "check how it was made"
                )
        return self.references_at(rows)

    def references_at(self, rows: Tree) -> References:
        """Ask what is asked of baselines about [B, k, ...] points that are finite and shaped as they must be.

        Raises:
            NonFiniteError: a score there that is NaN or infinite.
        """
        k = tree.leaves(rows)[0].shape[1]
        scores, tops = [], []
        for step, owner in self.grid(k, "baselines"):
            points = tree.apply(lambda r: r[owner, step], rows)  # noqa: B023 - used at once
            outputs = self._outputs(points, owner, counted="forward")
            scores.append(self._scored(self.field.score, outputs, owner))
            tops.append(None if self.field.score.site is not None else top_class(outputs))
        score = torch.cat(scores).reshape(k, len(self)).T
        self._assert_finite(
            score.reshape(-1),
            "the score at the baseline itself",
            self._owners().repeat_interleave(k),
            "choose a baseline where the score is finite: this one is a singular point, as 0 is of log(x)",
        )
        known = [t for t in tops if t is not None]
        top = torch.cat(known).reshape(k, len(self)).T if len(known) == len(tops) else None
        return References(score, top, _equal_share(self.x, rows), rows)

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
        """
        if value is not None:
            self._at_x = value
        value = self.fx
        tensors: dict[str, Tensor] = {}
        root = self is self._root
        for leaf in tree.leaves(values):
            if leaf.is_floating_point() and leaf.shape[0] == len(self):
                self._assert_finite(leaf.detach(), "the attribution", self._owners())
        site = self.field.site
        return Attribution(
            values=values,
            kind=explainer.kind,
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
        )


def _score_name(score: Score) -> str:
    fn = getattr(score, "fn", None)
    return f"{type(score).__name__}({getattr(fn, '__name__', fn)})" if fn is not None else type(score).__name__


def _told_apart(t: Tensor) -> Tensor:
    """Change the second of two rows where it equals the first."""
    if not torch.equal(t[0], t[1]):
        return t
    other = t[1:].flip(-1) if t.ndim > 1 else t[1:]
    if t.is_floating_point() and torch.equal(other, t[1:]):
        other = 0.9 * other + 0.1  # stays within [0, 1]
        other = torch.where(other == t[1:], other / 2, other)
    return torch.cat([t[:1], other])


def take(target: Tree, owner: Tensor) -> Tree:
    """Give each row its owner's target; None stays None."""
    return None if target is None else tree.apply(lambda t: t[owner.to(t.device)], target)


def _join(parts: list[Any]) -> Any:
    """Concatenate chunks of trees or of raw outputs."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim else torch.stack(parts)
    return tree.map_tensors(lambda *each: _join(list(each)), *parts)


def _not_none(value: Tensor | None) -> Tensor:
    if value is None:
        raise ConfigError(
            "a rule set that gave no reference value",
            "one per reference row",
            "return the score of the reference rows in RulePass",
        )
    return value


def _equal_share(x: Tree, rows: Tree) -> Float[Tensor, "B k"]:
    same = [(r == t[:, None]).reshape(*r.shape[:2], -1) for r, t in zip(tree.leaves(rows), tree.leaves(x), strict=True)]
    return torch.cat(same, 2).double().mean(2)


def _shown(target: Tree) -> Tree:
    """Show targets of one index each as [B]."""
    one_index = isinstance(target, Tensor) and target.ndim == 2 and target.shape[1] == 1
    return target.squeeze(1) if one_index else target

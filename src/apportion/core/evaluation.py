"""Evaluation: what can be asked of a field about rows, each with the example it belongs to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.calls import Calls, join, score_name
from apportion.core.derivative import gradients
from apportion.core.errors import ApportionError, ConfigError, RuleError
from apportion.core.precision import SAMPLE, apart, complaint, widened
from apportion.core.protocols import Backward, Baseline, ExamplesMixed, Owner, RulePass, RuleSet, Tap
from apportion.core.referenced import SINGULAR
from apportion.core.score import Score, as_score, top_class
from apportion.core.sharing import BUDGET, Account, AtX, PassAtX
from apportion.core.site import Input, Site
from apportion.core.tree import Tree

T = TypeVar("T")


class _Sent(NamedTuple):
    """Rows that went through a rule set together, and the highest outputs at what they are compared with."""

    done: RulePass
    network: Tree
    reference: Tree | None
    top: Tensor | None


class Evaluation(Calls):
    """Scores, gradients, second derivatives, inner values and backward rules, for rows with owners."""

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
        seen = self._root._checked
        if seen is not None and use is not self.field.score and use.site == self.field.score.site:
            caution = use.caution(seen.read)
            if caution:
                self.warn(caution)

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
            self._at_x = self.share("fx", lambda: self._value(self.x, self._owners(), None, counted))
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
        if score is None and (known := self._known_at_x(AtX(), rows, owner)) is not None:
            return known
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
        grads = [join([f[1][i] for f in found]) for i in range(len(scores))]
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
        value, grad, way, notes = (join([f[i] for f in found]) for i in range(4))
        self._assert_finite(value, "the score", owner)
        for what, each in (("the gradient", grad), ("the gradient of the way", way)):
            for leaf, name in zip(tree.leaves(each), tree.names(each), strict=True):
                self._assert_finite(leaf, f"{what} with respect to {name}", owner)
        return value, grad, way, notes

    def outputs(self, rows: Tree, owner: Owner) -> Any:
        """Give the model's raw outputs for rows, without gradient."""
        return self._outputs(rows, owner, counted="forward")

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
            first = gradients(self.field.model, v.sum(), leafs, create_graph=True, scale=self.field.scale)
            g = self._used(list(first), leafs, tree.names(part[0]))
            inner = sum(((a * b).sum() for a, b in zip(g, tree.leaves(part[1]), strict=True)), v.new_zeros(()))
            second: Sequence[Tensor | None] = [None] * len(leafs)
            if inner.requires_grad:
                second = gradients(self.field.model, inner, leafs, scale=self.field.scale)
            h = [torch.zeros_like(t) if s is None else s for s, t in zip(second, leafs, strict=True)]
            like = part[0]
            return (
                v.detach(),
                tree.rebuild(like, [t.detach() for t in g]),
                tree.rebuild(like, [t.detach() for t in h]),
            )

        found = self._chunks(body, joined, owner, {"forward": 1, "backward": 2})
        value, grad, product = (join([f[i] for f in found]) for i in range(3))
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
        if score is None and len(sites) == 1:
            known = self._known_at_x(AtX(sites[0], grad), rows, owner)
            if known is not None:
                return known[0], {sites[0]: known[1]}
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
            a, g = torch.cat([f[1][i] for f in found]), torch.cat([f[2][i] for f in found]) if grad else None
            taps[s] = Tap(a, g) if self.field.is_full else Tap(widened(a), widened(g))
            for t, what in ((taps[s].value, "the activation"), (g, "the gradient")):
                if t is not None and t.shape[0] == len(owner):
                    self._assert_finite(t, f"{what} at {s}", owner)
        return value, taps

    def _known_at_x(self, ask: AtX, rows: Tree, owner: Owner) -> tuple[Tensor, Any] | None:
        """Give value and gradient at the examples, or a site there, from one pass for several methods."""
        common = self._common
        if common is None or self is not self._root or rows is not self.x:
            return None
        plan = self.field.twin().plan
        apart = plan is not None and plan.is_on  # such passes run only where nobody looks inside
        which = apart and ask == AtX()
        asks = [] if which in common.at_x else common.asks_at_x(ask, apart=apart)
        if which not in common.at_x and not asks:
            return None
        if not torch.equal(owner.cpu(), torch.arange(len(self))):
            return None
        if which not in common.at_x:
            try:
                common.at_x[which] = self._pass_at_x(sorted(asks, key=lambda a: a != ask))
            except ApportionError:  # one ask may be at fault, such as a layer that is not there: each on its own
                common.at_x[which] = PassAtX(torch.zeros(0), {}, Account({}), Account({}))
        done = common.at_x[which]
        if ask not in done.found:
            return None
        self.charge(done.forward)
        if ask.grad:
            self.charge(done.backward)
        found = done.found[ask]
        if isinstance(found, ApportionError):
            raise found
        found = found if self.field.is_full else widened(found)
        # a result of its own for each method: what one does to it must not reach the next
        return done.value.clone(), tree.map_tensors(torch.clone, found) if common.wanted[ask] > 1 else found

    def _pass_at_x(self, asks: Sequence[AtX]) -> PassAtX:
        """Read several sites at the examples, and differentiate with respect to all of them, by one pass each way.

        Args:
            asks: what is wanted, what is asked now first; later ones are left out where layers are too large to keep.
        """
        use, own_site = self.field.score, AtX() in asks
        inner = list(dict.fromkeys(a.site for a in asks if a != AtX()))
        sloped = [s for s in inner if AtX(s) in asks]
        read = inner + ([] if use.site is None or use.site in inner else [use.site])
        room = BUDGET
        kept: list[Site] | None = None

        def body(part: Tree, own: Tensor) -> tuple[Tensor, dict[AtX, Any]]:
            nonlocal kept, room
            leafs = [self._leaf(t) if own_site else t for t in tree.leaves(part)]
            names = tree.names(part)
            with torch.set_grad_enabled(own_site or bool(sloped)), self._lean():
                outputs, values = self._call_at(tree.rebuild(part, leafs), own, read, differentiate=bool(sloped))
                v = self._scored(use, outputs if use.site is None else values[use.site], own)
            if kept is None:  # as many layers as may be kept for all examples
                kept = []
                for s in inner:
                    room -= 2 * values[s].numel() * values[s].element_size() * len(self) // len(own)
                    kept += [s] if room >= 0 or s == asks[0].site else []
            groups: list[tuple[AtX, list[Tensor], list[str], str]] = []
            groups += [(AtX(), leafs, names, "")] if own_site else []
            groups += [(AtX(s), [values[s]], [str(s)], str(s)) for s in sloped if s in kept]
            able = [g for g in groups if v.requires_grad and all(t.requires_grad for t in g[1])]
            flat = [t for g in able for t in g[1]]
            slopes = iter(gradients(self.field.model, v.sum(), flat, scale=self.field.scale) if flat else [])
            found: dict[AtX, Any] = {AtX(s, False): Tap(values[s].detach(), None) for s in kept}
            for ask, tensors, called, where in able:
                try:
                    reached = self._reached(v, [next(slopes) for _ in tensors], tensors, called, where)
                except ApportionError as error:
                    found[ask] = error
                    continue
                found[ask] = tree.rebuild(part, reached) if ask == AtX() else Tap(tensors[0].detach(), reached[0])
            return v.detach(), {a: f for a, f in found.items() if a in asks}

        count = {"forward": 1, **({"backward": 1} if own_site or sloped else {})}
        owner = self._owners()
        found, account = self._accounted(lambda: self._chunks(body, self.x, owner, count))
        value = torch.cat([f[0] for f in found])
        joined: dict[AtX, Any] = {}
        for ask in found[0][1]:
            each = [f[1].get(ask) for f in found]
            wrong = next((e for e in each if isinstance(e, ApportionError)), None)
            if wrong is None and any(e is None for e in each):
                continue
            joined[ask] = wrong if wrong is not None else join(each)
            if wrong is None:
                joined[ask] = self._seen_finite(ask, value, joined[ask])
        forward = Account({k: v for k, v in account.spent.items() if k != "backward"}, account.warnings, account.checks)
        return PassAtX(value, joined, forward, Account({"backward": account.spent["backward"]}))

    def _seen_finite(self, ask: AtX, value: Tensor, found: Any) -> Any:
        """Give what was found, or the error that some of it is not finite."""
        owner = self._owners()
        try:
            self._assert_finite(value, "the score", owner)
            if ask == AtX():
                for leaf, name in zip(tree.leaves(found), tree.names(found), strict=True):
                    self._assert_finite(leaf, f"the gradient with respect to {name}", owner)
            else:
                for t, what in zip(found, ("the activation", "the gradient"), strict=True):
                    if t is not None and t.shape[0] == len(owner):
                        self._assert_finite(t, f"{what} at {ask.site}", owner)
        except ApportionError as error:
            return error
        return found

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
        """Make points at the model's input, for those of the examples here, and give the field's site there.

        Args:
            make: gives [B, k, ...] points for a question whose x is the model's input.

        Returns:
            [B, k, ...] points at the field's site.
        """
        outer = copy.copy(self)
        below = tree.index(self._root.inputs, self._in_root) if self.below is None else self.below
        outer.x = outer.inputs = below
        outer._of = self._root
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
        if self.field.prepared.facts.scripted:
            raise RuleError(
                "a TorchScript module, whose operations cannot be intercepted",
                "an eager module",
                "pass the original",
            )

        apart = getattr(rules, "per_example", False)

        def send(part: tuple[Tree, Tree], own: Tensor, **alone: Any) -> _Sent:
            tops: list[Tensor | None] = []
            network = self._network_rows(part[0])
            ref = None if reference is None else self._network_rows(part[1])

            def forward(z: Tree) -> Tensor:
                outputs = self._outputs_from(z, own, score)
                if ref is not None and not tops:  # of the reference rows, which go first; no operation of the model
                    with torch._C.DisableTorchFunction():
                        tops.append(None if score.site is not None else top_class(outputs))
                try:
                    return self._scored(score, outputs, own)
                except RuleError as error:
                    raise _not_linear(score, error) from error

            options: dict[str, Any] = {"start": start, "record": record, "differentiable": differentiable, **alone}
            if self.field.scale != 1 and getattr(rules, "scales", False) and not record:
                options["scale"] = self.field.scale
            done = rules.run(forward, network, ref, **options)
            for message in done.warnings:
                self.warn(message)
            return _Sent(done, network, ref, tops[0] if tops else None)

        def body(part: tuple[Tree, Tree], own: Tensor) -> list[_Sent]:
            done: list[_Sent] = []
            try:
                if not apart or len(own) == 1:
                    return [send(part, own)]
                # what a pass of one row looks like tells on which axes the others lie
                first, rest = slice(0, 1), slice(1, None)
                done = [send(tree.index(part, first), own[first])]
                return [*done, send(tree.index(part, rest), own[rest], alone=done[0].done.shapes)]
            except ExamplesMixed:
                single = [slice(i, i + 1) for i in range(len(done), len(own))]
                return [*done, *(send(tree.index(part, at), own[at]) for at in single)]

        paired = (rows, rows if reference is None else reference)
        count = {"forward": 1 + (reference is not None), "backward": 1}
        chunks = self._chunks(body, paired, owner, count, detach=not differentiable)
        found = [each for chunk in chunks for each in chunk]
        value = torch.cat([f.done.value for f in found])
        self._assert_finite(value.detach(), "the score", owner)
        ref_value = None if reference is None else torch.cat([_not_none(f.done.reference_value) for f in found])
        if ref_value is not None:
            self._assert_finite(ref_value, "the score at the baseline itself", owner, SINGULAR)
        signal = join([f.done.signal for f in found])
        for leaf in tree.leaves(signal):
            self._assert_finite(leaf.detach(), f"the {rules.kind}", owner)
        self._compare_under(rules, (rows, owner, reference), signal, start=start)
        tops = [f.top for f in found if f.top is not None]
        gap = value.detach() - self.value(rows, owner) if rules.surrogate else None
        return Backward(
            value,
            signal,
            rules.kind,
            join([f.network for f in found]),
            None if reference is None else join([f.reference for f in found]),
            ref_value,
            torch.cat(tops) if len(tops) == len(found) else None,
            gap,
            [f.done.tape for f in found],
        )

    def _compare_under(
        self, rules: RuleSet, sent: tuple[Tree, Tensor, Tree | None], signal: Tree, **start: Any
    ) -> None:
        """Measure how far from float32 the signals of a lowered precision are, once for each rule set, and warn."""
        root, lowered = self._root, self.field.lowered
        if self.field.is_full or any(known is rules for known in root._compared):
            return
        root._compared.append(rules)
        rows, owner, reference = sent
        first = slice(0, min(SAMPLE, len(owner)))
        with self.uncounted(), self.field.in_full():
            ref = None if reference is None else tree.index(reference, first)
            right = self.backward(tree.index(rows, first), owner[first], rules, ref, **start).signal
        found = apart(tree.index(signal, first), right) | {"of": f"{rules.kind} under rules"}
        root._under_rules.append(found)
        if message := complaint(lowered, found):
            self.warn(message)

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


def _not_none(value: Tensor | None) -> Tensor:
    if value is None:
        raise ConfigError(
            "a rule set that gave no reference value",
            "one per reference row",
            "return the score of the reference rows in RulePass",
        )
    return value


def _not_linear(score: Score, error: RuleError) -> RuleError:
    """Say that it is the score, and not the model, that a rule set does not know."""
    return RuleError(
        f"the score {score_name(score)}: {error.given.replace(' in the model', '')}",
        "a score that is linear in the outputs, or rules for its operations",
        "explain the logit, score=ap.Logit(), or what speaks for one class against another, score=ap.Contrast()",
    )

"""The conformance checks; each takes an explainer and raises what it finds."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apportion import planted
from apportion.core import tree
from apportion.core.attribution import Attribution, Domain
from apportion.core.card import Card, Kind, Need, Paper, Total
from apportion.core.config import from_config, is_reproducible, to_config
from apportion.core.errors import ApportionError, ConfigError, kind_of, nearest
from apportion.core.explainer import Explainer, Passes
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.together import answers
from apportion.methods.gradient.gradient import Gradient
from apportion.testing.principles import PRINCIPLES, measure, points, ready, score_for
from apportion.testing.trace import differences, snapshot

_MANY = 500
"""Passes of an example beyond which its cost is not asked for in chunks of two rows."""
EXACT = 1e-12
"""Relative error allowed in float64 for the same sums in another order."""


class ConformanceError(AssertionError):
    """An explainer does not keep a promise."""


@dataclass(frozen=True)
class Case:
    """A planted model and points to explain."""

    name: str
    model: nn.Module
    x: Tensor
    target: int | None


def cases(explainer: Explainer) -> list[Case]:
    """Choose the planted models a method can explain."""
    generator = torch.Generator().manual_seed(2)
    pictures = torch.rand(5, 2, 8, 8, generator=generator, dtype=torch.float64)
    out = [Case("convolutional", planted.conv_net(), pictures, 2)]
    if Need.VECTORS in explainer.card.needs:
        out = []
    if Need.SPATIAL not in explainer.card.needs:
        out.append(Case("dense", planted.dense_net(relu=Need.RELU in explainer.card.needs), _points(explainer), 2))
    return out


def _points(explainer: Explainer) -> Tensor:
    return points(5).abs() if Need.NONNEGATIVE in explainer.card.needs else points(5)


def _run(explainer: Explainer, case: Case, at: slice | list[int] = slice(None), **options: object) -> Attribution:
    batch_size = options.pop("batch_size", "auto")
    model = options.pop("model", case.model)
    x = options.pop("x", case.x)
    target = options.pop("target", case.target)
    assert isinstance(x, Tensor)
    ids = list(range(len(x)))
    field = Field(model, score_for(explainer), batch_size=batch_size)  # pyright: ignore[reportArgumentType]
    chosen = [ids[i] for i in at] if isinstance(at, list) else ids[at]
    explainer = ready(explainer, field, x)
    return explainer(field, x[at], target=target, ids=chosen, **options)  # pyright: ignore[reportArgumentType]


def _demand(ok: bool, explainer: Explainer, what: str) -> None:
    if not ok:
        raise ConformanceError(f"{explainer}: {what}")


def _apart(a: Attribution, b: Attribution) -> float:
    """The largest difference, relative to the largest value."""
    worst = 0.0
    for s, t in zip(tree.leaves(a.values), tree.leaves(b.values), strict=True):
        if s.shape != t.shape:
            return float("inf")
        scale = float(torch.maximum(s.abs().max(), t.abs().max()))
        worst = max(worst, float((s - t).abs().max()) / max(scale, 1e-30))
    return worst


def batch_independence(explainer: Explainer) -> None:
    """An example alone, or in another order, gets what it gets in a batch; a map of all gets it in any order."""
    for case in cases(explainer):
        whole = _run(explainer, case)
        if whole.domain is Domain.GLOBAL:
            apart = _apart(whole, _run(explainer, case, [4, 0, 3, 1, 2]))
            _demand(apart <= EXACT, explainer, f"examples in another order differ by {apart:.1e} ({case.name})")
            continue
        for at in ([3], [4, 0]):
            part = _run(explainer, case, at)
            mine = tree.index(whole.values, at)
            apart = max(
                float((a - b).abs().max() / max(float(a.abs().max()), 1e-30))
                for a, b in zip(tree.leaves(mine), tree.leaves(part.values), strict=True)
            )
            _demand(apart <= EXACT, explainer, f"examples {at} alone differ by {apart:.1e} ({case.name})")


def chunk_invariance(explainer: Explainer) -> None:
    """Rows per pass do not change values."""
    for case in cases(explainer):
        few = [0, 1]  # enough for chunks that hold rows of several examples, and parts of one
        auto = _run(explainer, case, few)
        for size in (1, 7):
            apart = _apart(auto, _run(explainer, case, few, batch_size=size))
            _demand(apart <= EXACT, explainer, f"values differ by {apart:.1e} at {size} rows a pass ({case.name})")


def determinism(explainer: Explainer) -> None:
    """The same question gets the same bits, whatever the global random state."""
    for case in cases(explainer):
        first = _run(explainer, case, seed=3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            second = _run(explainer, case, seed=3)
        _demand(_apart(first, second) == 0, explainer, f"two runs with one seed differ ({case.name})")


def dtype_and_device(explainer: Explainer) -> None:
    """Results have the input's dtype and device; float32 is near float64."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for case in cases(explainer):
        exact = _run(explainer, case)
        for device in devices:
            model = copy.deepcopy(case.model).to(device).float()
            x = case.x.to(device).float()
            rough = _run(explainer, case, model=model, x=x)
            for leaf in tree.leaves(rough.values):
                _demand(leaf.dtype == torch.float32, explainer, f"float32 in, {leaf.dtype} out ({case.name})")
                _demand(leaf.device == x.device, explainer, f"{x.device} in, {leaf.device} out ({case.name})")
            apart = _apart(exact, rough.to("cpu"))
            _demand(apart <= 1e-3, explainer, f"float32 is {apart:.1e} from float64 on {device} ({case.name})")


class _Failing(nn.Module):
    """Raises on the n-th call, counted outside the module."""

    def __init__(self, inner: nn.Module, calls: list[int], fail_at: int) -> None:
        super().__init__()
        self.inner = inner
        self._count, self._fail_at = _Counter(calls), fail_at

    def forward(self, x: Tensor) -> Tensor:
        if self._count.next() == self._fail_at:
            raise ValueError("planted failure")
        return self.inner(x)


class _Counter:
    """Counts in a list shared with copies of the module, as state outside it would."""

    def __init__(self, calls: list[int]) -> None:
        self.calls = calls

    def __deepcopy__(self, memo: object) -> _Counter:
        return self

    def next(self) -> int:
        self.calls[0] += 1
        return self.calls[0]


def _marked(model: nn.Module) -> nn.Module:
    """Give a model gradients, mixed flags and a hook, all of which must stay."""
    model = copy.deepcopy(model)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
        if i % 2 == 0:
            p.grad = torch.full_like(p, 0.5)
    next(iter(model.children())).register_forward_hook(lambda *_: None)
    return model


def no_trace(explainer: Explainer) -> None:
    """The model and the process are bit for bit as before, after success and after failure inside the model."""
    for case in cases(explainer):
        model = _marked(case.model)
        before = snapshot(model)
        _run(explainer, case, model=model)
        changed = differences(before, snapshot(model))
        _demand(not changed, explainer, f"left a trace: {changed} ({case.name})")
        for fail_at in range(1, 9):
            failing = _Failing(_marked(case.model), [0], fail_at)
            before = snapshot(failing)
            try:
                _run(explainer, case, model=failing, batch_size=3)
                failed = False
            except ApportionError as error:
                failed = True
                told = "planted failure" in str(error) and isinstance(error.__cause__, ValueError)
                _demand(told, explainer, f"hid the model's own error: {error} ({case.name})")
            changed = differences(before, snapshot(failing))
            _demand(not changed, explainer, f"left a trace after failing at call {fail_at}: {changed} ({case.name})")
            _demand(failed or fail_at > 5, explainer, f"swallowed an error of call {fail_at} ({case.name})")


def threads(explainer: Explainer) -> None:
    """Two threads that use one field at once get what one gets alone."""
    for case in cases(explainer):
        field, x = Field(case.model, score_for(explainer), batch_size=2), case.x[:3]
        learned = ready(explainer, field, x)
        alone = learned(field, x, target=case.target, ids=range(3))
        found: list[Attribution | BaseException] = []

        def work(
            learned: Explainer = learned,
            field: Field = field,
            x: Tensor = x,
            case: Case = case,
            found: list[Attribution | BaseException] = found,
        ) -> None:
            try:
                found.append(learned(field, x, target=case.target, ids=range(3)))
            except BaseException as error:
                found.append(error)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        for one in found:
            if isinstance(one, BaseException):
                raise ConformanceError(f"{explainer}: failed in a thread ({case.name})") from one
            _demand(_apart(alone, one) <= EXACT, explainer, f"threads disturb each other ({case.name})")


def config_round_trip(explainer: Explainer) -> None:
    """The configuration goes through JSON and back to an explainer with the same bits."""
    case = cases(explainer)[0]
    explainer = ready(explainer, Field(case.model), case.x)
    tensors: dict[str, Tensor] = {}
    config = json.loads(json.dumps(to_config(explainer, tensors)))
    if not is_reproducible(config):
        return
    again = from_config(config, tensors)
    _demand(to_config(again) == to_config(explainer), explainer, "its configuration does not survive JSON")
    first = _run(explainer, case)
    _demand(_apart(first, _run(again, case)) == 0, explainer, "its rebuilt twin gives other values")
    _demand(first.method == config, explainer, "the result records another configuration")


def cost(explainer: Explainer) -> None:
    """Rows spent on every example are what `passes` says."""
    for case in cases(explainer):
        some = slice(3)
        said = explainer.passes(Field(case.model, score_for(explainer)).bind(case.x[some], target=case.target))
        few = said.forward + said.backward <= _MANY
        spent = _run(explainer, case, some, batch_size=2 if few else "auto").cost
        want = {"forward": said.forward + said.once, "backward": said.backward + said.once_backward, "at_x": said.at_x}
        for what, number in want.items():
            got = getattr(spent, what)
            exact = explainer.card.exact_cost and said.exact
            ok = (got == number).all() if exact else (got <= number).all()
            relation = "exactly" if exact else "at most"
            _demand(bool(ok), explainer, f"{what}: says {relation} {number}, spent {got.tolist()} ({case.name})")


def company(explainer: Explainer) -> None:
    """In a list with itself and others it gives what it gives alone, to the bit, at the same cost."""
    case, some = cases(explainer)[0], slice(3)
    field = Field(case.model, score_for(explainer))
    explainer = ready(explainer, field, case.x)
    asked = [explainer, Gradient(), explainer]
    found = list(answers(field, case.x[some], asked, target=case.target, ids=[0, 1, 2]))
    alone = _run(explainer, case, some)
    for a in (found[0], found[2]):
        if isinstance(a, Exception):
            raise a
        _demand(_apart(alone, a) == 0, explainer, "in a list of methods it gives other values than alone")
        same = torch.equal(a.cost.forward, alone.cost.forward) and torch.equal(a.cost.backward, alone.cost.backward)
        _demand(same, explainer, "in a list of methods its cost is another than alone")
        _demand(a.warnings == alone.warnings, explainer, "in a list of methods it warns of other things")


def shape(explainer: Explainer) -> None:
    """Values on the input are shaped as it is; values elsewhere have the examples on the first axis."""
    for case in cases(explainer):
        a = _run(explainer, case)
        for leaf in tree.leaves(a.values):
            got = tuple(leaf.shape)
            if a.domain is Domain.INPUT:
                _demand(got == tuple(case.x.shape), explainer, f"{got} on an input of {tuple(case.x.shape)}")
            elif a.domain is not Domain.GLOBAL:
                _demand(len(got) > 1 and got[0] == len(case.x), explainer, f"{got} for {len(case.x)} examples")


def anew(explainer: Explainer) -> None:
    """Asked anew about moved examples, as metrics of stability do, it answers what a call about them gets.

    Explainers that draw random numbers are let off: each copy has numbers of its own.
    """
    for case in cases(explainer):
        if _apart(_run(explainer, case, seed=1), _run(explainer, case, seed=2)) > 0:
            continue
        field = Field(case.model, score_for(explainer))
        fitted = ready(explainer, field, case.x)
        q = field.bind(case.x, target=case.target)
        owner = torch.tensor([3, 0, 3])
        rows = case.x[owner] + 0.05 * torch.arange(1.0, 4.0, dtype=case.x.dtype).reshape(-1, *[1] * (case.x.ndim - 1))
        copies = fitted.explain(q.anew(rows, owner, torch.tensor([0, 0, 1])))
        if copies.domain is Domain.GLOBAL:
            continue
        apart = _apart(copies, fitted(field, rows, target=case.target))
        _demand(apart <= EXACT, explainer, f"moved examples get other values, by {apart:.1e} ({case.name})")


def target(explainer: Explainer) -> None:
    """The map is that of the target asked for; without one, that of the class that is highest at the example."""
    for case in cases(explainer):
        asked = _run(explainer, case)
        others = [_run(explainer, case, target=t) for t in range(3) if t != case.target]
        depends = any(_apart(asked, other) > 1e-9 for other in others)
        if explainer.card.scored:
            _demand(depends, explainer, f"all targets get the same values ({case.name})")
        else:
            _demand(not depends, explainer, f"targets get different values, against its Card ({case.name})")
            continue
        if Need.LOSS in explainer.card.needs:
            continue  # labels are never chosen for the user
        x = torch.cat([case.x, *_between_classes(case)])
        with torch.no_grad():
            top = case.model(x).argmax(1).tolist()
        free, given = (_run(explainer, case, x=x, target=t) for t in (None, top))
        apart = _apart(free, given)
        _demand(apart <= EXACT, explainer, f"target=None differs from the top classes by {apart:.1e} ({case.name})")


def _between_classes(case: Case) -> Iterator[Tensor]:
    """Find points so near to where the top class changes that most noise changes it."""
    far = torch.randn(40, *case.x.shape[1:], generator=torch.Generator().manual_seed(4), dtype=case.x.dtype) * 3
    with torch.no_grad():
        top = case.model(far).argmax(1)
        for i in (top != top[0]).nonzero()[:5, 0].tolist():
            low, high = far[:1], far[i : i + 1]
            for _ in range(30):
                middle = (low + high) / 2
                same = case.model(middle).argmax() == top[0]
                low, high = (middle, high) if same else (low, middle)
            yield high


def sign(explainer: Explainer) -> None:
    """Values are not all zero, and on a linear model what raises the score is positive, unless the Card waives it."""
    for case in cases(explainer):
        maps = [_run(explainer, case, target=t).values for t in range(3)]  # one class may have nothing positive
        found = any(bool(leaf.any()) for values in maps for leaf in tree.leaves(values))
        _demand(found, explainer, f"all values are zero ({case.name})")
    if not explainer.signed:
        return
    if Need.SPATIAL in explainer.card.needs:
        rising = Case("rising", _rising(), cases(explainer)[0].x, 1)
        leaves = tree.leaves(_run(explainer, rising).values)
        ok = all(bool((leaf >= 0).all()) and bool(leaf.any()) for leaf in leaves)
        _demand(ok, explainer, "values are not positive where everything raises the score")
        return
    weight = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0], dtype=torch.float64)
    a = _run(explainer, _linear(explainer))
    if a.domain is not Domain.INPUT:
        return
    want = weight.expand_as(_linear(explainer).x)
    if explainer.kind is Kind.SALIENCE:
        start = 0 if a.references is None else tree.leaves(a.references.rows)[0].mean(1)
        want = want * (_linear(explainer).x - start)
    matters = want.abs() >= 0.5 * want.abs().amax(1, keepdim=True)
    ok = bool((tree.leaves(a.values)[0] * want > 0)[matters].all())
    _demand(ok, explainer, "on a linear model values do not have the sign of what they do to the score")


def _linear(explainer: Explainer) -> Case:
    return Case("linear", planted.Linear([1.0, -2.0, 3.0, 0.5, 0.0], 0.3), _points(explainer), 0)


def _rising() -> nn.Module:
    """Build a picture classifier without a negative weight."""
    model = planted.conv_net()
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()
        model.get_buffer("norm.running_mean").zero_()
    return model


def precision(explainer: Explainer) -> None:
    """What is asked in float64 is computed in float64: changes too small for float32 move the values."""
    for case in cases(explainer):

        def moved(by: float, case: Case = case) -> float:
            before, after = _run(explainer, case), _run(explainer, case, x=case.x * (1 + by))
            pairs = zip(tree.leaves(before.values), tree.leaves(after.values), strict=True)
            return float(torch.cat([(s != t).double().flatten() for s, t in pairs]).mean())

        # maps made of steps, such as ranks, are moved by neither
        coarse, fine = moved(1e-3), moved(1e-11)
        _demand(
            coarse <= 0.3 or fine >= coarse / 4,
            explainer,
            f"float64 in, but computed with fewer digits: a change of x by 1e-11 moves {fine:.0%} of the values, "
            f"one by 1e-3 {coarse:.0%} ({case.name})",
        )


def claims(explainer: Explainer) -> None:
    """The value is f(x); the total claimed is the Card's, computed anew, and is met on a linear model."""
    card = explainer.card
    for case in cases(explainer):
        a = _run(explainer, case)
        with torch.no_grad():
            fx = _scores(explainer, case, case.x)
        _near(a.value, fx, explainer, f"records a value that is not f(x) ({case.name})")
        _demand(a.kind is explainer.kind, explainer, "the result answers another question than the explainer")
        if a.kind is Kind.SENSITIVITY:
            _demand(a.gap is None, explainer, "a sensitivity claims a total")
        if card.total is Total.OF_BASE:
            continue
        claimed = a.claimed_total
        if card.total is Total.NOTHING or claimed is None:
            _demand(
                (claimed is None) == (card.total is Total.NOTHING), explainer, "the total it claims is not its Card's"
            )
            continue
        want = {Total.VALUE: fx, Total.ONE: torch.ones_like(fx)}.get(card.total)
        if card.total is Total.VALUE_LESS_PARTS:
            want = fx - tree.total(list(a.parts.values())) if a.parts else fx
        if want is None:
            want = _difference(explainer, a, case, fx) * (-1 if card.total is Total.REDUCTION else 1)
            want = want.mean(0, keepdim=True) if a.domain is Domain.GLOBAL else want
        _near(
            claimed,
            want,
            explainer,
            f"claims another total than {card.total} ({case.name})",
        )
    if card.total is Total.OF_BASE:
        _claims_of_base(explainer)
    if Need.SPATIAL in card.needs or not card.total:
        return
    a = _run(explainer, _linear(explainer))
    if a.gap is not None:
        worst = float(a.gap.abs().max())
        _demand(worst <= 1e-9, explainer, f"misses its total by {worst:.1e} on a linear model")


def _scores(explainer: Explainer, case: Case, x: Tensor) -> Tensor:
    """Score some points for the case's target, or its only output."""
    outputs, score = case.model(x), score_for(explainer)
    if score is not None:
        return score(outputs, torch.full((len(x),), case.target or 0))
    return outputs if outputs.ndim == 1 else outputs[:, case.target]


def _near(got: Tensor, want: Tensor, explainer: Explainer, what: str) -> None:
    same = got.shape == want.shape and bool(((got - want).abs() <= 1e-9 * (1 + want.abs())).all())
    _demand(same, explainer, f"{what}: {got.tolist()} instead of {want.tolist()}")


def _difference(explainer: Explainer, a: Attribution, case: Case, fx: Tensor) -> Tensor:
    if a.references is None and a.domain is Domain.GLOBAL:  # the examples are the background, outputs are averaged
        with torch.no_grad():
            mean = case.model(case.x).mean(0, keepdim=True).expand(len(case.x), -1)
        return fx - _scores(explainer, dataclasses.replace(case, model=nn.Identity()), mean)
    if a.references is None:
        raise ConformanceError(f"{explainer}: claims a difference and records no references")
    rows = tree.leaves(a.references.rows)[0]
    with torch.no_grad():
        there = _scores(explainer, case, rows.flatten(0, 1)).reshape(rows.shape[:2])
    _near(a.references.value, there, explainer, f"records other scores at its references ({case.name})")
    return fx - there.mean(1)


@dataclass(frozen=True)
class _Claiming(Explainer):
    """A base whose values do not sum to what it claims, which is 7; it claims nothing without `claims`."""

    card = Card("Base", Paper("", 0, "", ""), Kind.SALIENCE, "Claims 7.", "1 forward, 1 backward", differentiable=True)
    claims: bool = True

    def explain(self, q: Question) -> Attribution:
        value, grad = q.value_and_grad(q.x, torch.arange(len(q)))
        return q.attribution(
            self, grad, value=value, claimed_total=torch.full_like(value, 7.0) if self.claims else None
        )

    def passes(self, q: Question | None = None) -> Passes:
        return Passes(1, 1)


def _claims_of_base(explainer: Explainer) -> None:
    _demand(
        isinstance(getattr(explainer, "base", None), Explainer), explainer, "claims its base's total without a base"
    )
    for claiming in (True, False):
        a = _run(dataclasses.replace(explainer, base=_Claiming(claiming)), cases(explainer)[-1])  # pyright: ignore[reportCallIssue]
        what = "claims another total than its base"
        if claiming and a.claimed_total is not None:
            _near(a.claimed_total, torch.full_like(a.value, 7.0), explainer, what)
        else:
            _demand((a.claimed_total is None) != claiming, explainer, what)


def differentiable(explainer: Explainer) -> None:
    """The derivative of the attribution agrees with finite differences, where the Card declares one."""
    case = cases(explainer)[-1]
    x = case.x[:2].clone().requires_grad_()
    if not explainer.differentiable:
        try:
            _run(explainer, case, x=x, differentiable=True)
        except ApportionError:
            return
        raise ConformanceError(f"{explainer}: accepts differentiable=True against its Card")
    values = tree.leaves(_run(explainer, case, x=x, differentiable=True).values)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values]

    def weighed(at: Tensor) -> Tensor:
        found = tree.leaves(_run(explainer, case, x=at).values)
        return torch.stack([(v * w).sum() for v, w in zip(found, weights, strict=True)]).sum()

    (slope,) = torch.autograd.grad(torch.stack([(v * w).sum() for v, w in zip(values, weights, strict=True)]).sum(), x)
    step = 1e-6
    for _ in range(3):
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        start = x.detach()
        finite = float(weighed(start + step * direction) - weighed(start - step * direction)) / (2 * step)
        exact = float((slope * direction).sum())
        scale = max(abs(finite), abs(exact), 1e-6)
        _demand(
            abs(finite - exact) <= 1e-5 * scale, explainer, f"derivative {exact:.8g}, finite differences {finite:.8g}"
        )


def principles(explainer: Explainer) -> None:
    """Every principle the Card gives as measured comes out as it says, both ways."""
    if Need.SPATIAL in explainer.card.needs:
        return
    for principle, holds in explainer.card.measured.items():
        _demand(principle in PRINCIPLES, explainer, f"{principle.name} is given as measured but has no check")
        if explainer != type(explainer)():
            continue  # Cards speak of the default configuration
        found = measure(explainer, principle)
        _demand(found == holds, explainer, f"{principle.name}: the Card says {holds}, measured {found}")


def _named(check: Callable[[Explainer], None]) -> Callable[[Explainer], None]:
    """Turn whatever an explainer raises inside a check into a finding of that check."""

    @functools.wraps(check)
    def run(explainer: Explainer) -> None:
        try:
            check(explainer)
        except ConformanceError:
            raise
        except Exception as error:
            raise ConformanceError(f"{explainer}: {check.__name__} met {type(error).__name__}: {error}") from error

    return run


CHECKS: dict[str, Callable[[Explainer], None]] = {
    c.__name__: _named(c)
    for c in (
        shape,
        batch_independence,
        chunk_invariance,
        determinism,
        dtype_and_device,
        precision,
        no_trace,
        threads,
        config_round_trip,
        cost,
        company,
        claims,
        anew,
        target,
        sign,
        differentiable,
        principles,
    )
}
"""The checks by name."""


def check_explainer(explainer: Explainer, checks: Iterable[str] | None = None) -> None:
    """Hold an explainer to everything the library asks of its methods.

    Args:
        explainer: an instance; its class has a Card.
        checks: names from `CHECKS`; all unless given.

    Raises:
        ConformanceError: the first promise that is not kept, or what the explainer raised meanwhile.
        ConfigError: not an explainer with a Card, or no such check.

    >>> import apportion as ap
    >>> check_explainer(ap.Gradient(), ["cost", "claims"])
    """
    if not isinstance(explainer, Explainer):
        name = explainer.__name__ if isinstance(explainer, type) else "ap.Gradient"
        raise ConfigError(f"{kind_of(explainer)} as explainer", "an instance of an ap.Explainer", f"write {name}()")
    if not isinstance(getattr(type(explainer), "card", None), Card):
        raise ConfigError(
            f"{type(explainer).__name__} without a Card", "a Card to hold it to", "put @ap.register(ap.Card(...)) on it"
        )
    if isinstance(checks, str):
        raise ConfigError(f"checks={checks!r}", "a list of names", f"write checks=[{checks!r}]")
    chosen = list(CHECKS) if checks is None else list(checks)
    for name in chosen:
        if name not in CHECKS:
            raise ConfigError(f"no check named {name!r}", nearest(str(name), CHECKS), "list the names with CHECKS")
    for name in chosen:
        CHECKS[name](explainer)

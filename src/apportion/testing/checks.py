"""The conformance checks; each takes an explainer and raises what it finds."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apportion import planted
from apportion.core import tree
from apportion.core.attribution import Attribution
from apportion.core.card import Kind, Need
from apportion.core.config import from_config, is_reproducible, to_config
from apportion.core.errors import ApportionError
from apportion.core.explainer import Explainer
from apportion.core.field import Field
from apportion.testing.principles import PRINCIPLES, measure, points
from apportion.testing.trace import differences, snapshot

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
    target: int


def cases(explainer: Explainer) -> list[Case]:
    """Choose the planted models a method can explain."""
    generator = torch.Generator().manual_seed(2)
    pictures = torch.rand(5, 2, 8, 8, generator=generator, dtype=torch.float64)
    out = [Case("convolutional", planted.conv_net(), pictures, 1)]
    if Need.SPATIAL not in explainer.card.needs:
        out.append(Case("dense", planted.dense_net(), points(5), 2))
    return out


def _run(explainer: Explainer, case: Case, at: slice | list[int] = slice(None), **options: object) -> Attribution:
    batch_size = options.pop("batch_size", "auto")
    model = options.pop("model", case.model)
    x = options.pop("x", case.x)
    assert isinstance(x, Tensor)
    ids = list(range(len(x)))
    field = Field(model, batch_size=batch_size)  # pyright: ignore[reportArgumentType]
    chosen = [ids[i] for i in at] if isinstance(at, list) else ids[at]
    return explainer(field, x[at], target=case.target, ids=chosen, **options)  # pyright: ignore[reportArgumentType]


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
    """An example alone, or in another order, gets what it gets in a batch; random numbers too."""
    for case in cases(explainer):
        whole = _run(explainer, case)
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
        auto = _run(explainer, case)
        for size in (1, 7):
            apart = _apart(auto, _run(explainer, case, batch_size=size))
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
        field = Field(case.model, batch_size=3)
        alone = explainer(field, case.x, target=case.target, ids=range(5))
        found: list[Attribution | BaseException] = []

        def work(field: Field = field, case: Case = case, found: list[Attribution | BaseException] = found) -> None:
            try:
                found.append(explainer(field, case.x, target=case.target, ids=range(5)))
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
    tensors: dict[str, Tensor] = {}
    config = json.loads(json.dumps(to_config(explainer, tensors)))
    if not is_reproducible(config):
        return
    again = from_config(config, tensors)
    _demand(to_config(again) == to_config(explainer), explainer, "its configuration does not survive JSON")
    case = cases(explainer)[0]
    first = _run(explainer, case)
    _demand(_apart(first, _run(again, case)) == 0, explainer, "its rebuilt twin gives other values")
    _demand(first.method == config, explainer, "the result records another configuration")


def cost(explainer: Explainer) -> None:
    """Rows spent on every example are what `passes` says."""
    for case in cases(explainer):
        said = explainer.passes(Field(case.model).bind(case.x, target=case.target))
        spent = _run(explainer, case, batch_size=3).cost
        want = {"forward": said.forward + said.once, "backward": said.backward, "at_x": said.at_x}
        for what, number in want.items():
            got = getattr(spent, what)
            ok = (got == number).all() if explainer.card.exact_cost else (got <= number).all()
            relation = "exactly" if explainer.card.exact_cost else "at most"
            _demand(bool(ok), explainer, f"{what}: says {relation} {number}, spent {got.tolist()} ({case.name})")


def claims(explainer: Explainer) -> None:
    """The claimed total fits the kind and the Card, and is met on a linear model."""
    card = explainer.card
    for case in cases(explainer):
        a = _run(explainer, case)
        _demand(a.kind is explainer.kind, explainer, "the result answers another question than the explainer")
        if a.kind is Kind.SENSITIVITY:
            _demand(a.gap is None, explainer, "a sensitivity claims a total")
        elif card.kind is not None:
            _demand(
                (a.gap is None) == (not card.total),
                explainer,
                "the total it claims is not its Card's",
            )
    if Need.SPATIAL in card.needs or not card.total:
        return
    linear = Case("linear", planted.Linear([1.0, -2.0, 3.0, 0.5, 0.0], 0.3), points(5), 0)
    a = _run(explainer, linear)
    if a.gap is not None:
        worst = float(a.gap.abs().max())
        _demand(worst <= 1e-9, explainer, f"misses its total by {worst:.1e} on a linear model")


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


CHECKS: dict[str, Callable[[Explainer], None]] = {
    c.__name__: c
    for c in (
        batch_independence,
        chunk_invariance,
        determinism,
        dtype_and_device,
        no_trace,
        threads,
        config_round_trip,
        cost,
        claims,
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
        ConformanceError: the first promise that is not kept.

    >>> import apportion as ap
    >>> check_explainer(ap.Gradient(), ["cost", "claims"])
    """
    for name in CHECKS if checks is None else checks:
        CHECKS[name](explainer)

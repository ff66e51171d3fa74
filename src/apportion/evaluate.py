"""One call: methods, data, metrics."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import RandomSampler

from apportion.bulk.evaluation import Evaluation
from apportion.bulk.examples import examples, length
from apportion.bulk.runner import Estimate, Found, Judged, Runner, join
from apportion.bulk.store import Store
from apportion.core.attribution import Attribution
from apportion.core.config import Json, to_config, whole
from apportion.core.errors import ApportionError, ConfigError, InputError, kind_of
from apportion.core.external import GivenMap
from apportion.core.field import Field
from apportion.core.registry import methods as registered
from apportion.core.registry import spelled
from apportion.core.score import Target
from apportion.metrics.metric import Metric, Subject
from apportion.metrics.metric import metric as metric_named
from apportion.one_call import as_explainer
from apportion.parts import controls as knowing_nothing

_RANDOM = (knowing_nothing.Random(),)


def evaluate(
    methods: Any,
    field: Field,
    data: Any,
    metrics: Any,
    *,
    controls: Any = _RANDOM,
    truth: Any = None,
    target: Target = None,
    ids: Sequence[Any] | None = None,
    seed: int = 0,
    batch: int = 64,
    out: Any = None,
    strict: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Any:
    """Judge methods by metrics over data, beside maps that know nothing of the model.

    Batches are read one after the other and nothing of them is kept but the scores. Methods of a batch share the
    passes they have in common, and so do the metrics of a method.

    Args:
        methods: a list, or a dict by the names that results shall use, of names from `ap.methods()`, explainers,
            attributions, and tensors or arrays of maps of all examples (from captum, shap, a file).
        field: what is asked of which model.
        data: the examples, or an iterable of batches: x, (x, labels), or dicts with x and any of target, truth and ids.
        metrics: likewise of names from `ap.metrics.names()` and metrics.
        controls: judged beside: names of `ap.controls`, such as "edges", or what methods may be; () for none.
        truth: what metrics compare with, one entry for each of all examples; a dict of such by the name of the metric
            where they differ.
        target: as `Field.bind` takes it, with one entry for each of all examples where they differ.
        ids: one name for each of all examples; a hash of its content unless given.
        seed: of all random numbers.
        batch: the most examples at once; results do not depend on it.
        out: the path of a folder that keeps what is finished; called again on the same data, the rest is done.
        strict: raise the first error of a method or metric, instead of recording it as the reason for undefined scores.
        dry_run: give the estimate of passes, and do nothing.
        quiet: print neither the estimate nor what went wrong.

    Returns:
        An `Evaluation`; or an `Estimate` for a dry run.

    Raises:
        ConfigError: what is no method or metric; two of one name; a truth that is missing or not needed; a folder
            of other settings or other data.
        BaselineError: a metric that removes features to noise between bounds, as `aopc` does, of a field without.
        InputError: no data, or a number of entries that is not that of the examples; truths or given maps that do not
            fit them, or attributions made of others.

    >>> import torch, apportion as ap
    >>> field, x = ap.Field(lambda x: (x**2).sum(1)), torch.rand(6, 4)
    >>> found = evaluate(["gradient", "gradient_times_input"], field, x, ["sparseness"], quiet=True)
    >>> found.methods, found.metrics, found.controls, len(found)
    (('gradient', 'gradient_times_input'), ('sparseness',), ('Random',), 6)
    """
    if not isinstance(field, Field):
        raise ConfigError(f"{kind_of(field)} as field", "an ap.Field", "write ap.Field(model)")
    size = whole(batch)
    if size is None or size < 1:
        raise ConfigError(f"batch={batch!r}", "a positive int", "leave it out for 64")
    if (number := whole(seed)) is None:
        raise ConfigError(f"seed={seed!r}", "an int", "give a whole number")
    if out is not None and not isinstance(out, str | os.PathLike):
        raise ConfigError(f"{kind_of(out)} as out", "the path of a folder", "write out='results'")
    judged = _named(methods, _judged, "method")
    by = _named(metrics, _metric, "metric")
    beside = _named(controls, _control, "control", none=True)
    if both := set(judged) & set(beside):
        raise ConfigError(f"{min(both)!r} among methods and controls", "two names", "give a dict of names")
    if truth is not None and not any(m.card.truth for m in by.values()):
        raise ConfigError("truth for metrics that compare with none", "no truth", "leave truth out")
    if isinstance(truth, Mapping) and not set(truth) <= set(by):
        raise ConfigError(f"truth for {sorted(set(truth) - set(by))}", f"of {sorted(by)}", "name the metrics")
    runner = Runner(field, judged, by, beside, number, strict)
    runner.check()
    of_all = {"target": target is not None and not isinstance(target, int), "truth": truth is not None}
    of_all |= {"ids": ids is not None, **{n: isinstance(j, Attribution | GivenMap) for n, j in judged.items()}}
    if isinstance(getattr(data, "sampler", None), RandomSampler) and (
        outside := [n for n, own in of_all.items() if own]
    ):
        raise InputError(
            f"{outside[0]} of all examples beside a DataLoader that shuffles",
            "examples in a fixed order",
            "write shuffle=False, or give batches as dicts with x, target, truth and ids",
        )
    batches = examples(data, size, target, truth, ids)
    first = next(batches, None)
    if first is None:
        raise InputError("data without examples", "one example at least", "check the data")
    count = length(data)
    if dry_run or not quiet:
        estimate = runner.estimate(first, count)
        if dry_run:
            return estimate
        print(estimate, flush=True)
    settings = runner.settings(weighed=out is not None)
    store = None if out is None else Store(out, settings)
    found: dict[str, list[Found]] = {name: [] for name in runner.judged}
    for name, one in runner.run(chain([first], batches), count, store):
        found[name].append(one)
    evaluation = _together({name: join(parts) for name, parts in found.items()}, runner, settings)
    if not quiet:
        for line in evaluation.told_failures():
            print(line, flush=True)
    return evaluation


def _together(found: Mapping[str, Found], runner: Runner, settings: Json) -> Evaluation:
    """Lay the controls' scores beside those of every method."""
    scores = {}
    for name in runner.methods:
        scores[name] = {m: runner.beside(s, m, found) for m, s in found[name].scores.items()}
    return Evaluation(
        scores,
        {name: found[name].cost for name in runner.methods},
        settings,
        {name: found[name].warnings for name in runner.methods if found[name].warnings},
    )


def _judged(given: Any) -> Judged:
    if isinstance(given, Attribution):
        return given
    if isinstance(given, Tensor | np.ndarray):
        return GivenMap(given)
    return as_explainer(given)


def _control(given: Any) -> Judged:
    if not isinstance(given, str):
        return _judged(given)
    own = knowing_nothing.names()
    found = spelled(given, (*own, *registered()), "control or method", f"controls are {', '.join(own)}")
    return knowing_nothing.named(found)() if found in own else as_explainer(found)


def _metric(given: Any) -> Metric:
    if isinstance(given, str):
        made = metric_named(given)
        unset = [f.name for f in fields(made) if f.default is MISSING and f.default_factory is MISSING]
        if unset:
            how = ", ".join(f"{name}=..." for name in unset)
            raise ConfigError(
                f"the metric {given!r} by its name alone", f"{' and '.join(unset)} too", f"give {made.__name__}({how})"
            )
        return made()
    if isinstance(given, Metric):
        return given
    if isinstance(given, type) and issubclass(given, Metric):
        raise ConfigError(f"the class {given.__name__} as metric", "an instance or a name", f"write {given.__name__}()")
    raise ConfigError(f"{kind_of(given)} as metric", "a name or a metric", "ap.metrics.names() lists the names")


def _named(given: Any, make: Any, what: str, none: bool = False) -> dict[str, Any]:
    """Give things with the names that results use: those given, or the class with the options that tell them apart."""
    if isinstance(given, Mapping):
        if bad := [k for k in given if not isinstance(k, str) or not k]:
            raise ConfigError(f"{bad[0]!r} as the name of a {what}", "a str", "name it")
        found = {k: _called(k, v, make) for k, v in given.items()}
    else:
        several = isinstance(given, Iterable) and not isinstance(given, str | Tensor | np.ndarray)
        each = list(given) if several else [given]
        made = [make(v) for v in each]
        base = [v if isinstance(v, str) else _name(m) for v, m in zip(each, made, strict=True)]
        pairs = list(zip(base, made, strict=True))
        labels = [_told_apart(label, m, [o for b, o in pairs if b == label]) for label, m in pairs]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ConfigError(f"two {what}s called {twice[0]}", "a name for each", f"give a dict of {what}s by name")
        found = dict(zip(labels, made, strict=True))
    if not found and not none:
        raise ConfigError(f"no {what}", "one at least", f"name a {what}")
    return found


def _called(name: str, given: Any, make: Any) -> Any:
    try:
        made = make(given)
    except ApportionError as error:
        raise error.about(name) from error
    return replace(made, name=name) if isinstance(made, GivenMap) and made is not given else made


def _name(made: Any) -> str:
    return type(made).__name__ if isinstance(made, Metric) else Subject(made).name


def _told_apart(label: str, made: Any, alike: Sequence[Any]) -> str:
    """Add the options in which things of one class differ."""
    flat = [_flat(o.method if isinstance(o, Attribution) else to_config(o)) for o in alike]
    own = _flat(made.method if isinstance(made, Attribution) else to_config(made))
    paths = dict.fromkeys(p for f in flat for p in f)
    told = [f"{p}={own[p]}" for p in paths if p in own and len({repr(f.get(p)) for f in flat}) > 1]
    return f"{label}({', '.join(told)})" if told else label


def _flat(config: Json, path: str = "") -> dict[str, Any]:
    if isinstance(config, dict) and "tensor" not in config:
        found = {}
        for key, value in config.items():
            inner = path if key == "type" else f"{path}.{key}" if path else key
            found |= _flat(value, inner)
        return found
    return {path: config["tensor"][:8] if isinstance(config, dict) else config}


__all__ = ["Estimate", "evaluate"]

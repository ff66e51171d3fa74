"""The one runner over many examples: batches are bound once, methods asked once, and metrics share what they can."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from apportion.bulk.examples import Batch, mark, taken
from apportion.bulk.store import Store
from apportion.core import tree
from apportion.core.attribution import Attribution, Cost
from apportion.core.config import Configurable, Json, digest, is_reproducible, to_config
from apportion.core.errors import (
    ApportionError,
    BaselineError,
    ConfigError,
    InputError,
    ModelError,
    NoGradientPathError,
    NonFiniteError,
    OutOfMemoryError,
    RuleError,
    SiteError,
)
from apportion.core.explainer import Explainer, Passes
from apportion.core.external import External, GivenMap, fitted
from apportion.core.field import Field
from apportion.core.progress import progress, tick
from apportion.core.question import Question
from apportion.core.together import answered, asks, named
from apportion.metrics.metric import Judges, Metric, Subject, as_asked, in_common
from apportion.metrics.scores import Scores, told_once
from apportion.parts.baselines import Baseline, Given
from apportion.parts.masks.groups import ByExample

_OF_THE_MODEL = (ConfigError, ModelError, NoGradientPathError, RuleError, SiteError)
"""Errors that no other example would be spared."""

_THE_ONLY = re.compile(r",? ?(?:(?:for|of|in) )?\bexample 0\b(?: \(1 of 1 rows\))?")
"""How errors name the example where there is one alone: which of all it is, results say."""

_EMPTY: Mapping[str, Any] = {"scores": {}}
"""What is kept of a method that has not been judged."""

_LONGEST = 400
"""Characters of a reason."""

Judged = Attribution | Explainer


@dataclass(frozen=True, eq=False)
class Found:
    """What was found of some examples by one method.

    Attributes:
        scores: by metric.
        cost: of the maps, without the metrics, as if the method had been asked alone.
        warnings: of the maps.
        failed: whether an error left scores undefined.
        passing: whether it was one that may not come again, such as a want of memory.
    """

    scores: Mapping[str, Scores]
    cost: Cost
    warnings: tuple[str, ...]
    failed: bool = False
    passing: bool = False


@dataclass(frozen=True)
class Estimate:
    """Rows that an evaluation sends through the model, before it begins.

    Attributes:
        rows: what runs, rows forward and backward for each example, and what bound they are, if not exact.
        examples: how many there are; None where data does not say.
    """

    rows: tuple[tuple[str, int, int, str], ...]
    examples: int | None

    @property
    def forward(self) -> int:
        """Rows sent forward for each example."""
        return sum(r[1] for r in self.rows)

    @property
    def backward(self) -> int:
        """Rows sent backward for each example."""
        return sum(r[2] for r in self.rows)

    @property
    def bound(self) -> str:
        """What bound the sums are: none, at most, at least, or about where there are both."""
        bounds = {r[3] for r in self.rows} - {""}
        return bounds.pop() if len(bounds) == 1 else "about" if bounds else ""

    def __repr__(self) -> str:
        wide = max((len(r[0]) for r in self.rows), default=0)
        lines = [
            f"{name:<{wide}}  {bound}{' ' if bound else ''}{forward:,} + {backward:,}"
            for name, forward, backward, bound in self.rows
            if forward or backward or bound
        ]
        most = f"{self.bound} " if self.bound else ""
        lines.append(f"{most}{self.forward:,} forward + {self.backward:,} backward passes an example")
        if self.examples is not None:
            total = f"{self.forward * self.examples:,} + {self.backward * self.examples:,}"
            lines[-1] += f", {total} for {self.examples:,} example(s)"
        return "\n".join(lines)


class Runner:
    """Judges methods by metrics, batch by batch, keeping nothing but what it finds."""

    def __init__(
        self,
        field: Field,
        methods: Mapping[str, Judged],
        metrics: Mapping[str, Metric],
        controls: Mapping[str, Judged],
        seed: int,
        strict: bool,
    ) -> None:
        """Say what is to be judged.

        Args:
            field: what was explained of which model.
            methods: explainers, and maps of all examples, by the names results will have.
            metrics: by name.
            controls: judged as methods are.
            seed: of all random numbers.
            strict: raise the first error of a method or metric; else it is the reason for undefined scores.
        """
        self.field, self.methods, self.metrics, self.controls = field, methods, metrics, controls
        self.seed, self.strict = seed, strict
        self.judged: dict[str, Judged] = {**methods, **controls}
        self.tensors: dict[str, Tensor] = {}
        self.configs = {n: _config(j, self.tensors) for n, j in self.judged.items()}
        self._lasting: dict[Hashable, Any] = {}
        self._begun = False

    def check(self) -> None:
        """Refuse metrics that no example could be judged by.

        Raises:
            BaselineError: what stands for removed features needs bounds that the field does not declare.
        """
        for name, metric in self.metrics.items():
            for part in _parts(metric):
                if isinstance(part, Baseline):
                    try:
                        part.check(self.field)
                    except BaselineError as error:
                        raise error.about(name).advising(f"or give {name} another fill") from error

    def settings(self, weighed: bool) -> dict[str, Json]:
        """Say what results depend on besides the data.

        Args:
            weighed: also what the weights are, by a digest of all of them.
        """
        model, field = self.field.model, self.field
        weights = "not compared"
        if weighed and isinstance(model, nn.Module):
            names = "".join(n + digest(t) for n, t in chain(model.named_parameters(), model.named_buffers()))
            weights = hashlib.blake2b(names.encode(), digest_size=16).hexdigest()
        from apportion import __version__

        return {
            "version": __version__,
            "model": {"class": f"{type(model).__module__}.{type(model).__qualname__}", "weights": weights},
            "field": {
                "score": to_config(field.score),
                "site": to_config(field.site),
                "bounds": to_config(field.bounds),
                "normalize": to_config(field.normalize),
                "precision": to_config(field.lowered or field.precision),
                "extra": mark(field.extra) if field.extra is not None else None,
            },
            "seed": self.seed,
            "metrics": {n: to_config(m.settled()) for n, m in self.metrics.items()},
            "methods": {n: self._setting(n) for n in self.methods},
            "controls": {n: self._setting(n) for n in self.controls},
        }

    def _setting(self, name: str) -> Json:
        judged = self.judged[name]
        if not isinstance(judged, Attribution):
            return self.configs[name]
        return {"made by": self.configs[name], "map": mark(judged.values), "after": list(judged.postprocessing)}

    def estimate(self, first: Batch, examples: int | None) -> Estimate:
        """Count the rows to come, on one example.

        Args:
            first: the first batch.
            examples: how many there are in all.
        """
        one = first.part(slice(0, 1))
        q = self._bind(one)
        told: dict[str, Passes] = {}
        for name, judged in self.judged.items():
            if not isinstance(judged, Attribution):
                with suppress(ApportionError):  # it comes again when the method is asked
                    told[name] = _of_rows(judged, one.rows).passes(q)
        keys = [set(asks(j, q)) if isinstance(j := self.judged[name], Explainer) else set() for name in told]
        rows = []
        for (name, p), mine in zip(told.items(), keys, strict=True):
            bound = "" if p.exact and sum(bool(mine & k) for k in keys) < 2 else "at most"  # others may ask the same
            bound = "at least" if isinstance(self.judged[name], External) else bound
            rows.append((name, p.forward + p.once, p.backward + p.once_backward, bound))
        at_x = [any(p.at_x for p in told.values()) or any(isinstance(j, Attribution) for j in self.judged.values())]
        for name, metric in self.metrics.items():
            with suppress(ApportionError):
                own = metric.passes(q)
                at_x.append(own.at_x > 0)
                there, back, bound = self._of_metric(metric, own, q)
                title = f"{name}, {len(self.judged)} times"
                if trainings := metric.trainings(q, [j for j in self.judged.values() if isinstance(j, Explainer)]):
                    title, bound = f"{title}, and {trainings} training(s) in all", "at least"  # which takes more
                rows.append((title, there, back, bound))
        known = int(q.cost.at_x[0])
        first_of_all = ("f(x)", known, 0, "") if known else ("f(x)", sum(at_x), 0, "at most" if any(at_x) else "")
        return Estimate((first_of_all, *rows), examples)

    def _of_metric(self, metric: Metric, own: Passes, q: Question) -> tuple[int, int, str]:
        """Count what a metric sends for all methods, and say what bound that is; several metrics may share passes."""
        again = metric.card.judges is Judges.EXPLAINER
        times = 1 if again else 0  # what serves every map is sent once
        each = Passes(own.forward + max(0, own.at_x - 1) + times * own.once, own.backward + times * own.once_backward)
        there, back = (0, 0) if again else (own.once, own.once_backward)
        exact, anew = own.exact and len(self.metrics) == 1, 0
        for judged in self.judged.values():
            there, back = there + each.forward, back + each.backward
            if not again:
                continue
            try:
                p = Subject(judged).explainer.passes(q)
            except ApportionError:  # a map that nothing can be asked about
                exact = False
                continue
            more = metric.passes_with(q, p)
            there += more.forward - own.forward + more.once - own.once
            back += more.backward - own.backward + more.once_backward - own.once_backward
            exact, anew = (
                exact and more.exact and not isinstance(judged, External),
                anew + bool(p.once or p.once_backward),
            )
        return there, back, "at most" if (there or back) and not (exact and anew < 2) else ""

    def run(self, data: Iterator[Batch], examples: int | None, store: Store | None) -> Iterator[tuple[str, Found]]:
        """Judge everything, and give what is found of each batch by each method as it comes.

        Args:
            data: the batches.
            examples: how many examples there are in all, for progress.
            store: holds what is finished; it is not done again.
        """
        done = number = seen = 0
        for number, batch in enumerate(data, 1):
            self._check_truth(batch)
            if number > 1 or (examples is not None and len(batch) < examples):
                self._check_alike(batch)
            mine = None if store is None else batch.fingerprint()
            have = {} if store is None else {n: store.get(number - 1, n, mine) for n in self.judged}
            kept: dict[str, dict[str, Any]] = {n: h for n, h in have.items() if h is not None}
            if self.strict:  # what failed fails again, and says so
                kept = {n: h for n, h in kept.items() if not h.get("failed")}
            missing = {n: tuple(m for m in self.metrics if m not in kept.get(n, _EMPTY)["scores"]) for n in self.judged}
            alike = {m: [n for n in missing if missing[n] == m] for m in missing.values() if m}
            made = {wanted: self.judge(batch, names, wanted) for wanted, names in alike.items()}
            for name, wanted in missing.items():
                before = kept.get(name, _EMPTY)
                found = Found(before["scores"], before.get("cost", _nothing(0)), before.get("warnings", ()))
                if wanted:
                    with progress(_silent):
                        found = next(made[wanted])
                    if name in kept:
                        cost, warnings = kept[name]["cost"], kept[name]["warnings"]
                        found = replace(found, scores=before["scores"] | found.scores, cost=cost, warnings=warnings)
                    if store is not None and not found.passing:
                        held = {
                            "failed": found.failed or before.get("failed", False),
                            "scores": dict(found.scores),
                            "cost": found.cost,
                            "warnings": found.warnings,
                        }
                        store.put(number - 1, name, mine, held)
                found = replace(found, scores={m: found.scores[m] for m in self.metrics})
                done += len(batch)
                seen = batch.rows.stop
                total = done + 1 if examples is None else examples * len(self.judged)
                tick("evaluate, examples times methods", done, total)
                yield name, found
        if examples is None:
            tick("evaluate, examples times methods", done, done)
        for name, judged in self.judged.items():
            held = judged.values if isinstance(judged, Attribution | GivenMap) else None
            if held is not None and len(tree.leaves(held)[0]) != seen:
                raise InputError(
                    f"{len(tree.leaves(held)[0])} map(s) of {name} for {seen} example(s)", "one each", "check the data"
                )
        if store is not None:
            store.end(number)

    def judge(
        self, batch: Batch, names: Sequence[str], metrics: Sequence[str], known: Attribution | None = None
    ) -> Iterator[Found]:
        """Judge a batch by some metrics, for each of some methods; the map of the one method may be known already."""
        if not names:
            return
        root = self._bind(batch)
        _ = root.ids  # once for all
        judged = {n: _of_rows(self.judged[n], batch.rows) for n in names}
        if not self._begun:
            self._begin(batch, root, judged)
        common, asked = in_common(root), to_config(self.field.score)
        account = root.account
        explainers = [j for j in judged.values() if isinstance(j, Explainer)]
        answers = answered(root, explainers) if known is None else iter([known])
        for name, one in judged.items():
            made = next(answers) if isinstance(one, Explainer) else one
            if isinstance(made, Exception):
                yield self._failed(made, batch, name, metrics, root)
                continue
            if isinstance(one, Attribution) and one.score == asked and is_reproducible(asked):
                self._check_order(name, one.value, root.fork(common, name, account))
            subject = Subject(one, name, made)
            subject.method, subject.tensors = self.configs[name], {}
            scores, failed = {}, []
            for metric in metrics:
                q = root.fork(common, metric, account)
                try:
                    with torch.inference_mode(False):
                        found = self.metrics[metric].judge(q, subject, self._truth(batch, metric))
                    scores[metric] = _on_cpu(replace(found, tensors={}))
                except Exception as error:
                    kept = made if isinstance(one, Explainer) else None
                    failed.append(self._failed(error, batch, name, [metric], root, kept))
                    scores[metric] = failed[-1].scores[metric]
            cost = _sent(made.cost) if isinstance(one, Explainer) else _nothing(len(batch))
            warnings = made.warnings if isinstance(one, Explainer) else ()
            yield Found(scores, cost, warnings, bool(failed), any(f.passing for f in failed))

    def _bind(self, batch: Batch) -> Question:
        target = batch.target
        for judged in self.methods.values():
            if target is None and isinstance(judged, Attribution) and judged.target is not None:
                target = _of_rows(judged, batch.rows).target
        q = self.field.bind(batch.x, target=target, ids=batch.ids, seed=self.seed)
        q.lasting = self._lasting
        for name, judged in self.methods.items():
            if isinstance(judged, Attribution) and judged.target is not None and isinstance(q.target, Tensor):
                own = torch.as_tensor(_of_rows(judged, batch.rows).target).to(q.target.device).reshape(len(q), -1)
                if not torch.equal(own, q.target.reshape(len(q), -1)):
                    raise InputError(
                        f"a map of {name} that explains other targets", "maps of the targets judged", "give target=..."
                    )
        return q

    def _check_order(self, name: str, value: Tensor, q: Question) -> None:
        """Refuse maps of other examples, or of the same in another order: f(x) was another where they were made."""
        every = self.judged[name]
        assert isinstance(every, Attribution)  # of which value are some rows
        then, all_then, now = (v.detach().cpu().double() for v in (value, every.value, q.fx))
        near = 0.02 * float(all_then.max() - all_then.min()) + 1e-3 * float(now.abs().max())  # of precisions, too
        off = ((then - now).abs() > near).nonzero()[:, 0].tolist()
        if off:
            i = off[0]
            where = ((all_then - now[i]).abs() <= near).nonzero()[:, 0].tolist()
            told = f", as for map {where[0]}" if where else ""
            raise InputError(
                f"maps of {name} made where f(x) is {then[i]:.4g}, "
                f"for example {q.ids[i]!r}, where it is {now[i]:.4g}{told}",
                "maps of the same examples in the same order, by the same model",
                "explain the data in their order, without shuffling; a tensor of maps, a.values, is not compared",
            )

    def beside(self, scores: Scores, metric: str, found: Mapping[str, Found]) -> Scores:
        """Lay the controls' scores beside a method's, and the tensors that its configurations name."""
        tensors = dict(self.tensors)
        to_config((self.metrics[metric], self.field.score), tensors)
        wanted = set(_digests((scores.metric, scores.method, scores.score)))
        controls = {n: found[n].scores[metric] for n in self.controls}
        return replace(scores, controls=controls, tensors={k: t for k, t in tensors.items() if k in wanted})

    def _check_truth(self, batch: Batch) -> None:
        for name, metric in self.metrics.items():
            given = batch.truth.get(name) if isinstance(batch.truth, Mapping) else batch.truth
            if metric.card.truth and given is None:
                raise ConfigError(
                    f"no truth for {name}", metric.card.truth, f"give truth=..., or truth={{{name!r}: ...}}"
                )

    def _check_alike(self, batch: Batch) -> None:
        """Refuse what is given for each of the examples of one batch, which the next batch would have too."""
        expected = "in batches what is the same for all examples"
        do = f"judge all examples at once, by batch= their number (this batch has {len(batch)}); or give "
        if (rows := self.field.rows_of_extra()) is not None:
            raise InputError(
                f"an extra tensor with {rows} row(s) in the field", expected, do + "it as ap.Shared(tensor)"
            )
        for name, made in {**self.judged, **self.metrics}.items():
            for part in _parts(made) if is_dataclass(made) else ():
                if isinstance(part, Given | ByExample) and part.of_each(batch.x):
                    given = f"{type(part).__name__} of {name} with a row for each example"
                    raise InputError(given, expected, do + "one row for all")

    def _truth(self, batch: Batch, metric: str) -> Any:
        if not self.metrics[metric].card.truth:
            return None
        return batch.truth[metric] if isinstance(batch.truth, Mapping) else batch.truth

    def _begin(self, batch: Batch, q: Question, judged: Mapping[str, Any]) -> None:
        """Refuse truths and given maps of wrong shapes on the first batch, before anything is asked."""
        for name, metric in self.metrics.items():
            if metric.card.truth:
                try:
                    metric.check_truth(q, self._truth(batch, name))
                except InputError as error:
                    raise error.about(f"truth of {name}") from error
        of_maps = all(m.card.judges is Judges.MAP for m in self.metrics.values())
        for name, one in judged.items():
            if isinstance(one, GivenMap):
                with suppress(TypeError):  # several tensors for one: it comes again when it is asked
                    tree.apply(lambda v, x, name=name: fitted(v, x, name), one.values, q.x)
            elif isinstance(one, Attribution) and of_maps:
                with suppress(NonFiniteError):  # of some examples
                    Subject(one, name).map(q)
        self._begun = True

    def _failed(
        self,
        error: Exception,
        batch: Batch,
        name: str,
        metrics: Sequence[str],
        root: Question,
        made: Attribution | None = None,
    ) -> Found:
        """Say why there are no scores; examples that could do without the one at fault are judged without it."""
        judged = self.judged[name]
        if self.strict:
            whose = judged if isinstance(judged, Explainer) else GivenMap(torch.zeros(1), name)
            raise named(error, whose, f"{name}, examples {batch.rows.start} to {batch.rows.stop - 1}") from error
        reason = _reason(error)
        if len(batch) > 1 and not isinstance(error, _OF_THE_MODEL):
            resolved = replace(batch, target=as_asked(root.target))

            def again(rows: slice) -> Found:
                known = None if made is None else taken(made, rows)
                return next(self.judge(resolved.part(rows), [name], metrics, known))

            alone = None
            for i in (0, len(batch) - 1) if _of_their_kind(error) else ():
                alone = again(slice(i, i + 1))
                told = list(alone.scores[metrics[0]].undefined)
                if [_without_counts(why) for why in told] != [_without_counts(reason)]:
                    alone = None
                    break
            if alone is None:
                half = len(batch) // 2
                return join([again(slice(0, half)), again(slice(half, len(batch)))])
            (reason,) = alone.scores[metrics[0]].undefined  # which does not depend on the batch
        elif len(batch) == 1:
            reason = _THE_ONLY.sub("", reason)
        shown = as_asked(root.target)
        x = tree.leaves(root.x)[0]
        scores = {
            metric: Scores(
                values=torch.full((len(batch),), torch.nan, dtype=x.dtype if x.is_floating_point() else None),
                metric=to_config(self.metrics[metric].settled()),
                direction=self.metrics[metric].card.direction,
                of=name,
                method=self.configs[name],
                score=to_config(self.field.score),
                target=tree.map_tensors(Tensor.cpu, shown),
                ids=tuple(root.ids),
                seed=self.seed,
                cost=_nothing(len(batch)),
                undefined={reason: torch.ones(len(batch), dtype=torch.bool)},
                statistic=self.metrics[metric].card.statistic,
                blind_is_best=self.metrics[metric].card.blind_is_best,
            )
            for metric in metrics
        }
        passing = not isinstance(error, ApportionError) or isinstance(error, OutOfMemoryError)
        return Found(scores, _nothing(len(batch)), (), True, passing)


def join(found: Sequence[Found]) -> Found:
    """Put together what was found of different examples by one method."""
    forward, backward, at_x = (torch.cat([getattr(f.cost, n) for f in found]) for n in ("forward", "backward", "at_x"))
    return Found(
        {n: Scores.join([f.scores[n] for f in found]) for n in found[0].scores},
        Cost(forward, backward, at_x),
        told_once(f.warnings for f in found),
        any(f.failed for f in found),
        any(f.passing for f in found),
    )


def _of_their_kind(error: Exception) -> bool:
    """Whether an error may be about examples of this kind, such as tables, and not about what one of them holds."""
    ours = isinstance(error, ApportionError) and not isinstance(error, NonFiniteError | OutOfMemoryError)
    return ours and re.search(r"\bexample '?\d", str(error)) is None


def _reason(error: Exception) -> str:
    told = str(error)
    if isinstance(error, ApportionError):
        told = error.given + (f"; expected {error.expected}" if error.expected else "")
        told += f"; to fix: {error.do}" if error.do else ""
    return " ".join(f"{type(error).__name__}: {told}".split())[:_LONGEST]


def _without_counts(reason: str) -> str:
    """Leave out how many examples there were: the first axis of shapes."""
    return re.sub(r"\(\d+,", "(B,", reason)


def _digests(config: Json) -> Iterator[str]:
    """List the tensors that a configuration names."""
    if isinstance(config, dict):
        if isinstance(config.get("tensor"), str):
            yield config["tensor"]
        config = list(config.values())
    for inner in config if isinstance(config, list | tuple) else ():
        yield from _digests(inner)


def _silent(what: str, done: int, total: int) -> None:
    """Keep the progress of single passes from what listens to the whole."""


def _parts(made: Any) -> Iterator[Configurable]:
    """Go over what something is made of, at any depth."""
    for held in (getattr(made, f.name) for f in fields(made)):
        for part in held if isinstance(held, tuple) else (held,):
            if isinstance(part, Configurable) and is_dataclass(part):
                yield part
                yield from _parts(part)


def _config(judged: Judged, tensors: dict[str, Tensor]) -> Json:
    if isinstance(judged, Attribution):
        tensors.update(judged.tensors)
        return judged.method
    return to_config(judged, {} if isinstance(judged, GivenMap) else tensors)  # maps are not kept


def _of_rows(judged: Judged, rows: slice) -> Any:
    """Take the maps of some examples, where maps of all are given."""
    if isinstance(judged, GivenMap):
        _reaches(judged.values, rows, judged.name)
        return replace(judged, values=tree.index(judged.values, rows))
    if not isinstance(judged, Attribution):
        return judged
    _reaches(judged.values, rows, "an attribution")
    return taken(judged, rows)


def _reaches(values: Any, rows: slice, name: str) -> None:
    count = len(tree.leaves(values)[0])
    if rows.stop > count:
        raise InputError(f"{count} map(s) of {name} for {rows.stop} example(s) and more", "one each", "check the data")


def _on_cpu(found: Scores) -> Scores:
    def cpu(held: Any) -> Any:
        return tree.map_tensors(lambda t: t.detach().cpu(), held)

    curves = {k: replace(c, x=c.x.detach().cpu(), y=c.y.detach().cpu()) for k, c in found.curves.items()}
    return replace(
        found,
        values=cpu(found.values),
        target=cpu(found.target),
        cost=_sent(found.cost),
        curves=curves,
        parts=cpu(dict(found.parts)),
        undefined=cpu(dict(found.undefined)),
    )


def _sent(cost: Cost) -> Cost:
    """Keep an account of the examples alone."""
    return Cost(cost.forward.cpu(), cost.backward.cpu(), cost.at_x.cpu())


def _nothing(count: int) -> Cost:
    none = torch.zeros(count, dtype=torch.long)
    return Cost(none, none, none)

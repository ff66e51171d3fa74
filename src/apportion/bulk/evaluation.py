"""What an evaluation found: a tidy table of one record for each example, method and metric, and its summaries."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.bulk.comparison import Comparison, compare
from apportion.bulk.store import as_numbers, from_numbers, pack, unpack
from apportion.core.attribution import Cost
from apportion.core.config import Json
from apportion.core.errors import ConfigError, InputError, nearest
from apportion.core.write import write_bytes
from apportion.metrics.ranks import Ranks, rank_methods
from apportion.metrics.reliability import Reliability
from apportion.metrics.scores import LEAST, Direction, Scores, centers, groups_of, verdicts

_TOLD = 5
"""Examples that a line names."""

_WIDE = 120
"""Characters from which a table has its metrics down the side."""


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What `ap.evaluate` found.

    Attributes:
        scores: of each method by each metric, `scores[method][metric]`, with those of the controls beside.
        costs: of making each method's maps, without the metrics; none where maps were given.
        settings: what all this depends on besides the data: model, score, methods, metrics, seed.
        warnings: of each method's maps.
    """

    scores: Mapping[str, Mapping[str, Scores]]
    costs: Mapping[str, Cost]
    settings: Json
    warnings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods."""
        return tuple(self.scores)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(next(iter(self.scores.values())))

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the controls."""
        return tuple(self._any.controls)

    @property
    def ids(self) -> tuple[Any, ...]:
        """Names of the examples."""
        return self._any.ids

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def _any(self) -> Scores:
        return self.scores[self.methods[0]][self.metrics[0]]

    def of(self, metric: str) -> dict[str, Scores]:
        """Give the scores of every method by a metric.

        Raises:
            InputError: no such metric.
        """
        if metric not in self.metrics:
            raise InputError(f"metric {metric!r}", nearest(str(metric), self.metrics), "take one of .metrics")
        return {method: held[metric] for method, held in self.scores.items()}

    # -- the table --------------------------------------------------------------------------------

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The table, a column an array: a row for each example, method and metric, controls after the methods.

        Columns are id, method, metric, value (NaN where undefined), undefined (why, or empty), direction, control
        (whether the method is one), and target.
        """
        blocks = [(m, s, False) for held in self.scores.values() for m, s in held.items()]
        first = self.scores[self.methods[0]]
        blocks += [(m, first[m].controls[c], True) for c in self.controls for m in self.metrics]
        found: dict[str, list[np.ndarray]] = {}
        for metric, s, control in blocks:
            n = len(s)
            why = np.full(n, "", dtype=object)
            for reason, where in s.undefined.items():
                why[where.cpu().numpy()] = reason
            columns = {
                "id": _objects(s.ids),
                "method": np.full(n, s.of, dtype=object),
                "metric": np.full(n, metric, dtype=object),
                "value": s.values.cpu().double().numpy(),
                "undefined": why,
                "direction": np.full(n, s.direction.value, dtype=object),
                "control": np.full(n, control),
                "target": _targets(s.target, n),
            }
            for name, column in columns.items():
                found.setdefault(name, []).append(column)
        joined = {name: np.concatenate(parts) for name, parts in found.items()}
        targets = joined["target"].tolist()
        if all(isinstance(t, int) for t in targets):
            joined["target"] = np.array(targets)
        return joined

    def records(self) -> list[dict[str, Any]]:
        """Give the table as a list of plain records."""
        names = list(self.columns)
        lists = [column.tolist() for column in self.columns.values()]
        return [dict(zip(names, row, strict=True)) for row in zip(*lists, strict=True)]

    def pandas(self) -> Any:
        """Give the table as a pandas DataFrame.

        Raises:
            ConfigError: pandas is not installed.
        """
        return _package("pandas").DataFrame(self.columns)

    def polars(self) -> Any:
        """Give the table as a polars DataFrame; ids and targets that are no numbers are text there.

        Raises:
            ConfigError: polars is not installed.
        """
        return _package("polars").DataFrame({k: _plain(v) for k, v in self.columns.items()})

    def arrow(self) -> Any:
        """Give the table as an Arrow table, with text as for polars.

        Raises:
            ConfigError: pyarrow is not installed.
        """
        return _package("pyarrow").table({k: _plain(v) for k, v in self.columns.items()})

    # -- summaries --------------------------------------------------------------------------------

    def summary(self, level: float = 0.95, categories: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Sum up the examples: a row for each metric and method, the controls after them.

        Rows hold metric, method, the mean (or the median, where the metric's source takes that) with the ends of its
        bootstrap interval, the number of values and of undefined ones, the direction, and under `beats` for each
        control whether it is beaten beyond chance; None where no end is the better one, or below 6 examples.

        Args:
            level: of the intervals.
            categories: one an example, such as its class; each is summed up first, and rows have the mean over them,
                as the pointing game's source does. All examples are one unless given.

        Raises:
            InputError: another number of categories.
        """
        groups = list(groups_of(categories, len(self)).values()) if len(categories) else []
        held = [(m, k, s, False) for m in self.metrics for k, s in self.of(m).items()]
        held += [
            (m, k, s, True) for m, first in self.scores[self.methods[0]].items() for k, s in first.controls.items()
        ]
        held.sort(key=lambda row: self.metrics.index(row[0]))  # controls after the methods of their metric
        told = iter(verdicts([(s, control) for _, _, s, _ in held for control in s.controls.values()], groups))
        rows = []
        for (metric, name, s, control), (center, low, high) in zip(
            held, centers([s for _, _, s, _ in held], level, groups), strict=True
        ):
            missing = int(s.values.isnan().sum())
            rows.append(
                {
                    "metric": metric,
                    "method": name,
                    "statistic": s.statistic,
                    "value": center,
                    "low": low,
                    "high": high,
                    "n": len(s) - missing,
                    "undefined": missing,
                    "direction": s.direction.value,
                    "control": control,
                    "beats": {c: next(told) for c in s.controls},
                }
            )
        return rows

    def ranks(self, metric: str) -> Ranks:
        """Rank the methods by a metric, with tests and sizes of their differences; see `rank_methods`.

        Raises:
            InputError: one method, or no such metric.
        """
        if len(self.methods) < 2:
            raise InputError(
                f"{', '.join(self.methods)} alone to rank", "two methods or more", "evaluate another beside it"
            )
        return rank_methods(self.of(metric), metric)

    def reliability(self, metric: str, again: Evaluation | None = None) -> Reliability:
        """Measure how reliable a metric is: over examples, beside the other metrics, and over seeds.

        Args:
            metric: its name.
            again: what the same call found with another seed.

        Raises:
            InputError: no such metric, or an evaluation of something else.
        """
        self.of(metric)
        if again is not None:
            again.of(metric)
        return Reliability.of(self.scores, metric, None if again is None else again.scores)

    def compare(self, groups: Mapping[str, Sequence[str]] | None = None) -> Comparison:
        """Find methods that another one dominates in every group of metrics, such as faithfulness and robustness.

        Args:
            groups: which metrics make a group, by its name; those of a folder unless given.
        """
        return compare(self.scores, groups)

    def show(self, metrics: Sequence[str] | None = None) -> Any:
        """Draw methods by metrics with intervals and controls, as a Matplotlib figure; needs the image extra.

        Args:
            metrics: those to draw; all unless given.
        """
        from apportion.show.scores import evaluation

        return evaluation(self, metrics)

    @property
    def failures(self) -> list[tuple[str, str, str, int]]:
        """What is undefined: method or control, metric, why, and for how many examples."""
        return [(name, metric, why, int(where.sum())) for name, metric, why, where in self._undefined()]

    def _undefined(self) -> Iterator[tuple[str, str, str, Tensor]]:
        told: set[tuple[str, str]] = set()
        for name, held in self.scores.items():
            for metric, s in held.items():
                for who, scores in ((name, s), *s.controls.items()):
                    if (who, metric) not in told:
                        told.add((who, metric))
                        yield from ((who, metric, why, where) for why, where in scores.undefined.items())

    def told_failures(self) -> list[str]:
        """Say what is undefined, a line for each reason."""
        by_reason: dict[str, list[tuple[str, str, Tensor]]] = {}
        for name, metric, why, where in self._undefined():
            by_reason.setdefault(why, []).append((name, metric, where.cpu()))
        lines = []
        for why, places in by_reason.items():
            methods, metrics = list(dict.fromkeys(p[0] for p in places)), list(dict.fromkeys(p[1] for p in places))
            counts = [int(p[2].sum()) for p in places]
            most = max(counts)
            up_to = "" if min(counts) == most else "up to "
            some = [self.ids[i] for i in torch.stack([p[2] for p in places]).any(0).nonzero()[:, 0].tolist()]
            told = ", ".join(repr(i) for i in some[:_TOLD]) + (", ..." if len(some) > _TOLD else "")
            which = f" ({told})" if len(some) < len(self) else ""
            many = f"{up_to}{most} of {len(self)} example(s){which}"
            lines.append(f"{self._who(methods)} by {', '.join(metrics)}: undefined for {many}: {why}")
        return lines

    def notes(self) -> list[str]:
        """Say what deserves a look: undefined scores, warnings, and scores that do not beat a control."""
        said: dict[str, list[str]] = {}
        for row in self.summary():
            lost = [name for name, won in row["beats"].items() if won is False]
            if lost and row["n"] > 1:
                said.setdefault(f"by {row['metric']}: not better than {', '.join(lost)}", []).append(row["method"])
        for method, warnings in self.warnings.items():
            for warning in warnings:
                said.setdefault(f": {warning}", []).append(method)
        for method, held in self.scores.items():
            for metric, s in held.items():
                for warning in s.warnings:
                    said.setdefault(f"by {metric}: {warning}", []).append(method)
        lines = [f"{self._who(methods)}{'' if what[0] == ':' else ' '}{what}" for what, methods in said.items()]
        lines += [self._few()] if self.controls and len(self) < LEAST else []
        return self.told_failures() + lines

    @staticmethod
    def _few() -> str:
        return f"fewer than {LEAST} are too few to tell what beats controls beyond chance"

    def _who(self, methods: Sequence[str]) -> str:
        if len(self.methods) > 1 and set(self.methods) <= set(methods):
            methods = ["all methods", *(m for m in methods if m not in self.methods)]
        return ", ".join(methods)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        rows = {(r["method"], r["metric"]): r for r in self.summary()}
        arrow = {Direction.HIGHER: " ↑", Direction.LOWER: " ↓", Direction.NEITHER: ""}
        first = self.scores[self.methods[0]]
        head = ["", *(f"{m}{arrow[first[m].direction]}" for m in self.metrics)]
        digits = {m: _digits([rows[k, m]["value"] for k in self.methods]) for m in self.metrics}
        body = []
        for method in (*self.methods, *self.controls):
            line = [method]
            for metric in self.metrics:
                r = rows[method, metric]
                mark = "*" if r["beats"] and all(r["beats"].values()) else ""
                value, low, high = (f"{r[k]:.{digits[metric]}g}" for k in ("value", "low", "high"))
                spread = f" [{low}, {high}]{mark}" if r["n"] > 1 else ""
                line.append(f"{value}{spread}" if r["n"] else "undefined")
            body.append(line)
        return head, body

    def __repr__(self) -> str:
        head, body = self._cells()
        if sum(max(len(line[i]) for line in (head, *body)) + 2 for i in range(len(head))) > _WIDE:
            turned = [list(column) for column in zip(head, *body, strict=True)]
            head, body = turned[0], turned[1:]
        wide = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, wide, strict=True)).rstrip() for line in (head, *body)
        ]
        lines.append(self._words())
        failed = len(self.failures)
        return "\n".join(lines + ([f"undefined in {failed} place(s): see .failures"] if failed else []))

    def _words(self) -> str:
        told = [r["beats"].values() for r in self.summary() if r["beats"]]
        star = "* " if any(all(won) for won in told) else "none " if any(False in won for won in told) else ""
        beside = f"; {star}beats {' and '.join(self.controls)} beyond chance" if star else ""
        beside = f"; {self._few()}" if self.controls and len(self) < LEAST else beside
        return f"{len(self)} example(s), bootstrap intervals at 95 %{beside}"

    def _repr_html_(self) -> str:
        head, body = self._cells()
        cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
        rows = "".join(
            f"<tr><th>{html.escape(line[0])}</th>{''.join(f'<td>{html.escape(c)}</td>' for c in line[1:])}</tr>"
            for line in body
        )
        failed = "".join(f"<li>{html.escape(' by '.join(f[:2]))}: {html.escape(f[2])}</li>" for f in self.failures)
        missing = f"<p>Undefined:</p><ul>{failed}</ul>" if failed else ""
        return f"<table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table><p>{self._words()}</p>{missing}"

    # -- storage ----------------------------------------------------------------------------------

    def to_json(self, path: str | Path | None = None) -> str:
        """Write everything as JSON, numbers to their last bit.

        Args:
            path: of a file to be written besides, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        tables: list[Json] = []

        def put(t: Tensor) -> int:
            tables.append(as_numbers(t))
            return len(tables) - 1

        beside = {m: dict(s.controls) for m, s in self.scores[self.methods[0]].items()}
        bare = {k: {m: replace(s, controls={}) for m, s in held.items()} for k, held in self.scores.items()}
        found = {
            "scores": pack(bare, put),
            "controls": pack(beside, put),
            "costs": pack(dict(self.costs), put),
            "warnings": pack(dict(self.warnings), put),
        }
        record = {"apportion_evaluation": 1, "settings": self.settings, **found, "tensors": tables}
        text = json.dumps(record, allow_nan=False)
        if path is not None:
            write_bytes(path, f"{text}\n".encode())
        return text

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read a file of `to_json`; nothing in it is executed.

        Raises:
            ConfigError: it is none.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record["apportion_evaluation"] != 1:
                raise ValueError(f"format {record['apportion_evaluation']!r}")
            tables = [from_numbers(t) for t in record["tensors"]]
            scores, beside, costs, warnings = (
                unpack(record[k], tables.__getitem__) for k in ("scores", "controls", "costs", "warnings")
            )
            with_controls = {
                k: {m: replace(s, controls=beside[m]) for m, s in held.items()} for k, held in scores.items()
            }
            return cls(with_controls, costs, record["settings"], warnings)
        except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{path}: {type(error).__name__}: {error}", "a file written by Evaluation.to_json", "check the path"
            ) from error


def _digits(values: Sequence[float]) -> int:
    """Choose how many digits tell methods apart; three where more than five would have to."""
    apart = len(set(values))
    return next((n for n in (3, 4, 5) if len({f"{v:.{n}g}" for v in values}) == apart), 3)


def _objects(values: Sequence[Any]) -> np.ndarray:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _targets(target: Any, count: int) -> np.ndarray:
    if isinstance(target, Tensor) and target.ndim == 1:
        return _objects(target.tolist())
    if isinstance(target, Tensor):
        return _objects([tuple(row) for row in target.tolist()])
    return _objects([None if target is None else str(target)] * count)


def _plain(column: np.ndarray) -> Any:
    """Give a column of one kind: text where entries are not all text or all numbers."""
    if column.dtype != object:
        return column
    values = column.tolist()
    if all(isinstance(v, str) or v is None for v in values) or all(type(v) is int for v in values):
        return values
    return [v if v is None else str(v) for v in values]


def _package(name: str) -> Any:
    try:
        return __import__(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(
            f"{name} is not installed", "the evaluation extra", "pip install 'apportion[evaluation]'"
        ) from error

"""What docs/noise.md says of denoising is what benchmarks/noise.py found."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks import noise

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks/results/noise.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/noise.md").read_text(encoding="utf-8")


def rows(stage: str) -> dict[str, dict[str, Any]]:
    """Give all rows of a network by name, those that are denoised in bold."""
    part = RECORD[stage]
    found = {}
    for title, group in part["table"].items():
        found |= {f"**{name}**" if name == title else name: row for name, row in group.items()}
    return found | {f"*{name}*": row for name, row in part["controls"].items()}


def tables() -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Give the tables of the page: whose they are, their heads and their rows."""
    for section in PAGE.split("\n## ")[1:]:
        lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in section.splitlines() if line[:1] == "|"]
        if lines:
            yield ("digits" if section.startswith("Digits") else "lite0"), lines[0][1:], lines[2:]


def test_the_tables_of_the_page_are_the_record() -> None:
    seen = 0
    for stage, heads, lines in tables():
        own = {head: metric for metric, head in noise.HEADS.items()}
        for name, *cells in lines:
            row = rows(stage)[name]
            for head, cell in zip(heads, cells, strict=True):
                found = {k: v for k, v in row[own[head]].items() if k != "blurred"}
                assert cell == noise.number(found), (stage, name, head)
                seen += 1
    assert seen > 100


def test_the_numbers_in_the_text_are_in_the_record() -> None:
    """Every number of two digits in a paragraph is a mean, an end of an interval or a difference there."""

    def numbers(held: Any) -> Iterator[float]:
        if isinstance(held, dict):
            for k, v in held.items():
                yield from () if k in ("methods", "metrics") else numbers(v)
        elif isinstance(held, float):
            yield held

    known = {f"{v:.2f}" for v in numbers(RECORD)}
    text = re.sub(r"```.*?```", "", PAGE, flags=re.S)
    told = re.findall(r"(?<![\d.])-?\d+\.\d\d(?!\d)", "\n".join(s for s in text.splitlines() if s[:1] != "|"))
    assert len(told) > 10
    assert not [n for n in told if n not in known]


def test_the_written_tables_are_the_record() -> None:
    assert (ROOT / "benchmarks/results/noise.md").read_text(encoding="utf-8") == noise.page(RECORD)


@pytest.mark.parametrize("stage", noise.STAGES)
def test_what_is_quiet_need_not_know_anything(stage: str) -> None:
    """A blur of white noise is quieter than every denoised gradient, and worth nothing."""
    found = rows(stage)
    blind = found["*white noise, blurred by 8*"]
    for name in ("SmoothGrad", "guided backpropagation", "RectGrad", "IDGI", "guided IG"):
        assert blind["variation"]["high"] < found[name]["variation"]["low"], name
    assert blind["insertion - deletion"]["low"] < 0.1
    assert blind["other class"]["mean"] == pytest.approx(1)


@pytest.mark.parametrize("stage", noise.STAGES)
def test_a_blur_is_quieter_than_what_denoises_the_same_map(stage: str) -> None:
    told = 0
    for title, group in RECORD[stage]["table"].items():
        blurred = group.get(f"{title}{noise.BLURRED}2")
        for name, row in group.items():
            if blurred and name != title and noise.BLURRED not in name:
                assert blurred["variation"]["high"] < row["variation"]["low"], name
                told += 1
    assert told == 15


def test_losses_in_removal_are_as_told() -> None:
    removal, lost = "insertion - deletion", []
    for stage in noise.STAGES:
        of_ig = RECORD[stage]["table"]["integrated gradients"]
        lost += [of_ig[n][removal]["change"]["high"] < 0 for n in ("split IG", "blur IG", "expected gradients")]
        assert of_ig["IDGI"][removal]["change"]["high"] < 0
        assert of_ig["IDGI"]["as quiet"][removal]["high"] < 0
    assert sum(lost) == 5
    beyond = RECORD["lite0"]["table"]
    better = [
        name
        for group in beyond.values()
        for name, row in group.items()
        if "as quiet" in row and row["as quiet"][removal]["low"] > 0
        if row[removal]["change"]["low"] > 0 and row["variation"]["change"]["high"] < 0
    ]
    assert better == ["VarGrad", "LRP, ε and z⁺"]

"""Backward rules that forget the class: measured anew, and as the page of the documentation has it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmarks import class_blind as cb

pytest.importorskip("skimage")

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks/results/class_blind.json").read_text(encoding="utf-8"))
BOTH_SIGNS = ("gradient", "DeepLIFT", "LRP-ε")
POSITIVE = ("guided", "deconvnet", "LRP-z⁺ (α1β0)")


def test_guided_and_deconvnet_copy_the_picture() -> None:
    pooled = RECORD["a picture, max-pooling"]
    for method in BOTH_SIGNS:
        assert max(pooled[method].values()) < 0.05, method
    for method in ("guided", "deconvnet"):
        assert pooled[method]["with the picture"] > 10 * pooled["gradient"]["with the picture"]
        assert pooled[method]["between classes"] > 0.75
    assert RECORD["a picture, no pooling"]["deconvnet"]["with the picture"] < 0.05  # nothing says where
    assert RECORD["a picture, no pooling"]["guided"]["with the picture"] > 0.8


def test_positive_rules_converge_with_depth_and_others_do_not() -> None:
    for method, by_depth in RECORD["depth"].items():
        cosines = [by_depth[str(d)]["cosine"] for d in cb.DEPTHS]
        assert cosines == sorted(cosines), method
        if method in POSITIVE:
            assert cosines[-1] > 0.9, method
        if method in BOTH_SIGNS:
            assert cosines[-1] < 0.6, method
    assert RECORD["depth"]["LRP-z⁺ (α1β0)"]["16"]["correlation"] > 0.999  # not only because all is positive
    widths = RECORD["width, 16 layers"]
    assert widths["gradient"]["400"]["cosine"] < 0.5 * widths["gradient"]["50"]["cosine"]
    assert widths["guided"]["400"]["cosine"] > 0.999


@pytest.mark.parametrize("method", ["gradient", "guided"])
def test_the_picture_is_as_recorded(method: str) -> None:
    for name, value in cb.recovery(method).items():
        assert value == pytest.approx(RECORD["a picture, max-pooling"][method][name], abs=2e-3)


@pytest.mark.parametrize("method", cb.METHODS)
def test_depth_is_as_recorded(method: str) -> None:
    assert cb.convergence(method, 4)["cosine"] == pytest.approx(RECORD["depth"][method]["4"]["cosine"], abs=2e-3)


def test_the_page_has_these_numbers() -> None:
    page = (ROOT / "docs/class-blind.md").read_text(encoding="utf-8")
    rows = {}
    for line in page.splitlines():
        name, *cells = (c.strip() for c in line.strip("|").split("|"))
        if cells and all(re.fullmatch(r"\d\.\d{3}", c) for c in cells):
            rows.setdefault(name, []).append([float(c) for c in cells])
    pooled, plain, depth, width = RECORD.values()
    for method in cb.METHODS:
        shallow, deep = rows[method][:2]
        assert shallow == [*pooled[method].values(), *plain[method].values()]
        assert deep == [v["cosine"] for v in depth[method].values()]
    for method in ("gradient", "guided"):
        assert rows[method][2] == [v["cosine"] for v in width[method].values()]

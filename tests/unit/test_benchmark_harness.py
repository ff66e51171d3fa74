"""The benchmark: its statistics, its rounds, its tables, and that every row of its short form runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import harness, memory, profile, report
from benchmarks.harness import Clock, Net, Ratio, Row
from benchmarks.rows import Setting, folded, rows
from torch import Tensor, nn
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

import apportion as ap

CPU = torch.device("cpu")


def linear() -> Net:
    model = nn.Linear(3, 2).requires_grad_(False)
    model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]))
    return Net(model, torch.ones(4, 3))


def test_quartiles() -> None:
    assert harness.quartiles([5.0]) == (5, 5, 5)
    assert harness.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2, 3, 4)


def test_ratios_are_taken_within_a_round() -> None:
    # the machine slows down threefold in the second round; a ratio of medians would say 2.5 / 1.5 of nothing
    times = {"ours": [2.0, 6.0, 2.0], "theirs": [1.0, 3.0, 1.0]}
    found = Ratio("over", {"ours": 1}, {"theirs": 1}, at_most=1.3).of(times)
    assert (found["low"], found["median"], found["high"]) == (2, 2, 2)
    assert not found["met"]
    assert Ratio("faster", {"theirs": 2}, {"ours": 0.5}, at_least=1.6).of(times) == {
        "name": "faster", "low": 2, "median": 2, "high": 2, "goal": "≥ 1.6", "met": True,
    }  # fmt: skip


def test_more_backward_than_forward_passes_are_weighed() -> None:
    times = {"ours": [7.0], "bare": [3.0], "bare forward": [1.0]}  # one forward, three backward: 1 + 3 * 2
    assert Ratio("", {"ours": 1}, {"bare": 3, "bare forward": 1 - 3}).of(times)["median"] == 1


def test_rounds_are_interleaved_and_rotate() -> None:
    order: list[str] = []

    class Told(Clock):
        def __call__(self, run: Callable[[], object], times: int = 1) -> float:
            run()
            self.wall.append(float(times))
            return 1.0

    variants = {name: (lambda name=name: order.append(name), often) for name, often in (("a", 1), ("b", 5), ("c", 1))}
    times, wall = harness.interleave(variants, Told(CPU), rounds=3, seconds=100)
    assert order == list("abcbcacab")
    assert times == {"a": [1, 1, 1], "b": [1, 1, 1], "c": [1, 1, 1]}
    assert wall["b"] == 5
    times, _ = harness.interleave(variants, Told(CPU), rounds=50, seconds=0)
    assert len(times["a"]) == 3  # never fewer, unless fewer are asked for


def test_distance_weighs_examples_alike() -> None:
    exact = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    off = exact + torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    assert harness.distance(off, exact) == pytest.approx(0.1 / 2**0.5)


def test_rows_are_counted() -> None:
    net = linear()
    with harness.counted(net.model) as found:
        net.gradient()
        net.forward()
    assert found == [8, 4]
    with harness.counted(net.model) as found:
        pass
    net.gradient()
    assert found == [0, 0]  # nothing is left behind


def test_a_row_says_who_fails_and_how_far_maps_are() -> None:
    def fails(net: Net) -> Callable[[], Tensor]:
        raise ImportError("No module named 'peer'\nand more")

    def other(net: Net) -> Callable[[], Tensor]:
        return lambda: 2 * net.gradient()

    def rough(net: Net) -> Callable[[], Tensor]:
        return lambda: net.gradient() * (1 if net.x.dtype == torch.float64 else 1.01)

    variants = {"apportion": lambda net: net.gradient, "absent": fails, "other": other, "rough": rough}
    row = Row("x/y", linear, variants, lambda p, j: [Ratio("r", {"rough": 1}, {"absent": 1})], judged=True)
    found = harness.measure(row, device=CPU, rounds=2)
    assert found["variants"]["absent"] == {"failed": "ImportError: No module named 'peer'"}
    assert found["ratios"] == []  # of what ran only
    assert list(found["variants"]) == list(variants)
    assert found["variants"]["apportion"]["from float64"] == 0
    assert found["variants"]["other"]["apart"] == pytest.approx(1)
    assert found["variants"]["rough"]["from float64"] == pytest.approx(0.01, rel=1e-4)
    assert found["variants"]["rough"]["rows"] == [4, 4]
    assert "absent: cannot run here (ImportError: No module named 'peer')" in "\n".join(report.table([found]))


def test_maps_may_be_judged_by_a_given_one() -> None:
    variants = {"apportion": lambda net: net.gradient, "other": lambda net: lambda: 3 * net.gradient()}
    exact = lambda net: lambda: 2 * net.gradient()  # noqa: E731
    seen = []
    row = Row("x/y", linear, variants, lambda p, j: seen.append(j) or [harness.told("q", 3.0, at_most=2)], True, exact)
    found = harness.measure(row, device=CPU, rounds=1)
    assert [v["from float64"] for v in found["variants"].values()] == [0.5, 0.5]
    assert seen[0]["other"] == {"from float64": 0.5}
    assert found["ratios"] == [{"name": "q", "median": 3.0, "low": 3.0, "high": 3.0, "goal": "≤ 2", "met": False}]


def test_variants_do_not_share_a_model() -> None:
    seen: list[int] = []

    def hooks(net: Net) -> Callable[[], Tensor]:
        net.model.register_forward_hook(lambda *_: seen.append(1))
        return net.gradient

    def clean(net: Net) -> Callable[[], Tensor]:
        assert not net.model._forward_hooks
        return net.gradient

    found = harness.measure(Row("x/y", linear, {"a": hooks, "b": clean}, lambda p, j: []), device=CPU, rounds=1)
    assert seen
    assert "failed" not in found["variants"]["b"]


def test_best_bare_pass_is_the_same_function() -> None:
    net = Setting(short=True).net("lite0", 2)()
    with torch.no_grad():
        before = net.model(net.x)
        after = folded(net)(net.x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.model.modules())
    assert float((after - before).norm() / before.norm()) < 1e-5


FOUND = [
    {
        "name": "ig/net",
        "x": [1, 3],
        "dtype": "float32",
        "variants": {
            "apportion": {"ms": 1.20004, "low": 1.0, "high": 2.0, "wall": 1, "rows": [4.0, 3.0], "from float64": 2e-7},
            "captum": {"ms": 2.0, "low": 1.0, "high": 3.0, "wall": 2.0, "rows": [3.0, 3.0], "apart": 3e-16},
            "other": {"failed": "TypeError: a | b"},
        },
        "ratios": [{"name": "faster", "median": 1.62, "low": 1.5, "high": 1.7, "goal": "≥ 1.6", "met": True}],
        "machine": {"cpu": "one", "threads": 1, "torch": "2", "python": "3", "gpu": None, "device": "cpu"},
    },
    {"name": "peers/occlusion", "missing": "captum has it; not yet ours"},
    {
        "name": "memory/net/many",
        "variants": {"apportion": {"mib": 100.4}},
        "ratios": [{"name": "over", "median": 2.0, "low": 2.0, "high": 2.0, "goal": "≤ 1.2", "met": False, "why": "w"}],
    },
]  # fmt: skip


def test_tables_are_made_of_the_record(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    report.write({str(r["name"]): r for r in FOUND}, {"torch": "2"}, file)
    kept = report.read(file)
    assert list(kept) == ["ig/net", "peers/occlusion", "memory/net/many"]
    assert kept["ig/net"]["variants"]["apportion"]["ms"] == 1.2
    assert json.loads(file.read_text())["versions"] == {"torch": "2"}
    text = file.with_suffix(".md").read_text()
    assert text == report.markdown(list(kept.values()), {"torch": "2"})
    assert "apportion 1.2 (4 + 3); captum 2 (3 + 3); other: cannot run here (TypeError: a / b)" in text
    assert "faster 1.62 (1.50 to 1.70), goal ≥ 1.6 | apportion 2e-07 | captum 3e-16 |" in text
    assert "| occlusion | captum has it; not yet ours | | | |" in text
    assert "over 2.00 (2.00 to 2.00), goal ≤ 1.2 **missed** (w)" in text
    assert report.missed(kept.values()) == ["memory/net/many: over 2.00 (2.00 to 2.00), goal ≤ 1.2 **missed** (w)"]
    for line in text.splitlines():
        assert not line.startswith("| ") or line.count("|") == 6


def test_what_is_lost_is_listed() -> None:
    slow = {"name": "times faster", "median": 0.8, "low": 0.7, "high": 0.9}
    even = slow | {"high": 1.1}  # within what rounds differ
    row = {"name": "peers/net/x", "variants": {"apportion": {"failed": "E: why"}, "captum": {"failed": "E"}}}
    text = report.markdown([row | {"ratios": [slow, even]}, FOUND[2]], {})
    lost = text.partition("## What we lose")[2].partition("\n## ")[0]
    assert [line for line in lost.splitlines() if line] == [
        "- memory/net/many: over 2.00 (2.00 to 2.00), goal ≤ 1.2 **missed** (w)",
        "- peers/net/x: times faster 0.80 (0.70 to 0.90)",
        "- peers/net/x: apportion: E: why",
    ]
    assert "Nothing." in report.markdown([FOUND[0]], {})


def test_one_row_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    report.write({"peers/occlusion": FOUND[1]}, {}, file)
    found = report.read(file) | {"peers/occlusion": FOUND[1] | {"missing": "gone"}, "memory/net/many": FOUND[2]}
    report.write(found, {}, file)
    assert report.read(file)["peers/occlusion"]["missing"] == "gone"
    assert report.read(tmp_path / "none.json") == {}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, report.Found]:
    file = tmp_path_factory.mktemp("bench") / "speed.json"
    given = [sys.executable, "-m", "benchmarks", "--short", "--out", str(file)]  # alone: without checks of shapes
    root = Path(command.__file__).parents[1]
    done = subprocess.run(given, cwd=root, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return report.read(file)


def test_every_row_runs_in_short(short: dict[str, report.Found]) -> None:
    assert report.failing(short.values()) == []
    ran = [r["variants"] for r in short.values() if "missing" not in r]
    ours = [v for found in ran for k, v in found.items() if k.startswith(harness.OURS)]
    assert len(ours) >= len(ran)
    assert all(v.get("mib", v.get("ms")) > 0 for v in ours)
    assert {n.split("/")[0] for n in short} == {"overhead", "ig", "compile", "peers", "methods", "scaling", "memory"}
    of_pictures = {name for name, card in ap.methods().items() if ap.Need.VECTORS not in card.needs}
    assert {n.split("/")[2] for n in short if n.startswith("methods/")} == of_pictures
    assert set(rows_named()) <= set(short)


def rows_named() -> list[str]:
    return [r.name for r in (*rows(Setting(short=True)), *memory.rows(short=True))]


def test_long_form_has_the_rows_of_the_short_one() -> None:
    kinds = {n.rpartition("/")[0] for n in rows_named() if not n.startswith(("memory", "scaling"))}
    assert kinds <= {r.name.rpartition("/")[0] for r in rows(Setting())}


def test_kernels_are_added_once() -> None:
    def event(device: DeviceType, time: float, note: bool = False) -> SimpleNamespace:
        return SimpleNamespace(device_type=device, self_device_time_total=time, is_user_annotation=note)

    launched = event(DeviceType.CPU, 5.0)
    ran, marked = event(DeviceType.CUDA, 5.0), event(DeviceType.CUDA, 9.0, True)
    assert profile.kernels([launched, ran, ran, marked]) == 10


def test_what_a_cpu_can_tell_of_a_profile() -> None:
    """Most of 30 products of large matrices is in torch's operations, next to nothing of a loop in Python is."""
    a = torch.rand(400, 400)
    taken, inside = profile.traced(lambda: [a @ a for _ in range(30)], CPU)
    assert 0.5 * taken < inside < 1.5 * taken
    taken, inside = profile.traced(lambda: sum(i * i for i in range(300_000)), CPU)
    assert inside < 0.2 * taken
    row = profile.measure(profile.rows(CPU)[1], CPU, short=True)
    assert set(row["variants"]) == {"apportion", "bare"}
    assert all(v["kernels"] > 0 for v in row["variants"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        command.main(["--device", "cuda", "--list"])


@pytest.mark.parametrize("more", [[], ["--list"], ["--only", "overhead/mlp"]])
def test_a_name_that_no_row_has_is_refused(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no row has 'nope' in its name: python -m benchmarks --list --short"):
        command.main(["--short", "--only", "nope", *more])
    assert capsys.readouterr().out == ""

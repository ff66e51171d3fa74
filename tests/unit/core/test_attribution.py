"""Attributions: gaps, reductions, storage."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import apportion as ap
from apportion.core import tree
from apportion.core.attribution import Domain
from apportion.core.errors import ConfigError, InputError

DOUBLE = torch.float64


def product(a: Tensor, b: Tensor) -> Tensor:
    return (a**2).flatten(1).sum(1) * b.sum(1)


def pictures() -> ap.Attribution:
    field = ap.Field(lambda x: torch.stack([x.flatten(1).prod(1), (x**2).flatten(1).sum(1)], 1))
    method = ap.IntegratedGradients(ap.baselines.Noise(0.3, count=2), ap.quadrature.Gauss(2))
    return method(field, torch.randn(2, 3, 2, 2, dtype=DOUBLE), target=1)


def with_total(values: Any, total: Any) -> ap.Attribution:
    values = torch.tensor(values, dtype=DOUBLE)
    a = ap.GradientTimesInput()(ap.Field(lambda x: x.sum(1)), values)
    return replace(a, values=values, claimed_total=None if total is None else torch.tensor(total, dtype=DOUBLE))


# -- gaps ---------------------------------------------------------------------------------------


def test_gap_and_relative_gap() -> None:
    a = with_total([[1, 2], [1, 2], [0, 0], [1, 2], [1, 2]], [3, 4, 0, 0, -6])
    assert a.gap is not None
    assert a.gap.tolist() == [0, -1, 0, 3, 9]
    assert a.relative_gap is not None
    assert a.relative_gap.tolist() == [0, 0.25, 0, torch.inf, 1.5]
    assert "9" in a.gap_note
    assert "150.00%" in a.gap_note
    none = with_total([[1, 2]], None)
    assert none.gap is None
    assert none.relative_gap is None
    assert "claims no total" in none.gap_note


def test_a_sensitivity_has_no_total() -> None:
    a = ap.Gradient()(ap.Field(lambda x: x.sum(1)), torch.ones(1, 2))
    assert a.kind is ap.Kind.SENSITIVITY
    assert a.claimed_total is None
    assert "not applicable" in a.gap_note
    with pytest.raises(ConfigError, match="sensitivity"):
        replace(a, claimed_total=torch.zeros(1))
    b = ap.GradientTimesInput()(ap.Field(lambda x: x.sum(1)), torch.ones(1, 2))
    assert b.kind is ap.Kind.SALIENCE
    assert b.claimed_total is not None


def test_wrappers_have_the_kind_of_their_base() -> None:
    field, x = ap.Field(lambda x: (x**2).sum(1)), torch.randn(2, 3)
    assert ap.SmoothGrad(samples=2)(field, x).kind is ap.Kind.SENSITIVITY
    nested = ap.SmoothGrad(ap.SmoothGrad(ap.IntegratedGradients(), 2), 2)(field, x)
    assert nested.kind is ap.Kind.SALIENCE
    assert nested.claimed_total is not None


def test_description() -> None:
    a = pictures()
    text = repr(a.channel_sum())
    for word in ("IntegratedGradients", "salience", "2 example(s)", "(2, 1, 2, 2)", "gap at most", "channel_sum(1)"):
        assert word in text
    assert "warning: look" in repr(replace(a, warnings=("look",)))
    assert len(a) == 2


# -- reductions ---------------------------------------------------------------------------------


def test_pool() -> None:
    a = pictures()
    pooled = a.pool(ap.groups.Pixels())
    assert torch.allclose(pooled.values, a.values.sum(1).flatten(1), atol=1e-14)
    assert pooled.domain is Domain.GROUPS
    assert pooled.claimed_total is not None
    assert pooled.gap is not None
    assert a.gap is not None
    assert torch.allclose(pooled.gap, a.gap, atol=1e-13)
    assert pooled.postprocessing == ("pool",)
    halves = ap.groups.Labels(torch.tensor([[[[0, 0], [1, -1]]]]))
    part = a.pool(halves)
    flat = a.values.sum(1)
    assert torch.allclose(part.values, torch.stack([flat[:, 0].sum(1), flat[:, 1, 0]], 1), atol=1e-14)
    assert part.claimed_total is None  # something is in no group
    each = torch.zeros(2, 3, 2, 2, dtype=torch.long)
    each[1] = 1
    found = a.pool(ap.groups.Labels(each)).values
    sums = a.values.flatten(1).sum(1)
    assert torch.allclose(
        found, torch.stack([torch.stack([sums[0], sums[0] * 0]), torch.stack([sums[1] * 0, sums[1]])])
    )


def test_pool_over_several_inputs() -> None:
    x = {"a": torch.randn(2, 2, 2, dtype=DOUBLE), "b": torch.randn(2, 3, dtype=DOUBLE)}
    a = ap.IntegratedGradients()(ap.Field(product), x)
    labels = {"a": torch.tensor([[0, 1], [1, 2]]), "b": torch.tensor([2, 2, 3])}
    pooled = a.pool(ap.groups.Labels(labels))
    va, vb = a.values["a"], a.values["b"]
    want = [va[:, 0, 0], va[:, 0, 1] + va[:, 1, 0], va[:, 1, 1] + vb[:, 0] + vb[:, 1], vb[:, 2]]
    assert torch.allclose(pooled.values, torch.stack(want, 1), atol=1e-14)
    assert pooled.claimed_total is not None
    assert pooled.gap is not None
    assert float(pooled.gap.abs().max()) < 1e-11
    nobody = a.pool(ap.groups.Labels({"a": labels["a"], "b": torch.full((3,), -1)}))
    assert nobody.values.shape == (2, 3)
    assert nobody.claimed_total is None


def test_channels() -> None:
    a = pictures()
    summed = a.channel_sum()
    assert torch.allclose(summed.values, a.values.sum(1, keepdim=True), atol=1e-15)
    assert summed.claimed_total is a.claimed_total
    largest = a.channel_max_abs()
    assert torch.equal(largest.values, a.values.abs().amax(1, keepdim=True))
    assert largest.claimed_total is None
    last = a.channel_sum(3)
    assert last.values.shape == (2, 3, 2, 1)
    magnitude = a.abs()
    assert torch.equal(magnitude.values, a.values.abs())
    assert magnitude.claimed_total is None
    assert magnitude.channel_sum().postprocessing == ("abs", "channel_sum(1)")
    assert a.postprocessing == ()
    for axis in (0, 4, -1):
        with pytest.raises(InputError, match="1 to 3"):
            a.channel_sum(axis)
    with pytest.raises(InputError):
        ap.Gradient()(ap.Field(lambda x: x**2), torch.ones(2)).channel_sum()


def test_resize() -> None:
    a = pictures()
    assert torch.allclose(
        a.resize((4, 6)).values, torch.nn.functional.interpolate(a.values, (4, 6), mode="bilinear"), atol=1e-15
    )
    cam = replace(a, values=a.values[:, 0])
    assert cam.resize((5, 5)).values.shape == (2, 1, 5, 5)
    assert replace(a, values=a.values[:, :, 0]).resize((7,)).values.shape == (2, 3, 7)
    constant = replace(a, values=torch.full((2, 1, 2, 2), 0.3, dtype=DOUBLE)).resize((9, 9))
    assert torch.allclose(constant.values, torch.full((2, 1, 9, 9), 0.3, dtype=DOUBLE))
    assert constant.claimed_total is None
    for size in ((2,), (2, 2, 2)):
        with pytest.raises(InputError, match="spatial"):
            a.resize(size)


def test_to_moves_every_tensor() -> None:
    a = pictures().to("meta")
    assert a.references is not None
    held = [a.values, a.value, a.claimed_total, a.target, *tree.leaves(a.parts), a.references.rows]
    held += [a.references.value, a.references.top_class, a.cost.forward, a.cost.backward, a.cost.at_x]
    assert all(isinstance(t, Tensor) and t.is_meta for t in held)
    assert a.method == pictures().method


# -- storage ------------------------------------------------------------------------------------


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, ap.Cost | ap.References | ap.Attribution):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b


def results() -> dict[str, ap.Attribution]:
    x = {"a/b": torch.randn(2, 2, dtype=DOUBLE), "a": {"b": torch.randn(2, 3, dtype=DOUBLE)}}

    def slashes(**inputs: Any) -> Tensor:
        return (inputs["a/b"] ** 2).sum(1) * inputs["a"]["b"].sum(1)

    region = ap.Region(torch.tensor([[1.0, 0.5]]))
    given = ap.baselines.Given((torch.zeros(2, dtype=DOUBLE), torch.ones(1, 3, dtype=DOUBLE)))
    pair = (torch.randn(2, 2, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE))
    grid = torch.randn(2, 3, 1, 2)
    return {
        "pictures": pictures(),
        "reduced": pictures().channel_sum().abs(),
        "dict": ap.SmoothGrad(samples=2)(ap.Field(slashes), x),
        "tuple": ap.IntegratedGradients(given)(ap.Field(product), pair, seed=-3),
        "list": ap.Gradient()(ap.Field(product), list(pair), ids=["a", "b"]),
        "one number": ap.Gradient()(ap.Field(lambda x: x), torch.ones(2)),
        "half": ap.GradientTimesInput()(ap.Field(lambda x: x.sum(1)), torch.ones(2, 3).bfloat16()),
        "targets": ap.Gradient()(ap.Field(lambda x: x, region), grid, target=[0, 2]),
        "warned": ap.SmoothGrad(samples=2)(ap.Field(lambda x: x.sum(1)), torch.ones(2, 3)),
        "callable": ap.Gradient()(ap.Field(lambda x: x, lambda z: z[:, 0]), torch.ones(2, 3)),
    }


RESULTS = results()


@pytest.mark.parametrize("name", RESULTS)
def test_save_and_load_are_exact(name: str, tmp_path: Path) -> None:
    a = RESULTS[name]
    a.save(tmp_path / "a.safetensors")
    b = ap.Attribution.load(tmp_path / "a.safetensors")
    for f in fields(a):
        assert equal(getattr(a, f.name), getattr(b, f.name)), f.name
    b.save(str(tmp_path / "b.safetensors"))
    assert equal(ap.Attribution.load(str(tmp_path / "b.safetensors")), a)


def test_the_comparison_sees_differences() -> None:
    a = RESULTS["dict"]
    assert equal(a, replace(a, seed=a.seed))
    assert not equal(a, replace(a, seed=1))
    assert not equal(a, replace(a, values=tree.apply(lambda t: t + 1e-15, a.values)))
    assert not equal(a, replace(a, parts={}))


@pytest.mark.parametrize("name", [n for n in RESULTS if n != "callable"])
def test_the_explainer_is_rebuilt_and_repeats_itself(name: str, tmp_path: Path) -> None:
    a = RESULTS[name]
    a.save(tmp_path / "a.safetensors")
    b = ap.Attribution.load(tmp_path / "a.safetensors")
    assert b.reproducible
    again = b.explainer()
    assert type(again).__name__ == a.method["type"]
    if name == "tuple":
        x = (torch.randn(2, 2, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE))
        first = ap.IntegratedGradients(
            ap.baselines.Given((torch.zeros(2, dtype=DOUBLE), torch.ones(1, 3, dtype=DOUBLE)))
        )(ap.Field(product), x)
        assert equal(again(ap.Field(product), x).values, first.values)


def test_scores_with_user_code_are_marked(tmp_path: Path) -> None:
    a = RESULTS["callable"]
    a.save(tmp_path / "a.safetensors")
    b = ap.Attribution.load(tmp_path / "a.safetensors")
    assert not b.reproducible
    assert isinstance(b.explainer(), ap.Gradient)


def test_loaded_tensors_are_the_files_own(tmp_path: Path) -> None:
    a = pictures()
    a.save(tmp_path / "a.safetensors")
    a.values.zero_()
    assert ap.Attribution.load(tmp_path / "a.safetensors").values.any()


def damage(path: Path, change: Any) -> None:
    """Rewrite the record of a stored file."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        record = json.loads(file.metadata()["apportion"])
    tensors = load_file(path)
    record = change(record, tensors) or record
    save_file(tensors, path, {"apportion": record if isinstance(record, str) else json.dumps(record)})


@pytest.mark.parametrize(
    "change",
    [
        lambda r, t: "not json",
        lambda r, t: "[]",
        lambda r, t: "3",
        lambda r, t: r.pop("version") and None,
        lambda r, t: r.update(version=2),
        lambda r, t: r.pop("values") and None,
        lambda r, t: r.pop("kind") and None,
        lambda r, t: r.update(kind="no such kind"),
        lambda r, t: r.update(unknown=1),
        lambda r, t: r.update(cost={"rows": 1}),
        lambda r, t: r.update(references=3),
        lambda r, t: t.pop(next(k for k in t if "values" in k)).sum() and None,
        lambda r, t: r.update(values={"tensor": "../../etc/passwd"}),
    ],
)
def test_damaged_files(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    pictures().save(path)
    damage(path, lambda r, t: None)
    assert len(ap.Attribution.load(path)) == 2
    damage(path, change)
    with pytest.raises(ConfigError, match=r"a\.safetensors"):
        ap.Attribution.load(path)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ConfigError, match=r"a\.safetensors"):
        ap.Attribution.load(path)
    for content in (b"", b"text", b"\x00" * 100):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"a\.safetensors"):
            ap.Attribution.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ConfigError, match="no record of ours"):
        ap.Attribution.load(path)
    pictures().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ConfigError):
        ap.Attribution.load(path)


def test_a_stored_class_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    pictures().save(path)
    damage(path, lambda r, t: r.update(method={"type": "elsewhere:Method"}))
    a = ap.Attribution.load(path)
    assert a.values.shape == (2, 3, 2, 2)
    with pytest.raises(ConfigError, match="elsewhere:Method"):
        a.explainer()

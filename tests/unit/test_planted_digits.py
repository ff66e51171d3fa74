"""The planted pictures are what they say: exact masks, splits apart, a class that bright pixels cannot move."""

from __future__ import annotations

import importlib

import pytest
import torch

import apportion as ap
from apportion.core.errors import ConfigError
from apportion.planted import digits
from apportion.planted.grids import untile

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("PIL")


def test_masks_are_exact() -> None:
    p = digits.pictures(40)
    assert p.x.min() >= 0
    assert p.x.max() <= 1
    for x, mask, dark in zip(p.x, p.masks, p.dark, strict=True):
        ink = x[:, mask]
        assert (ink == ink[:, :1]).all()  # one colour
        assert (ink <= 0.1).all() if dark else (ink >= 0.9).all()
        assert ((x[:, ~mask] >= 0.2) & (x[:, ~mask] <= 0.8)).all()
        assert 0.02 < mask.float().mean() < 0.4


def test_all_classes_and_both_inks() -> None:
    p = digits.pictures(200)
    assert set(p.labels.tolist()) == set(range(10))
    assert int(p.dark.sum()) == 100
    assert digits.pictures(6, ink="dark").dark.all()
    assert not digits.pictures(6, ink="light").dark.any()
    part = p[p.dark]
    assert len(part) == 100
    assert part.dark.all()


def test_seeded_without_touching_the_global_state() -> None:
    before = torch.random.get_rng_state()
    first, again, other = digits.pictures(6), digits.pictures(6), digits.pictures(6, seed=1)
    one, two = digits.network(3), digits.network(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(first.x, digits.pictures(6, "train").x)


def test_splits_share_no_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    images, classes = digits._digits()
    marked = torch.arange(len(classes))
    monkeypatch.setattr(digits, "_digits", lambda: (images, marked))  # the class is now which digit it is
    train = set(digits.pictures(300, "train").labels.tolist())
    test = set(digits.pictures(300, "test").labels.tolist())
    assert max(train) < min(test)


def test_training_is_repeatable() -> None:
    a, b = (digits.train(count=128, epochs=2, test=50) for _ in range(2))
    assert a.accuracy == b.accuracy
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert not a.model.training
    assert not any(p.requires_grad for p in a.model.parameters())


@pytest.mark.slow
def test_training_learns() -> None:
    assert digits.train(count=3000, epochs=8, test=300).accuracy > 0.4  # chance is 0.1


def test_dark_pixels_alone_decide() -> None:
    model, p = digits.dark_object_task(60)
    assert (model(p.x).argmax(1) == p.labels).all()
    assert set(p.labels.tolist()) == {0, 1, 2, 3}
    held = p.x[~p.masks[:, None].expand_as(p.x)]
    assert held.min() >= 0.5
    for value in (0.25, 0.6, 1.0):
        assert torch.equal(model(torch.where(p.masks[:, None], p.x, value)), model(p.x))
    assert (model(torch.where(p.masks[:, None], 0.7, p.x)) == 0).all()  # without the object nothing is left


def test_the_planted_answer_and_how_black_misses_it() -> None:
    model, p = digits.dark_object_task(12)
    field = ap.Field(model, bounds=(0, 1))

    def share(explainer: ap.IntegratedGradients | ap.Gradient) -> torch.Tensor:
        values = explainer(field, p.x).values
        assert isinstance(values, torch.Tensor)
        mass = values.sum(1).abs()
        return (mass * p.masks).sum((1, 2)) / mass.sum((1, 2))

    white = share(ap.IntegratedGradients(ap.baselines.Constant(1.0)))
    assert torch.allclose(white, torch.ones(12))
    assert torch.allclose(share(ap.Gradient()), torch.ones(12))
    assert model(torch.zeros(1, 3, 48, 48)).abs().max() < 1e-4  # so the whole score is to be shared out
    # pure black ink equals the baseline and gets exactly nothing
    p.x.copy_(torch.where(p.masks[:, None], 0.0, p.x))
    assert (share(ap.IntegratedGradients(ap.baselines.Zero())) == 0).all()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="sklearn")

    digits._digits.cache_clear()
    with monkeypatch.context() as m:
        m.setattr(importlib, "import_module", absent)
        with pytest.raises(ConfigError, match="pip install scikit-learn scikit-image pillow"):
            digits.pictures(1)
    digits._digits.cache_clear()


def test_import_needs_no_optional_package() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules.update(dict.fromkeys(('sklearn', 'skimage', 'PIL')))\n"
        "from apportion.planted import digits; digits.network()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the grid pointing game --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pooled() -> digits.Trained:
    return digits.train_pooled()


def test_the_pooled_network_learns(pooled: digits.Trained) -> None:
    assert pooled.accuracy > 0.96
    assert pooled.model(torch.zeros(1, 1, 24, 24)).shape == (1, 10)


@pytest.mark.parametrize(("side", "size", "least"), [(2, 8, 0.99), (3, 8, 0.9), (2, 10, 0.6)])
def test_grids(pooled: digits.Trained, side: int, size: int, least: float) -> None:
    before = torch.random.get_rng_state()
    p = digits.grid_game(pooled.model, 36, side, least=least, size=size)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(p.x, digits.grid_game(pooled.model, 36, side, least=least, size=size).x)
    cells = untile(p.x, side)
    assert isinstance(p.target, torch.Tensor)
    found = pooled.model(cells.flatten(0, 1)).softmax(1).max(1)
    classes = found.indices.reshape(36, -1)
    assert (found.values >= least).all()
    assert all(len(set(row)) == side**2 for row in classes.tolist())
    inside = untile(p.truth[:, None], side).flatten(2)
    assert (inside.all(2) == inside.any(2)).all()
    assert torch.equal(classes[inside.all(2)], p.target)
    assert (inside.all(2).sum(0) == 36 / side**2).all()
    assert p.chance == 1 / side**2


def test_grad_cam_and_occlusion_point_better_than_gradients(pooled: digits.Trained) -> None:
    """The order of the published evaluation; a perfect share is not to be had, since cells do share features."""
    p = digits.grid_game(pooled.model, 40)
    field = ap.Field(p.model)

    def share(a: ap.Attribution) -> float:
        positive = a.values.relu() if a.values.ndim == 3 else a.values.sum(1).relu()
        total = positive.sum((1, 2)).clamp(min=1e-7)
        return float(((positive * p.truth).sum((1, 2)) / total).mean())

    cam = share(ap.GradCAM(ap.At("5"))(field, p.x, target=p.target))
    removed = share(ap.Occlusion(ap.groups.Patches(2, 2))(field, p.x, target=p.target).spread())
    slope = share(ap.Gradient()(field, p.x, target=p.target))
    assert min(cam, removed) > 0.4
    assert 0.2 < slope < 0.35
    assert p.chance == 0.25


def test_grids_that_cannot_be_made() -> None:
    with pytest.raises(ConfigError, match="2 or 3"):
        digits.grid_game(digits.pooled_network(), side=4)
    with pytest.raises(ConfigError, match="sure of 0 classes"):
        digits.grid_game(digits.pooled_network())

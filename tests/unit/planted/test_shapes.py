"""Shapes on textures: two labels that are independent, and two models that read apart."""

from __future__ import annotations

import torch

import apportion as ap
from apportion import planted


def inside(values: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    mass = values.abs().sum(1)
    return (mass * masks).sum((1, 2)) / mass.sum((1, 2))


def test_both_models_are_right() -> None:
    for seed in range(3):
        p = planted.shapes_on_textures(48, seed)
        assert p.object.x is p.scene.x
        objects, scenes = p.object.target, p.scene.target
        assert isinstance(objects, torch.Tensor)
        assert isinstance(scenes, torch.Tensor)
        assert torch.equal(p.object.model(p.object.x).argmax(1), objects)
        for x in (p.object.x, p.bare):
            assert torch.equal(p.scene.model(x).argmax(1), scenes)
        assert (p.object.model(p.bare) == 0).all()
        assert torch.equal(p.masks, ~p.scene.truth)
        pairs = set(zip(objects.tolist(), scenes.tolist(), strict=True))
        assert len(pairs) == 12
        assert p.object.x.min() >= 0
        assert p.object.x.max() <= 1
        changed = (p.object.x != p.bare).any(1)
        assert torch.equal(changed, p.masks)


def test_each_model_reads_its_own_part_only() -> None:
    p = planted.shapes_on_textures(12)
    maps = [ap.Gradient()(ap.Field(q.model), q.x, target=q.target).values for q in (p.object, p.scene)]
    assert (inside(maps[0], p.masks) == 1).all()
    assert (inside(maps[1], p.masks) == 0).all()
    # other shapes' ground changes nothing for the object model, other colors nothing for the scene model
    elsewhere = torch.where(p.masks[:, None], p.object.x, p.bare.roll(1, 0))
    assert torch.equal(p.object.model(elsewhere), p.object.model(p.object.x))
    dyed = torch.where(p.masks[:, None], p.object.x[:, [1, 0, 2]], p.object.x)
    assert torch.equal(p.scene.model(dyed), p.scene.model(p.object.x))


def test_input_dependence_is_met_by_a_right_method() -> None:
    """The scene model attributes less to the region of a shape than to the same region without it."""
    p = planted.shapes_on_textures(12)
    field = ap.Field(p.scene.model)
    with_it, without = (ap.Gradient()(field, x, target=p.scene.target).values for x in (p.scene.x, p.bare))
    region = p.masks[:, None]
    assert ((with_it.abs() * region).sum((1, 2, 3)) < (without.abs() * region).sum((1, 2, 3))).all()


def test_seeds_alone_decide() -> None:
    before = torch.random.get_rng_state()
    a, b, c = (planted.shapes_on_textures(6, s) for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.object.x, b.object.x)
    assert not torch.equal(a.object.x, c.object.x)

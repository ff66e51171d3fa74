"""Degradation of tiles: closed forms, the definition written out, units of the data, wrong maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion.core.errors import ConfigError, InputError
from apportion.metrics import ABPC, Degradation, Scores, Sparseness, rescaled
from apportion.planted import linear


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten())
        return nn.Sequential(net, nn.Linear(54, 4)).double().eval().requires_grad_(False)


X = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MAPS = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
TILES = ap.groups.Squares(5)


def written_out(net: nn.Module, x: Tensor, maps: Tensor, side: int) -> tuple[float, float, float]:
    """The score of the data by Schulz et al.: curves of all pictures, rescaled by t1 and b, and the area between."""
    target = net(x).argmax(1)
    tiles = [(i, j) for i in range(0, x.shape[2], side) for j in range(0, x.shape[3], side)]
    curves = np.zeros((2, len(x), len(tiles) + 1))
    for b in range(len(x)):
        worth = [float(maps[b, i : i + side, j : j + side].sum()) for i, j in tiles]
        for order in (0, 1):
            ranked = sorted(range(len(tiles)), key=lambda t: worth[t], reverse=order == 0)
            now = x[b].clone()
            for k in range(len(tiles) + 1):
                if k:
                    i, j = tiles[ranked[k - 1]]
                    now[:, i : i + side, j : j + side] = 0
                curves[order, b, k] = float(net(now[None])[0].softmax(0)[target[b]])
    t1, b = float(curves[0, :, 0].mean()), float(curves[0, :, -1].mean())
    morf, lerf = ((c.mean(0) - b) / (t1 - b) for c in curves)
    between = lerf - morf
    return float(((between[1:] + between[:-1]) / 2).mean()), t1, b


def test_the_definition_written_out_gives_the_same() -> None:
    net = network()
    net[1].bias[int(net(X).sum(0).argmax())] += 1  # pyright: ignore
    wanted, t1, b = written_out(net, X, MAPS, 5)
    field = ap.Field(net)
    found = Degradation(groups=TILES)(field, X, MAPS)
    assert float(found.parts["full"].mean()) == pytest.approx(t1, abs=1e-12)
    assert float(found.parts["empty"].mean()) == pytest.approx(b, abs=1e-12)
    scores = rescaled(found)
    assert float(scores.values.mean()) == pytest.approx(wanted, abs=1e-12)
    assert scores.summary().mean == pytest.approx(wanted, abs=1e-12)
    known = Degradation(groups=TILES, full=scores.metric["full"], empty=scores.metric["empty"])(field, X, MAPS)
    assert known.metric == scores.metric
    torch.testing.assert_close(known.values, scores.values)
    for name in ("MoRF", "LeRF"):
        torch.testing.assert_close(known.curves[name].y, scores.curves[name].y)
        assert known.curves[name].y_label == scores.curves[name].y_label == "Probability, rescaled"
        assert scores.curves[name].y[:, [0, -1]].mean(0).tolist() == pytest.approx([1, 0])
    alone = Scores.join([Degradation(groups=TILES)(field, X[i : i + 1], MAPS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(rescaled(alone).values, scores.values)


def test_closed_form_on_a_linear_model_and_a_wrong_map_is_rejected() -> None:
    """Both curves are steps of the sorted contributions c: the area between is Σ (2i - n - 1)(c_n+1-i) / n."""
    p = linear(features=7, examples=5)
    c, n = p.truth.sort(1, descending=True).values, 7
    i = torch.arange(1, n + 1, dtype=torch.float64)
    options: dict[str, Any] = {"fill": ap.fills.Baselines(ap.baselines.Given(p.baseline)), "score": ap.Logit()}
    field = ap.Field(p.model)
    beside = [ap.controls.Random()]
    found = Degradation(**options)(field, p.x, p.truth, controls=beside)
    torch.testing.assert_close(found.values, (c * (n + 1 - 2 * i)).sum(1) / n)
    torch.testing.assert_close(found.values, ABPC(**options)(field, p.x, p.truth).values * (n + 1) / n)
    for wrong in (-p.truth, torch.zeros_like(p.truth), p.truth.roll(3, 1)):
        worse = Degradation(**options)(field, p.x, wrong).values
        assert bool((worse < found.values - 1e-3).all())
    torch.testing.assert_close(Degradation(**options)(field, p.x, -p.truth).values, -found.values)
    lost = float((p.model(p.x) - p.model(p.baseline.expand_as(p.x))).mean())
    up, down = (
        Degradation(**options)(ap.Field(lambda x, s=s: s * p.model(x)), p.x, p.truth, controls=beside) for s in (1, -1)
    )
    up, down = (up, down) if lost > 0 else (down, up)
    control = rescaled(up).controls["Random"].values
    torch.testing.assert_close(control, up.controls["Random"].values / abs(lost))
    with pytest.raises(InputError, match="lose"):
        rescaled(down)


def test_settings_are_the_originals() -> None:
    """Tiles of 8 × 8, and of 14 × 14 on request; zeros where the network reads; probabilities; all tiles."""
    x = torch.rand(1, 3, 28, 56, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def model(rows: Tensor) -> Tensor:
        seen.append(rows)
        return net(rows)

    field = ap.Field(model, normalize=ap.Normalize((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)))
    for m, tiles in ((Degradation(), 4 * 7), (Degradation(ap.groups.Squares(14)), 2 * 4)):
        seen.clear()
        found = m(field, x, x)
        assert found.curves["MoRF"].y.shape == (1, tiles + 1)
        assert found.cost.forward.tolist() == [2 * tiles]
        assert bool((torch.cat(seen) == 0).flatten(1).all(1).any())
        assert found.metric["score"]["type"] == "Probability"


def test_mistakes_are_named() -> None:
    wrong: list[dict[str, Any]] = [{"limit": 5}, {"full": 0.9}, {"empty": 0.1}, {"full": 0.1, "empty": 0.1}]
    for options in wrong:
        with pytest.raises(ConfigError):
            Degradation(**options)
    field = ap.Field(network())
    with pytest.raises(InputError, match="Degradation"):
        rescaled(Sparseness()(field, X, MAPS))
    with pytest.raises(InputError, match="without full"):
        rescaled(Degradation(TILES, full=0.9, empty=0.1)(field, X, MAPS))

"""Every path method: what lies on its path can be told, and where there is nothing to attribute it says so."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import apportion as ap
from apportion import planted
from apportion.core.errors import ConfigError
from apportion.core.explainer import Explainer
from apportion.core.tree import leaves
from apportion.parts.paths.explainer import PathExplainer

PATH_METHODS = [n for n in ap.methods() if issubclass(ap.method(n), PathExplainer)]
PATHLESS = ["boundary_saliency", "ne_flag"]  # gradients at single points: the last of a search, those of a sphere

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 2, 8, 8, generator=generator, dtype=torch.float64) * 0.9 + 0.05


def small(name: str) -> Explainer:
    return ap.method(name).variants()[0]


class Constant(nn.Module):
    """Scores 1, 2 and 3 wherever it is asked, by a gradient of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.last(x.mean((2, 3))) + torch.arange(1, 4).to(x)


def test_there_are_path_methods() -> None:
    assert len(PATH_METHODS) >= 14
    assert set(PATHLESS) <= set(ap.methods())


@pytest.mark.parametrize("name", PATH_METHODS)
def test_diagnostics(name: str, x: Tensor) -> None:
    field = ap.Field(planted.conv_net(), bounds=(0, 1))
    p = ap.path_profile(small(name), field, x, target=1, ids=range(2))
    assert p.valid_share.shape[0] == 2
    assert bool(((p.valid_share >= 0) & (p.valid_share <= 1)).all())
    assert p.outside_share is not None
    assert bool(((p.outside_share >= 0) & (p.outside_share <= 1)).all())
    assert p.outside_share.shape == p.valid_share.shape


@pytest.mark.parametrize("name", PATHLESS)
def test_methods_without_a_path_say_so(name: str, x: Tensor) -> None:
    with pytest.raises(ConfigError, match="path method"):
        ap.path_profile(small(name), ap.Field(planted.conv_net(), bounds=(0, 1)), x, target=1)


@pytest.mark.parametrize("name", PATH_METHODS + PATHLESS)
def test_a_constant_score_gives_zeros_and_a_warning(name: str, x: Tensor) -> None:
    a = small(name)(ap.Field(Constant()), x, target=0, ids=range(2))
    assert not any(bool(leaf.any()) for leaf in leaves(a.values))
    assert any("0" in w and ("all values are 0" in w or "found no point" in w) for w in a.warnings), a.warnings


@pytest.mark.parametrize("name", PATH_METHODS)
def test_a_baseline_that_is_the_example_is_told(name: str, x: Tensor) -> None:
    explain = small(name)
    own = {f.name for f in dataclasses.fields(explain)} & {"baseline", "references"}
    if name == "idgi":
        explain = ap.IDGI(ap.paths.Straight(ap.baselines.Given(x[:1])))
    elif own:
        explain = dataclasses.replace(explain, **{own.pop(): ap.baselines.Given(x[:1])})
    elif name == "blur_ig":
        x = torch.ones_like(x)  # blurred, it is what it was
    else:  # baselines that are searched for are points of other classes
        assert name in ("agi", "big")
        return
    a = explain(ap.Field(planted.conv_net()), x[:1], target=0, ids=range(1))
    assert not any(bool(leaf.any()) for leaf in leaves(a.values))
    assert any("starting point equals the input" in w for w in a.warnings), a.warnings


@pytest.mark.parametrize("name", ["agi", "big", "boundary_saliency"])
def test_a_search_that_finds_nothing_is_told(name: str, x: Tensor) -> None:
    class Sure(nn.Module):
        """Class 0, and nothing near changes it."""

        def forward(self, x: Tensor) -> Tensor:
            s = x.mean((1, 2, 3))
            return torch.stack([s + 1e6, s * 0.5, -s], 1)

    a = small(name)(ap.Field(Sure()), x, target=0, ids=range(2))
    assert any("found no point of another class" in w or "did not reach" in w for w in a.warnings), a.warnings


@pytest.mark.parametrize(
    "explain",
    [ap.IDGI(), ap.GuidedIG(steps=10), ap.SAMP(size=0.3, eta=0.3)],
    ids=lambda e: type(e).__name__,
)
def test_a_gradient_that_vanishes_on_the_way_is_told(explain: Explainer) -> None:
    # flat from 0 to 1/2, rising to 1, where a step from a flat place has no direction
    field = ap.Field(lambda x: (x - 0.51).clamp(min=0).sum(1), precision=torch.float64)
    a = explain(field, torch.ones(1, 3), ids=["one"])
    assert any("gradient" in w and ("vanished" in w or "was 0" in w) for w in a.warnings), a.warnings


def test_a_score_that_falls_back_is_told() -> None:
    field = ap.Field(lambda x: (x * 4 * torch.pi).sin().sum(1) + 3 * x.sum(1), precision=torch.float64)
    a = ap.SplitIG(phi=0.3)(field, torch.ones(1, 1))
    assert any("fell back below" in w for w in a.warnings), a.warnings
    monotone = ap.Field(lambda x: (x**2).sum(1), precision=torch.float64)
    assert not any("fell back" in w for w in ap.SplitIG(phi=0.3)(monotone, torch.ones(1, 1)).warnings)


COUNTING = [
    ap.CrediblePath(ap.baselines.Constant(-1.0), 4),
    ap.LPI(ap.baselines.Constant(-1.0), ap.quadrature.Midpoint(3)),
    ap.BIG(ap.baselines.NearestAdversarial((2.0, 4.0), steps=10), ap.quadrature.Gauss(3)),
]


@pytest.mark.parametrize("explain", COUNTING, ids=lambda e: type(e).__name__)
def test_pieces_are_those_of_regions(explain: Explainer, x: Tensor) -> None:
    field = ap.Field(planted.conv_net())
    a = dataclasses.replace(explain, regions=4)(field, x, target=0, ids=range(2))
    assert a.references is not None
    found = ap.regions(field, x, ap.baselines.Given(a.references.rows[:, 0]), target=0, along=4)
    share = a.parts["other_piece_share"]
    torch.testing.assert_close(share, found.share, rtol=0, atol=0)
    assert float(share.max()) > 0
    torch.testing.assert_close(a.parts["crossings"], found.crossings, rtol=0, atol=0)
    once, never = (dataclasses.replace(explain, regions=n)(field, x, target=0, ids=range(2)) for n in (1, 0))
    assert "crossings" not in once.parts
    assert "other_piece_share" not in never.parts
    for n, result in ((4, a), (1, once)):
        assert (result.cost.forward - never.cost.forward).tolist() == [n + 1, n + 1]
        torch.testing.assert_close(result.values, never.values, rtol=0, atol=0)


@pytest.mark.parametrize("explain", COUNTING[:2], ids=lambda e: type(e).__name__)
def test_models_whose_pieces_cannot_be_counted_are_explained(explain: Explainer) -> None:
    x = torch.rand(2, 5, dtype=torch.float64)
    smooth = explain(ap.Field(planted.dense_net()), x, target=0)
    assert "other_piece_share" not in smooth.parts

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x) if bool((x > 0).all()) else torch.relu(x).relu()
            return torch.stack([y.sum(1), -x.sum(1)], 1)

    a = explain(ap.Field(Branching(), batch_size=1), x + 0.1, target=0)
    assert "other_piece_share" not in a.parts
    assert any("linear pieces were not counted" in w for w in a.warnings), a.warnings

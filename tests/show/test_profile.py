"""Pictures of path profiles."""

import numpy as np
import pytest
import torch

import apportion as ap
from apportion import planted
from apportion.core.errors import InputError
from apportion.show.profile import profile

X = torch.rand(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def made(score: ap.Score | None = None) -> ap.PathProfile:
    field = ap.Field(planted.dense_net(), score=score or ap.Logit(), bounds=(0, 1))
    return ap.path_profile(ap.IntegratedGradients(ap.baselines.BlackWhite()), field, X, target=1)


def test_draws_what_the_profile_holds() -> None:
    one = made()
    figure = profile({"logit": one, "probability": made(ap.Probability())}, example=1, branch=1)
    left, right = figure.axes[:2]
    lines = {str(line.get_label()): line for line in left.lines}
    score = np.asarray(lines["score - score at the start"].get_ydata())
    assert score == pytest.approx((one.value[1, 1] - one.start[1, 1]).numpy())
    assert np.asarray(lines["attributed so far"].get_ydata()) == pytest.approx(one.accumulated[1, 1].numpy())
    assert left.get_title().startswith("logit")
    assert right.get_title().startswith("probability")
    figure.canvas.draw()


def test_shades_from_where_the_score_is_saturated() -> None:
    field = ap.Field(lambda x: (2 * x).clamp(max=1).sum(1))
    p = ap.path_profile(ap.IntegratedGradients(quadrature=ap.quadrature.Midpoint(10)), field, torch.ones(1, 1).double())
    (patch,) = profile(p, phi=0.85).axes[0].patches
    assert patch.get_x() == pytest.approx(0.45)  # pyright: ignore[reportAttributeAccessIssue]
    rising = ap.path_profile(ap.IntegratedGradients(), ap.Field(lambda x: x.sum(1)), torch.ones(1, 1).double())
    assert float(rising.saturated_from(1)) == 1
    assert not profile(rising, phi=1).axes[0].patches


@pytest.mark.parametrize("options", [{"example": 2}, {"branch": 2}, {"example": -1}])
def test_what_is_not_there_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="profile of 2 example"):
        profile(made(), **options)
    with pytest.raises(InputError, match="path_profile"):
        profile({})

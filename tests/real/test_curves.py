"""Deletion and insertion of a pretrained network at RISE's settings, against the definition written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from written_out import rise

import apportion as ap
from apportion.metrics import DeletionAUC, InsertionAUC

from .conftest import NORMALIZE


@pytest.mark.parametrize("m", [DeletionAUC(step=6272), InsertionAUC(step=6272)])
def test_areas_at_the_originals_settings_but_for_longer_steps(
    lite0: nn.Module, cat: Tensor, m: DeletionAUC | InsertionAUC
) -> None:
    """The mean color, and the blur with the mean color around, in units of a field that normalizes.

    At 224 pixels a step, 225 points, the areas of both bundled pictures differ by at most 4e-7 in float32.
    """
    field = ap.Field(lite0, normalize=NORMALIZE, bounds=(0, 1))
    saliency = torch.randperm(224 * 224, generator=torch.Generator().manual_seed(0)).reshape(1, 224, 224).float()
    found = m(field, cat, saliency)
    (curve,) = found.curves.values()
    with torch.no_grad():
        want, scores = rise(lite0, NORMALIZE(cat)[0], saliency[0], 6272, isinstance(m, InsertionAUC))
    assert float(found.values) == pytest.approx(want, abs=1e-6)
    assert curve.y[0].tolist() == pytest.approx(scores, abs=1e-5)
    assert found.cost.forward.tolist() == [9]

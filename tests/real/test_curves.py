"""Deletion and insertion of a pretrained network at RISE's settings, against the definition written out."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn
from written_out import rise

import apportion as ap
from apportion.metrics import DeletionAUC, InsertionAUC

from .conftest import NORMALIZE

WHOLE = pytest.mark.skipif("WHOLE_CURVES" not in os.environ, reason="WHOLE_CURVES=1 asks for it: over a minute")


@pytest.mark.parametrize("i", [0, 1], ids=["chelsea", "coffee"])
@pytest.mark.parametrize("kind", [DeletionAUC, InsertionAUC])
@pytest.mark.parametrize("step", [6272, pytest.param(224, marks=(pytest.mark.slow, WHOLE))])
def test_areas_at_the_originals_settings(
    lite0: nn.Module, pictures: Tensor, i: int, kind: type[DeletionAUC | InsertionAUC], step: int
) -> None:
    """The mean color, and the blur with the mean color around, in units of a field that normalizes; both pictures.

    The original takes 224 pixels a step, 225 points; the short run has 9.
    """
    m, cat = kind(step=step), pictures[i : i + 1]
    field = ap.Field(lite0, normalize=NORMALIZE, bounds=(0, 1))
    saliency = torch.randperm(224 * 224, generator=torch.Generator().manual_seed(0)).reshape(1, 224, 224).float()
    found = m(field, cat, saliency)
    (curve,) = found.curves.values()
    with torch.no_grad():
        want, scores = rise(lite0, NORMALIZE(cat)[0], saliency[0], step, isinstance(m, InsertionAUC))
    assert float(found.values) == pytest.approx(want, abs=1e-6)
    assert curve.y[0].tolist() == pytest.approx(scores, abs=1e-5)
    assert found.cost.forward.tolist() == [1 + 224 * 224 // step]

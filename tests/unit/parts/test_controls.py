"""Maps made without the model, beside what SciPy filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

import apportion as ap
from apportion.core.errors import InputError

FIELD = ap.Field(lambda x: x.flatten(1).sum(1))


def test_edge_filters_are_those_of_scipy() -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    laplace, sobel = (made(FIELD, x).values for made in (ap.controls.Laplace(), ap.controls.Edges()))
    for i in range(2):
        channels = x[i].numpy()
        want = sum(np.abs(ndimage.laplace(c, mode="nearest")) for c in channels)
        np.testing.assert_allclose(laplace[i, 0], want, atol=1e-5)
        np.testing.assert_allclose(want, sum(np.abs(ndimage.laplace(c)) for c in channels), atol=1e-5)
        both = [[ndimage.sobel(c, axis, mode="nearest") for axis in (0, 1)] for c in channels]
        np.testing.assert_allclose(sobel[i, 0], sum(np.hypot(*one) for one in both), atol=1e-5)


def test_the_laplacian_of_a_slope_is_zero_and_of_a_point_is_not() -> None:
    x = torch.arange(5.0).expand(1, 1, 5, 5).clone()
    assert ap.controls.Laplace()(FIELD, x).values[0, 0, :, 1:-1].abs().max() == 0
    point = torch.zeros(1, 1, 3, 3)
    point[0, 0, 1, 1] = -2
    assert ap.controls.Laplace()(FIELD, point).values[0, 0].tolist() == [[0, 2, 0], [2, 8, 2], [0, 2, 0]]
    with pytest.raises(InputError, match="Laplace of input"):
        ap.controls.Laplace()(FIELD, torch.zeros(1, 4))

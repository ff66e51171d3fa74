"""Measurements as their authors describe them, one picture and one pixel at a time, to compare with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def rise(net: Callable[[Tensor], Tensor], z: Tensor, saliency: Tensor, step: int, insert: bool) -> tuple[float, list]:
    """Deletion or insertion of one normalized picture z [3, H, W], written from the authors' description: one by one.

    Blur: a delta, blurred by scipy with its mirrored borders, on 11 x 11; applied with zeros around.
    """
    delta = np.zeros((11, 11))
    delta[5, 5] = 1
    kernel = ndimage.gaussian_filter(delta, 5)
    blurred = np.stack([ndimage.correlate(c, kernel, mode="constant", cval=0.0) for c in z.numpy()])
    now, goal = (blurred, z.numpy().copy()) if insert else (z.numpy().copy(), np.zeros(z.shape))
    pixels = saliency.numel()
    ranking = np.argsort(-saliency.numpy().ravel(), kind="stable")
    target = int(net(z[None])[0].argmax())
    scores = []
    for first in range(0, -(-pixels // step) * step + 1, step):
        scores.append(float(net(torch.from_numpy(now)[None])[0].softmax(0)[target]))
        for pixel in ranking[first : first + step]:
            row, column = divmod(int(pixel), saliency.shape[1])
            now[:, row, column] = goal[:, row, column]
    return (sum(scores) - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1), scores

"""Mean, covariance and range of features, learned from data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.config import Configurable
from apportion.core.errors import InputError
from apportion.parts.batches import batches


@dataclass(frozen=True, eq=False)
class FeatureMoments(Configurable):
    """What interventional expectations know of the features: mean, covariance, range.

    Attributes:
        mean: of each feature.
        factor: rows l with Σ l lᵀ the covariance (dividing by n - 1): never more rows than examples or features.
        low: the least value seen of each feature.
        high: the largest.

    >>> m = FeatureMoments.fit(torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 1.0]]))
    >>> m.mean.tolist(), m.high.tolist(), (m.factor.T @ m.factor).abs().round(decimals=9).tolist()
    ([1.0, 1.0], [2.0, 1.0], [[1.0, 0.0], [0.0, 0.0]])
    """

    mean: Float[Tensor, " d"]
    factor: Float[Tensor, "r d"]
    low: Float[Tensor, " d"]
    high: Float[Tensor, " d"]

    @classmethod
    def fit(cls, data: Tensor | Iterable[Tensor]) -> FeatureMoments:
        """Estimate them, in float64.

        Args:
            data: examples [n, d], or batches of such without labels.

        Raises:
            InputError: fewer than two examples, or something else than rows of features.
        """
        rows = []
        for batch in batches(data, "FeatureMoments.fit(x)"):
            if not isinstance(batch, Tensor) or batch.ndim != 2 or not batch.is_floating_point():
                shapes = [tuple(t.shape) for t in tree.leaves(batch) if isinstance(t, Tensor)]
                raise InputError(
                    f"data of shape {shapes}",
                    "rows of features [n, d] in floating point",
                    "give one tensor, or batches",
                )
            rows.append(batch.detach().double())
        if sum(map(len, rows)) < 2:
            raise InputError("fewer than two examples to take moments of", "at least two", "give more data")
        x = torch.cat(rows)
        if not bool(torch.isfinite(x).all()):
            raise InputError("data with NaN or infinite entries", "finite numbers", "drop or fill those examples")
        far = (x - x.mean(0)) / (len(x) - 1) ** 0.5
        factor = torch.linalg.qr(far, mode="r").R if len(far) > far.shape[1] else far
        return cls(x.mean(0), factor.contiguous(), x.amin(0), x.amax(0))

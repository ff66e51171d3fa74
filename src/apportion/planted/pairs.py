"""Pairs of models that are one function, and a model with two features that may be exchanged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apportion.planted.functions import Points, Scores
from apportion.planted.networks import dense_net, equal_pair, largest_pair, shifted_pair, symmetric_net
from apportion.planted.problem import Pair, Planted, away_from_zero, seeded


def _points(examples: int, inputs: int, seed: int) -> Tensor:
    return away_from_zero(seeded(seed + 100), examples, inputs)


def same_function(inputs: int = 5, examples: int = 4, seed: int = 0) -> Pair:
    """Take `equal_pair` with points: hidden units permuted, rescaled, split, and four more that cancel.

    Args:
        inputs: features.
        examples: points.
        seed: of weights and points.

    >>> p = same_function()
    >>> torch.allclose(p.model(p.x), p.other(p.other_x))
    True
    """
    first, second = equal_pair(inputs, seed)
    x = _points(examples, inputs, seed)
    zero = torch.zeros_like(x[:1])
    return Pair(model=first, other=second, x=x, other_x=x, baseline=zero, other_baseline=zero, target=1)


def same_maximum(inputs: int = 5, examples: int = 4, seed: int = 0) -> Pair:
    """Take `largest_pair` with points: the largest of three, nested one way or the other.

    Args:
        inputs: features.
        examples: points.
        seed: of weights and points.

    >>> p = same_maximum()
    >>> torch.allclose(p.model(p.x), p.other(p.other_x))
    True
    """
    first, second = largest_pair(inputs, seed)
    x = _points(examples, inputs, seed)
    zero = torch.zeros_like(x[:1])
    return Pair(model=first, other=second, x=x, other_x=x, baseline=zero, other_baseline=zero, target=1)


class _OneInside(nn.Module):
    """ReLU(ReLU(x1) - 1 - ReLU(x2))."""

    def forward(self, x: Points) -> Scores:
        return (x[:, 0].relu() - 1 - x[:, 1].relu()).relu()


class _OneBefore(nn.Module):
    """ReLU(ReLU(x1 - 1) - ReLU(x2))."""

    def forward(self, x: Points) -> Scores:
        return ((x[:, 0] - 1).relu() - x[:, 1].relu()).relu()


def same_relu() -> Pair:
    """ReLU(ReLU(x1) - 1 - ReLU(x2)) and ReLU(ReLU(x1 - 1) - ReLU(x2)) at (3, 1): Sundararajan et al. 2017, appendix B.

    Truth: integrated gradients from 0, (1.5, -0.5). DeepLIFT's rescale rule gives that for the first, and (2, -1) for
    the second; in the second the 1 is taken off before a ReLU, and in the first after it.

    >>> p = same_relu()
    >>> p.model(p.x).tolist(), p.other(p.other_x).tolist(), p.truth.tolist()
    ([1.0], [1.0], [[1.5, -0.5]])
    """
    x = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    truth, zero = torch.tensor([[1.5, -0.5]], dtype=torch.float64), torch.zeros_like(x)
    return Pair(model=_OneInside(), other=_OneBefore(), x=x, other_x=x, baseline=zero, other_baseline=zero, truth=truth)


def same_but_shifted(shift: float = 0.7, inputs: int = 5, examples: int = 4, seed: int = 0, relu: bool = False) -> Pair:
    """Take `shifted_pair` with points x and x + shift: the first bias undoes it (Kindermans et al. 2019, section 2).

    Attributions should be equal. From a baseline that moves along, the darkest value of the data say, integrated
    gradients are; from 0 for both, they are not, nor is gradient × input.

    Args:
        shift: added to every feature.
        inputs: features.
        examples: points.
        seed: of weights and points.
        relu: ReLU networks instead of tanh.

    >>> p = same_but_shifted()
    >>> torch.allclose(p.model(p.x), p.other(p.other_x)), bool((p.other_baseline == 0.7).all())
    (True, True)
    """
    first, second = shifted_pair(shift, inputs, seed, relu=relu)
    x = _points(examples, inputs, seed)
    zero = torch.zeros_like(x[:1])
    return Pair(model=first, other=second, x=x, other_x=x + shift, baseline=zero, other_baseline=zero + shift, target=1)


def exchangeable(inputs: int = 5, examples: int = 4, seed: int = 0, relu: bool = False) -> Planted:
    """A network in which features 0 and 1 may be exchanged, at points where they are equal.

    Truth: a mask of the two, whose values must be equal. Neither is a copy of the other in the network: it sees their
    sum and, unless `relu`, their product.

    Args:
        inputs: features.
        examples: points.
        seed: of weights and points.
        relu: a ReLU network instead of tanh.

    >>> p = exchangeable()
    >>> torch.equal(p.x[:, 0], p.x[:, 1]), p.truth.tolist()
    (True, [True, True, False, False, False])
    """
    x = _points(examples, inputs, seed)
    x[:, 1] = x[:, 0]
    pair = torch.arange(inputs) < 2
    return Planted(
        model=symmetric_net(inputs, seed, relu=relu), x=x, baseline=torch.zeros_like(x[:1]), truth=pair, target=1
    )


def with_dummy(inputs: int = 5, examples: int = 4, seed: int = 0, relu: bool = False) -> Planted:
    """A network blind to its third feature. Truth: a mask of the features it sees; the other must get 0.

    Args:
        inputs: features, at least 3.
        examples: points.
        seed: of weights and points.
        relu: a ReLU network instead of tanh.

    >>> p = with_dummy()
    >>> p.truth.tolist(), torch.equal(p.model(p.x), p.model(p.x + 5 * ~p.truth))
    ([True, True, False, True, True], True)
    """
    x = _points(examples, inputs, seed)
    net = dense_net(inputs, 3, seed, blind=2, relu=relu)
    return Planted(model=net, x=x, baseline=torch.zeros_like(x[:1]), truth=torch.arange(inputs) != 2, target=1)

"""What methods that learn a mask for pictures have in common."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.errors import InputError, SiteError, kind_of
from apportion.core.question import Question
from apportion.core.score import Logit, LogOdds, LogProbability, Probability, Score
from apportion.core.site import SiteInfo
from apportion.parts.grids import ChannelsFirst, FoundGrid, spatial


def pictures(q: Question, name: str) -> Float[Tensor, "B C H W"]:
    """Insist on one tensor of pictures.

    Args:
        q: the question.
        name: of the method, for the message.

    Raises:
        InputError: what is explained is something else.

    >>> import apportion as ap
    >>> pictures(ap.Field(lambda x: x.mean((1, 2, 3))).bind(torch.rand(1, 3, 4, 4)), "a mask").shape
    torch.Size([1, 3, 4, 4])
    """
    if not isinstance(q.x, Tensor) or q.x.ndim != 4:
        shapes = [tuple(t.shape) for t in tree.leaves(q.x)]
        given = f"{name} of {'' if isinstance(q.x, Tensor) else f'{kind_of(q.x)} of shapes '}{shapes}"
        raise InputError(given, "one tensor of pictures, [B, C, H, W]", "use Shapley or L2X for others")
    return q.x


def asked(q: Question, score: Score | None) -> Score:
    """Choose the score a mask is learned on: the method's own, of the class that the field's score is of.

    A field's score that is of no single class, such as a contrast, is asked itself, with a warning.
    """
    own = q.field.score
    if score is None or score is own:
        return own
    if isinstance(own, Logit | Probability | LogProbability | LogOdds):
        return score
    q.warn(
        f"the mask is learned on {type(own).__name__}, which is of no single class, and not on {type(score).__name__}: "
        "weigh what holds against it in that score's units"
    )
    return own


def shifted(x: Float[Tensor, "R C H W"], by: Int[Tensor, "R 2"]) -> Float[Tensor, "R C H W"]:
    """Move each picture up and left by whole pixels; what comes in repeats the last row or column.

    >>> shifted(torch.arange(4.0).reshape(1, 1, 2, 2), torch.tensor([[1, 0]])).tolist()
    [[[[2.0, 3.0], [2.0, 3.0]]]]
    """
    high, wide = (
        (torch.arange(size, device=x.device) + by[:, i : i + 1]).clamp(max=size - 1)
        for i, size in enumerate(x.shape[2:])
    )
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    return x[rows, :, high[:, :, None], wide[:, None, :]].movedim(3, 1)


def map_layers(q: Question) -> list[SiteInfo]:
    """List the layers [B, K, h, w] in the order of the pass; those whose channels may stand first or last are left out.

    >>> import apportion as ap
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    >>> [s.shape for s in map_layers(ap.Field(net).bind(torch.rand(1, 1, 4, 4)))]
    [(1, 2, 2, 2)]
    """
    found = []
    for s in spatial(q):
        if "pad" in s.kind.lower():  # places that are none of the picture
            continue
        try:
            lies = FoundGrid().find(q, s.shape, s.site)
        except SiteError:
            continue
        if isinstance(lies, ChannelsFirst):
            found.append(s)
    return found

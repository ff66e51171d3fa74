"""Boxes found with a map: weakly supervised localization, and recognition of what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core.card import Paper
from apportion.core.errors import ConfigError, InputError
from apportion.core.explainer import Passes
from apportion.core.question import Question
from apportion.core.score import Probability, Score
from apportion.core.tree import Tree
from apportion.metrics.localization.pointing import TRUTH, made_up
from apportion.metrics.localization.region import Box, OnRegions, bounding_box, correct, picture_map, regions
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.scores import Direction


def largest_component(mask: Bool[Tensor, "H W"]) -> Bool[Tensor, "H W"]:
    """Keep the largest part that hangs together by edges and corners; the first of equal ones, row by row.

    Raises:
        ConfigError: the image extra is not installed.

    >>> largest_component(torch.tensor([[True, False, True], [False, False, True]])).int().tolist()
    [[0, 0, 1], [0, 0, 1]]
    """
    try:
        from skimage.measure import label
    except ImportError as error:
        raise ConfigError(
            "connected components without scikit-image", "the image extra", "pip install 'apportion[image]'"
        ) from error
    parts = torch.from_numpy(label(mask.cpu().numpy(), connectivity=2)).long()
    size = torch.bincount(parts.flatten())
    size[0] = 0
    return (parts == int(size.argmax())) if len(size) > 1 else torch.zeros_like(parts, dtype=torch.bool)


def found_box(m: Float[Tensor, "H W"], threshold: float) -> Box | None:
    """Give the box around the largest component of what is above a share of the maximum; None for no positive value."""
    highest = m.max()
    return bounding_box(largest_component(m > threshold * highest)) if float(highest) > 0 else None


def overlap(a: Box, b: Box) -> float:
    """Give the intersection of two boxes over their union.

    >>> overlap((0, 0, 2, 1), (1, 0, 3, 1))
    0.3333333333333333
    """
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    inside = max(0.0, wide) * max(0.0, high)
    area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return inside / (sum(area) - inside)


def _check_share(value: float, what: str) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{what}={value}", "a share from 0 to below 1", f"write {what}=.2")


@register(
    MetricCard(
        title="Weakly supervised localization",
        paper=Paper(
            "Zhou, Khosla, Lapedriza, Oliva, Torralba",
            2016,
            "Learning deep features for discriminative localization",
            "CVPR",
        ),
        intent="Whether a box around the map's largest high part is that of the object.",
        direction=Direction.HIGHER,
        truth=TRUTH,
        range=(0.0, 1.0),
        chance="small; that of the whole picture as box stands in parts['whole']",
        cost="none; a row forward with `top`",
        cautions=("The box of the whole picture already hits large objects: compare with parts['whole'].",),
    )
)
@dataclass(frozen=True)
class WeaklySupervisedLocalization(OnRegions):
    """1 where the box of the map has an intersection over union of `overlap` or more with a box of the object, else 0.

    The box is drawn around the largest connected component of pixels above `threshold` times the maximum. With `top`,
    the target must be among that many highest outputs, too, else 0: 1 less the mean is the top-1 or top-5 localization
    error of ILSVRC.

    A map without a positive value has no box and counts as an error; `parts["empty"]` says where. Undefined without an
    object.

    Attributes:
        threshold: share of the maximum; .2 for CAM, .15 for Grad-CAM.
        overlap: least intersection over union.
        top: 1 or 5 for the usual errors; None where the class is given.
        empty: the value without a box; None leaves it undefined.

    Source: Zhou et al. (2016), section 3.2.

    >>> import apportion as ap
    >>> map, mask = torch.tensor([[[[0.0, 5.0, 4.0, 0.1]]]]), torch.tensor([[[False, True, True, True]]])
    >>> field, x = ap.Field(lambda x: x.sum((1, 2, 3))), torch.zeros(1, 1, 1, 4)
    >>> s = WeaklySupervisedLocalization()(field, x, map, truth=mask)
    >>> s.values, s.parts["overlap"], s.parts["box"]
    (tensor([1.]), tensor([0.6667]), tensor([[1., 0., 3., 1.]]))
    """

    threshold: float = 0.2
    overlap: float = 0.5
    top: int | None = None
    empty: float | None = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self.threshold, "threshold")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Draw the box, and lay it over those of the object."""
        m = picture_map(q, subject)
        where = regions(truth, m)
        high, wide = m.shape[1:]
        drawn = [found_box(one, self.threshold) for one in m]
        best = [
            max((overlap(d, b) for b in r.boxes), default=0.0) if d else 0.0 for d, r in zip(drawn, where, strict=True)
        ]
        all_ = [max((overlap((0, 0, wide, high), b) for b in r.boxes), default=0.0) for r in where]
        iou, whole = torch.tensor(best).to(m), torch.tensor(all_).to(m)
        right = correct(q, self.top) if self.top else torch.ones(len(m), dtype=torch.bool, device=m.device)
        missing = torch.tensor([not r.boxes for r in where], device=m.device)
        none = torch.tensor([d is None for d in drawn], device=m.device)
        values = ((iou >= self.overlap) & right).to(m)
        values = values.masked_fill(none, torch.nan if self.empty is None else self.empty)
        lost = none if self.empty is None else torch.zeros_like(none)
        return Found(
            values.masked_fill(missing, torch.nan),
            parts={
                "overlap": iou,
                "whole": ((whole >= self.overlap) & right).to(m),
                "box": torch.tensor([d or (0.0, 0.0, 0.0, 0.0) for d in drawn]).to(m),
                "empty": none,
            },
            undefined={"no object": missing, "a map without a positive value": lost & ~missing},
        )

    def passes(self, q: Question) -> Passes:
        """Count the pass that ranks the target."""
        return Passes(1 if self.top else 0, 0, 0)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(), cls(0.15, 0.3, top=2, empty=None))

    @classmethod
    def example_truth(cls, x: Tree) -> Any:
        return made_up(x)


@register(
    MetricCard(
        title="Fine-grained recognition with crops",
        paper=Paper(
            "Zhou, Khosla, Lapedriza, Oliva, Torralba",
            2016,
            "Learning deep features for discriminative localization",
            "CVPR",
        ),
        intent="Whether the network still recognizes the picture cropped to the box of the map.",
        direction=Direction.HIGHER,
        range=(None, None),
        chance="what a crop around a random pixel's component gives: ask for ap.controls.Random()",
        cost="a row forward for the crop, and f(x)",
        cautions=("A box that is almost the picture changes nothing: parts['area'] has its share.",),
    )
)
@dataclass(frozen=True)
class FineGrainedRecognition(Metric):
    """The target's score on the picture cropped to the map's box and resized to the network's input.

    The box is that of `WeaklySupervisedLocalization`, with a margin. The source trains a classifier on crops; here the
    network itself is asked, with `Decision()` as score for accuracy. `parts["uncropped"]` is the score of the whole
    picture.

    Undefined for maps without a positive value.

    Attributes:
        threshold: share of the maximum.
        margin: added on each side, as a share of the box.
        score: what is read of the outputs, `ap.Probability()` unless given.

    Source: Zhou et al. (2016), section 4.1.

    >>> import apportion as ap
    >>> field, x = ap.Field(lambda x: x.mean((1, 2, 3))), torch.tensor([[[[0.0, 0.0], [0.0, 8.0]]]])
    >>> s = FineGrainedRecognition(score=ap.Logit())(field, x, ap.controls.InputMagnitude())
    >>> s.values, s.parts["uncropped"], s.parts["area"]
    (tensor([8.]), tensor([2.]), tensor([0.2500]))
    """

    threshold: float = 0.2
    margin: float = 0.0
    score: Score = field(default_factory=Probability)

    _not_negative = ("margin",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self.threshold, "threshold")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Crop, resize and score."""
        m = picture_map(q, subject)
        if not isinstance(q.x, Tensor) or q.root.inputs is not q.x:
            raise InputError(f"crops at {q.field.site}", "pictures at the model's input", "leave site out of the field")
        high, wide = m.shape[1:]
        drawn = [found_box(one, self.threshold) for one in m]
        whole: Box = (0.0, 0.0, float(wide), float(high))
        boxes = [self._wider(d or whole, high, wide) for d in drawn]
        owner = torch.arange(len(m), device=q.device)
        both = q.value(torch.cat([_crops(q.x, boxes), q.x]), owner.repeat(2), score=self.score)
        none = torch.tensor([d is None for d in drawn], device=m.device)
        area = torch.tensor([(b[2] - b[0]) * (b[3] - b[1]) / (high * wide) for b in boxes])
        return Found(
            both[: len(m)].masked_fill(none, torch.nan),
            parts={"uncropped": both[len(m) :], "area": area.to(m)},
            undefined={"a map without a positive value": none},
        )

    def _wider(self, box: Box, high: int, wide: int) -> Box:
        left, top, right, bottom = box
        across, down = self.margin * (right - left), self.margin * (bottom - top)
        return (
            max(0.0, left - across),
            max(0.0, top - down),
            min(float(wide), right + across),
            min(float(high), bottom + down),
        )

    def passes(self, q: Question) -> Passes:
        """Count crop and picture."""
        return Passes(2, 0, 0)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(), cls(0.5, 0.2))


def _crops(x: Float[Tensor, "B C H W"], boxes: Sequence[Box]) -> Float[Tensor, "B C H W"]:
    """Cut out boxes, and bring each to the size of the picture (bilinear, pixel centers in place)."""
    high, wide = x.shape[2:]
    at = torch.tensor(boxes, dtype=x.dtype, device=x.device)
    across = (torch.arange(wide, dtype=x.dtype, device=x.device) + 0.5) / wide
    down = (torch.arange(high, dtype=x.dtype, device=x.device) + 0.5) / high
    u = (at[:, None, 0] + across * (at[:, None, 2] - at[:, None, 0])).clamp(at[:, None, 0] + 0.5, at[:, None, 2] - 0.5)
    v = (at[:, None, 1] + down * (at[:, None, 3] - at[:, None, 1])).clamp(at[:, None, 1] + 0.5, at[:, None, 3] - 0.5)
    grid = torch.stack(
        [(2 * u / wide - 1)[:, None].expand(-1, high, -1), (2 * v / high - 1)[:, :, None].expand(-1, -1, wide)], -1
    )
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)

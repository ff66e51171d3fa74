"""Performance information curves: what the model makes of a picture of which so much is revealed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core import tree
from apportion.core.card import Paper
from apportion.core.config import is_reproducible, to_config
from apportion.core.errors import ConfigError, InputError
from apportion.core.explainer import Passes
from apportion.core.progress import tick
from apportion.core.question import Question
from apportion.core.score import Decision, Probability, Score
from apportion.core.site import Input
from apportion.core.tree import Tree
from apportion.metrics.ablation.information import Information, WebP, Zlib
from apportion.metrics.metric import Found, Metric, MetricCard, Subject, register
from apportion.metrics.ranking import by_player, order, ties
from apportion.metrics.scores import Curve, Direction
from apportion.parts.masks.groups import Pixels

_PAPER = Paper("Kapishnikov, Bolukbasi, Viégas, Terry", 2019, "XRAI: better attributions through regions", "ICCV")
_THRESHOLDS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.10, 0.13, 0.21, 0.34, 0.5, 0.75)
_LOW = "the score at the picture is below what the metric asks for"
_NO_RISE = "the score at the blurred picture is no lower than at the picture"
_NO_INFORMATION = "the blurred picture holds no less information than the picture"
_CHANCE = "depends on model and picture; judge ap.controls.Random() beside"
_CAUTIONS = (
    "Bytes are those of a program: other versions give other numbers. Results name it, and mix with no other's.",
    "The effort WebP makes jumps: two pixels one step of 255 brighter moved a curve's area by .002; PNG's by .00003.",
    "Examples the model is unsure of do not count, and neither do those it recognizes blurred.",
)
_AT_ONCE = 1 << 24
"""Elements of rows made at once."""


@dataclass(frozen=True, eq=False)
class Revealed:
    """Pictures of which more and more is revealed.

    Attributes:
        pictures: 8 bits a channel: the blurred one, one for each threshold, and the whole.
        shown: the share of pixels shown for their value at each threshold.
        ties: the share of pixels whose value another one has too.
    """

    pictures: Tensor
    shown: Float[Tensor, "B K"]
    ties: Float[Tensor, " B"]


@dataclass(frozen=True)
class Revealing(Metric):
    """Base of the performance information curves.

    Attributes:
        score: what a curve's height is made of.
        thresholds: shares of the pixels that are revealed, highest first.
        fraction: of the pixels, drawn at random, that are known from the start, with the four corners.
        least: what the score at the picture must reach.
        monotone: whether a curve never falls from a threshold to the next.
        information: what stands on the axis of x.
        points: at which curves are interpolated.
        together: whether tied pixels come all together; in an order drawn at random unless asked for.
    """

    _not_negative = ("fraction",)
    _positive = ("points",)

    score: Score = Probability()
    thresholds: tuple[float, ...] = _THRESHOLDS
    fraction: float = 0.01
    least: float = 0.8
    monotone: bool = True
    information: Information = WebP()
    points: int = 1000
    together: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not self.thresholds or not all(0 < t < 1 for t in self.thresholds):
            raise ConfigError(f"{name}(thresholds={self.thresholds})", "shares between 0 and 1", "write (.01, .1, .5)")
        if self.fraction > 1:
            raise ConfigError(f"{name}(fraction={self.fraction})", "a share up to 1", "write fraction=.01")

    def settled(self) -> Metric:
        return replace(self, information=self.information.settled())

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Reveal, compress, score, and integrate."""
        revealed = self.revealed(q, subject)
        size = self._shared(q, subject, "information", self.information, lambda: self._sizes(revealed.pictures))
        y = self._shared(q, subject, "scores", self.score, lambda: _scored(q, revealed.pictures, self.score))
        undefined = {
            _LOW: y[:, -1] < self.least,
            _NO_RISE: y[:, 0] >= y[:, -1],
            _NO_INFORMATION: size[:, 0] >= size[:, -1],
        }
        refused = torch.stack(list(undefined.values())).any(0)
        amount, response = (_between(t).masked_fill(refused[:, None], torch.nan) for t in (size, y))
        if self.monotone:
            response = response.cummax(1).values
        grid, height = _curve(amount, response, self.points)
        height = height.masked_fill(refused[:, None], torch.nan)
        told = f"share of information regained ({self.information.told()})"
        return Found(
            torch.trapezoid(height, grid, dim=1),
            {"pic": Curve(grid, height, told, f"share of {type(self.score).__name__} regained")},
            {
                "information": amount,
                "response": response,
                "shown": revealed.shown.to(y.device),
                "at_picture": y[:, -1],
                "at_blurred": y[:, 0],
                "ties": revealed.ties.to(y.device),
            },
            undefined,
        )

    def revealed(self, q: Question, subject: Subject) -> Revealed:
        """Make the pictures, once for all curves of a subject.

        Raises:
            ConfigError: SciPy is not installed.
            InputError: no pictures in [0, 1].
        """
        key = ("revealed", self.thresholds, self.fraction, self.together)

        def make() -> Revealed:
            return reveal(q, subject.map(q), self.thresholds, self.fraction, together=self.together)

        return subject.share(key, make)

    def _shared(self, q: Question, subject: Subject, what: str, part: Any, make: Callable[[], Tensor]) -> Tensor:
        config = to_config(part)
        by = json.dumps(config) if is_reproducible(config) else part
        return subject.share((what, self.thresholds, self.fraction, self.together, by), make)

    def _sizes(self, pictures: Tensor) -> Float[Tensor, "B K"]:
        images = pictures.permute(0, 1, 3, 4, 2).contiguous().numpy()
        found = [torch.from_numpy(np.asarray(self.information(one, one[-1]))).double() for one in images]
        return torch.stack(found)

    def passes(self, q: Question) -> Passes:
        """Count the picture, the blurred one, and one for each threshold."""
        return Passes(len(self.thresholds) + 2, 0)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        """Give the original, and few thresholds that leave no example out for its score."""
        return cls(thresholds=(0.1, 0.5)), cls(
            thresholds=(0.1, 0.5), least=0.0, information=Zlib(), together=True, monotone=False
        )


def reveal(q: Question, values: Tree, thresholds: tuple[float, ...], fraction: float, *, together: bool) -> Revealed:
    """Reveal the pixels with a map's highest values; between known pixels, colors are interpolated.

    Args:
        q: the examples: pictures [B, channels, H, W] in [0, 1].
        values: the map; channels of a pixel are summed.
        thresholds: shares of pixels to be revealed.
        fraction: of pixels known from the start, the same for every map of an example.
        together: whether pixels of one value are revealed together.
    """
    x = _pictures(q)
    height, width = x.shape[2:]
    count = height * width
    value = by_player(q, values, Pixels())
    rank = order(q, value).argsort(1).cpu()
    value = value.cpu()
    owner = torch.arange(len(q))
    drawn = q.stream("known pixels").uniform(torch.zeros(1, count), owner, 0 * owner).argsort(1)
    known = torch.zeros(len(q), count, dtype=torch.bool).scatter_(1, drawn[:, : int(count * fraction)], True)
    known[:, [0, width - 1, count - width, count - 1]] = True
    shown = torch.stack([_highest(value, rank, t, together) for t in thresholds], 1)
    whole = (x.detach().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    images = whole.permute(0, 2, 3, 1).numpy()
    pictures = []
    for i, image in enumerate(images):
        masks = torch.cat([known[i, None], known[i] | shown[i]]).reshape(-1, height, width).numpy()
        pictures.append(np.stack([*(_interpolated(image, mask) for mask in masks), image]))
        tick("pictures revealed", i + 1, len(images))
    some = ties(value)
    if bool((some > 0.5).any()):
        q.warn("more than half of the pixels of an example have the value of another one: see parts['ties']")
    made = torch.from_numpy(np.stack(pictures)).permute(0, 1, 4, 2, 3)
    return Revealed(made, shown.double().mean(2), some)


def _pictures(q: Question) -> Tensor:
    x = q.x
    if not isinstance(x, Tensor) or x.ndim != 4 or min(x.shape[2:]) < 2 or not isinstance(q.field.site, Input):
        shapes = [tuple(t.shape) for t in tree.leaves(x)]
        raise InputError(
            f"pictures to be revealed of shape {shapes}, at {q.field.site}",
            "one tensor [B, channels, H, W] at the model's input, 2 pixels a side or more",
            "use InsertionAUC for other inputs",
        )
    low, high = float(x.min()), float(x.max())
    if low < -1e-6 or high > 1 + 1e-6:
        raise InputError(
            f"pictures from {low:.3g} to {high:.3g}",
            "[0, 1], which 8 bits a channel can hold",
            "give pictures, and the field their normalization: Field(normalize=ap.Normalize(mean, std))",
        )
    return x


def _highest(value: Tensor, rank: Tensor, share: float, together: bool) -> Bool[Tensor, "B N"]:
    """Choose what is at or above the (1 - share)-quantile; as many where values are tied, unless those go together."""
    count = value.shape[1]
    if together:
        at = np.quantile(value.double().numpy(), 1 - share, axis=1, keepdims=True)
        return value.double() >= torch.from_numpy(at)
    return rank < count - math.ceil((count - 1) * (1 - share))


def _interpolated(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Keep known pixels, and interpolate the others linearly in triangles of them."""
    try:
        from scipy.interpolate import griddata
    except ImportError as error:
        raise ConfigError(
            "SciPy is not installed, which interpolates between pixels",
            "the image extra",
            "pip install 'apportion[image]'",
        ) from error
    out = image.copy()
    if not known.all():
        unknown = np.argwhere(~known)
        found = griddata(np.argwhere(known), image[known].astype(float), unknown, method="linear")
        mean = image.reshape(-1, image.shape[-1]).mean(0)
        out[~known] = np.round(np.where(np.isnan(found), mean, found))
    return out


def _scored(q: Question, pictures: Tensor, score: Score) -> Float[Tensor, "B K"]:
    """Score 8-bit pictures, a block at a time."""
    flat = pictures.flatten(0, 1)
    owner = torch.arange(len(pictures)).repeat_interleave(pictures.shape[1]).to(q.device)
    out, x = [], tree.leaves(q.x)[0]
    step = max(1, _AT_ONCE // flat[0].numel())
    for start in range(0, len(flat), step):
        rows = flat[start : start + step].to(x.device).to(x.dtype) / 255
        out.append(q.value(rows, owner[start : start + step], score).detach())
    return tree.wide(torch.cat(out)).reshape(pictures.shape[:2])


def _between(t: Float[Tensor, "B K"]) -> Float[Tensor, "B k"]:
    """Give the inner columns as shares of the way from the first to the last."""
    return ((t[:, 1:-1] - t[:, :1]) / (t[:, -1:] - t[:, :1])).clamp(0, 1)


def _curve(x: Float[Tensor, "B K"], y: Float[Tensor, "B K"], points: int) -> tuple[Tensor, Tensor]:
    """Interpolate linearly from (0, 0) to (1, 1); of several points at one x, the last holds from there on."""
    x, y = (torch.cat([t, torch.zeros_like(t[:, :1]), torch.ones_like(t[:, :1])], 1) for t in (x, y))
    x, at = x.nan_to_num(0).sort(dim=1, stable=True)
    y = y.gather(1, at)
    grid = torch.arange(points, dtype=x.dtype, device=x.device) / points
    left = torch.searchsorted(x, grid.expand(len(x), -1).contiguous(), right=True) - 1
    x0, x1, y0, y1 = (t.gather(1, left + i) for t in (x, y) for i in (0, 1))
    inner = y0 + (grid - x0) / (x1 - x0) * (y1 - y0)
    return torch.cat([grid, grid.new_ones(1)]), torch.cat([inner, torch.ones_like(inner[:, :1])], 1)


@register(
    MetricCard(
        title="Softmax information curve",
        paper=_PAPER,
        intent="How soon the class's probability comes back while a blurred picture regains its information.",
        direction=Direction.HIGHER,
        range=(0, 1),
        statistic="median curve",
        chance=_CHANCE,
        cost="15 rows: the picture, it blurred, and 13 in between",
        cautions=_CAUTIONS,
    )
)
@dataclass(frozen=True)
class SIC(Revealing):
    """The area under the softmax information curve: probability regained over information regained; high is good.

    A hundredth of the pixels, drawn at random, and the corners are known; between them colors are interpolated
    linearly. Then the pixels with the highest values are revealed as well, in 13 shares from .5 % to 75 %. For each
    picture, x = (size - size_0) / (size_1 - size_0) in bytes of lossless WebP and y = (p - p_0) / (p_1 - p_0), where 0
    is the blurred picture and 1 the whole one; both clipped to [0, 1], and y never falls. Points are joined by lines,
    with (0, 0) and (1, 1), read off at 1000 positions and integrated. Pictures are rounded to 8 bits a channel before
    anything is asked about them, the whole one too.

    Examples with p_1 below .8, a blurred picture that scores no less, or one that takes no fewer bytes are undefined.
    The source takes the median of the curves at each position and integrates that: `scores.median()`.

    Which pixels are known is drawn for the example, and the same for every map of it. Tied pixels are revealed in an
    order drawn at random, as many as a map without ties would reveal. The authors' code takes all pixels at or above a
    quantile, `together=True`: a constant map then has the whole picture at the first threshold.

    Variants: `ap.metrics.PNG()` and `ap.metrics.Zlib()` for the bytes; `ap.metrics.MultiScaleSSIM()`, likeness to the
    whole picture instead of bytes, on the same scale from the blurred one to 1.

    Attributes:
        score: what is watched.
        thresholds: shares of the pixels that are revealed.
        fraction: of the pixels, known from the start.
        least: score at the picture below which an example does not count.
        monotone: whether y never falls from a threshold to the next.
        information: what stands on the axis of x.
        points: at which the curve is read off.
        together: whether all pixels of one value are revealed at once.

    Raises:
        ConfigError: thresholds or a fraction that are no shares; SciPy or Pillow is not installed.
        InputError: no pictures in [0, 1].

    Source: Kapishnikov et al. (2019), and their code for all settings.

    Here a model looks at the roughness of the upper left quarter, and of two maps one knows.

    >>> import apportion as ap
    >>> x = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    >>> field = ap.Field(lambda x: 40 * x[..., :12, :12].diff(dim=3).abs().mean((1, 2, 3)) - 8)
    >>> knows = torch.zeros_like(x)
    >>> knows[..., :12, :12] = 1
    >>> right, wrong = (SIC()(field, x, m).values.item() for m in (knows, -knows))
    >>> right > 0.5 > 0.1 > wrong
    True
    """


@register(
    MetricCard(
        title="Accuracy information curve",
        paper=_PAPER,
        intent="How soon the decision comes back while a blurred picture regains its information.",
        direction=Direction.HIGHER,
        range=(0, 1),
        statistic="median curve",
        chance=_CHANCE,
        cost="15 rows: the picture, it blurred, and 13 in between",
        cautions=_CAUTIONS,
    )
)
@dataclass(frozen=True)
class AIC(Revealing):
    """The area under the accuracy information curve: `SIC` with 1 for y where the model decides for the class, else 0.

    Examples it decides otherwise on, and those it recognizes blurred, are undefined.

    Attributes:
        score: the decision.
        thresholds: as for SIC.
        fraction: likewise.
        least: the decision at the picture must be the class.
        monotone: whether the class stays once it has been recognized.
        information: what stands on the axis of x.
        points: at which the curve is read off.
        together: what becomes of ties.

    Raises:
        ConfigError: as for SIC.
        InputError: likewise.

    Source: Kapishnikov et al. (2019).

    >>> import apportion as ap
    >>> x = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    >>> field = ap.Field(lambda x: 40 * x[..., :12, :12].diff(dim=3).abs().mean((1, 2, 3)) - 8)
    >>> AIC()(field, x, x).curves["pic"].y_label
    'share of Decision regained'
    """

    score: Score = Decision()

"""From values to colours: signed maps symmetric about 0, their scale, and overlays."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int16, UInt8
from PIL import Image
from torch import Tensor

from apportion.core import registry
from apportion.core.attribution import Attribution, Domain
from apportion.core.errors import ConfigError, InputError, NonFiniteError, kind_of, nearest
from apportion.core.explainer import Explainer

STEPS = 127
"""Steps of colour on either side of 0: as many as a byte can count with 0 exact."""

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Colors:
    """Colours for signed values, running from `zero` to either side through the stops given.

    Attributes:
        zero: where the value is 0; red, green and blue in 0 to 255.
        raises: stops toward the largest positive value, at equal distances.
        lowers: stops toward the most negative one; equal to `raises`, the map shows magnitudes.
        meaning: the legend in words.

    Raises:
        ConfigError: no stop on a side, or something that is no colour.

    >>> RED_BLUE.palette()[[0, 127, 254]].tolist()
    [[10, 62, 140], [255, 255, 255], [165, 8, 32]]
    """

    zero: RGB
    raises: tuple[RGB, ...]
    lowers: tuple[RGB, ...]
    meaning: str

    def __post_init__(self) -> None:
        stops = (self.zero, *self.raises, *self.lowers)
        fits = all(len(s) == 3 and all(isinstance(c, int) and 0 <= c <= 255 for c in s) for s in stops)
        if not self.raises or not self.lowers or not fits:
            raise ConfigError(
                f"Colors(zero={self.zero}, raises={self.raises}, lowers={self.lowers})",
                "colours of three integers in 0 to 255, at least one a side",
                "write raises=((255, 0, 0),)",
            )

    @property
    def signed(self) -> bool:
        """Whether the two sides can be told apart."""
        return self.raises != self.lowers

    @property
    def tinted(self) -> bool:
        """Whether any of them is not a grey."""
        return any(len(set(color)) > 1 for color in (self.zero, *self.raises, *self.lowers))

    @property
    def beneath(self) -> str:
        """Say how the picture under a map looks, and why."""
        if self.tinted:
            return "The picture under a map is shown in grey, so that all colour is the map’s."
        return "The picture under a map keeps its colours, so that the grey laid over it is the map’s."

    def palette(self) -> UInt8[np.ndarray, "255 3"]:
        """List the colours from the most negative value to the most positive."""

        def side(stops: tuple[RGB, ...]) -> np.ndarray:
            line = np.array([self.zero, *stops], dtype=np.float64)
            at, where = np.linspace(0, 1, STEPS + 1), np.linspace(0, 1, len(line))
            return np.stack([np.interp(at, where, line[:, c]) for c in range(3)], axis=1)

        both = np.concatenate([side(self.lowers)[:0:-1], side(self.raises)])
        return both.round().astype(np.uint8)


RED_BLUE = Colors(
    zero=(255, 255, 255),
    raises=((244, 130, 105), (165, 8, 32)),
    lowers=((110, 165, 220), (10, 62, 140)),
    meaning="red raises the score, blue lowers it, white is 0",
)
"""The convention of the field."""

ORANGE_PURPLE = Colors(
    zero=(255, 255, 255),
    raises=((241, 163, 64), (150, 70, 0)),
    lowers=((153, 142, 195), (64, 20, 115)),
    meaning="orange raises the score, purple lowers it, white is 0",
)
"""Told apart with any kind of colour blindness."""

GREY = Colors(
    zero=(0, 0, 0),
    raises=((255, 255, 255),),
    lowers=((255, 255, 255),),
    meaning="brighter is larger in size, black is 0; the sign is not shown",
)
"""Magnitudes."""

COLORS = {"red-blue": RED_BLUE, "orange-purple": ORANGE_PURPLE, "grey": GREY}
"""The colours by name."""


def colors_by_name(name: str) -> Colors:
    """Look colours up.

    Raises:
        ConfigError: none have this name.

    >>> colors_by_name("grey").signed
    False
    """
    if name not in COLORS:
        raise ConfigError(f"no colours named {name!r}", nearest(name, COLORS), f"choose one of {', '.join(COLORS)}")
    return COLORS[name]


@dataclass(frozen=True, eq=False)
class Painted:
    """A map in colours, with what is needed to read them.

    Attributes:
        levels: the colour of each pixel, from -127 to 127.
        colors: what the levels stand for.
        scale: the magnitude that has the full colour, in the map's units; 0 for a map of zeros.
        percentile: of the magnitudes, the one that is the scale.
        beyond: share of the pixels with a larger magnitude, drawn in the full colour too.
    """

    levels: Int16[np.ndarray, "H W"]
    colors: Colors
    scale: float
    percentile: float
    beyond: float

    @property
    def rgb(self) -> UInt8[np.ndarray, "H W 3"]:
        """The pixels as red, green and blue."""
        return self.colors.palette()[self.levels + STEPS]

    @property
    def note(self) -> str:
        """The scale in words."""
        if self.scale == 0:
            return "all values are 0"
        rest = f"; {self.beyond:.1%} of the pixels lie beyond" if self.beyond else ""
        if self.percentile == 100:
            return f"full colour at the largest magnitude, {self.scale:.3g}"
        return f"full colour at {self.scale:.3g}, the {self.percentile:g}th percentile of magnitude{rest}"

    def image(self) -> Image.Image:
        """Give the map as a Pillow image with a palette, small when stored."""
        image = Image.fromarray((self.levels + STEPS).astype(np.uint8))
        image.putpalette(self.colors.palette().tobytes())
        return image


def scale_of(values: Float[Tensor, "H W"], percentile: float = 99.0) -> float:
    """Find the magnitude to be drawn in the full colour.

    It is one of the values themselves: the smallest with at least so many per cent of the magnitudes at or below it.
    Where that is 0, since nearly all values are, the largest magnitude stands in.

    Args:
        values: a finite map.
        percentile: in (0, 100].

    Raises:
        ConfigError: another percentile.
        NonFiniteError: NaN or infinity among the values.

    >>> scale_of(torch.tensor([[-3.0, 1.0, 0.0, 2.0]]), percentile=75), scale_of(torch.zeros(2, 2))
    (2.0, 0.0)
    """
    check_percentile(percentile)
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise NonFiniteError(f"{bad} of {values.numel()} values are not finite", "a finite map", "explain it again")
    sizes = np.sort(values.detach().double().abs().cpu().numpy(), axis=None)
    at = max(0, int(np.ceil(len(sizes) * percentile / 100 - 1e-9)) - 1)
    return float(sizes[at] or sizes[-1])


def check_percentile(percentile: float) -> None:
    """Refuse what is no percentile of magnitudes.

    Raises:
        ConfigError: it is not in (0, 100].
    """
    if not 0 < percentile <= 100:
        raise ConfigError(f"percentile {percentile}", "a number in (0, 100]", "give 99, or 100 for the largest")


def paint(values: Float[Tensor, "H W"], *, colors: Colors = RED_BLUE, percentile: float = 99.0) -> Painted:
    """Colour a map; equal magnitudes get equal strength of colour on both sides of 0.

    Args:
        values: a finite map with at least one pixel.
        colors: which colours.
        percentile: of the magnitudes, which has the full colour.

    Raises:
        InputError: a map without pixels.

    >>> paint(torch.tensor([[-1.0, 0.0, 1.0]])).rgb.tolist()
    [[[10, 62, 140], [255, 255, 255], [165, 8, 32]]]
    """
    if not values.numel():
        raise InputError(f"a map of shape {tuple(values.shape)}", "at least one pixel", "check the picture's size")
    scale = scale_of(values, percentile)
    exact = values.detach().double().cpu().numpy()
    share = np.clip(exact, -scale, scale) / scale if scale else np.zeros_like(exact)
    levels = np.round(share * STEPS).astype(np.int16)
    if not colors.signed:
        levels = np.abs(levels)
    return Painted(levels, colors, scale, float(percentile), float((np.abs(exact) > scale).mean()))


def overlay(painted: Painted, picture: Float[Tensor, "C H W"], opacity: float = 0.6) -> UInt8[np.ndarray, "H W 3"]:
    """Lay a map over a picture.

    Args:
        painted: the map.
        picture: of the map's size, one channel or three, in [0, 1].
        opacity: of the map: 0 shows the picture alone, 1 the map alone.

    Raises:
        InputError: another opacity, size or range.

    >>> one = paint(torch.zeros(1, 1))
    >>> overlay(one, torch.zeros(3, 1, 1), 0).tolist(), overlay(one, torch.zeros(3, 1, 1), 1).tolist()
    ([[[0, 0, 0]]], [[[255, 255, 255]]])
    """
    if not 0 <= opacity <= 1:
        raise InputError(f"opacity {opacity}", "a number in [0, 1]", "write opacity=0.6")
    below = to_rgb(picture)
    if below.shape[:2] != painted.levels.shape:
        raise InputError(
            f"a picture of {below.shape[:2]} pixels under a map of {painted.levels.shape}",
            "equal sizes",
            "draw the map at the picture's size: picture_map(a, size=...)",
        )
    return np.round((1 - opacity) * below.astype(np.float64) + opacity * painted.rgb).astype(np.uint8)


def under(picture: Float[Tensor, "C H W"], colors: Colors) -> Float[Tensor, "D H W"]:
    """Prepare a picture to lie under a map: in grey below colours, in its own colours below grey.

    The grey is luminance by Rec. 709 weights.

    >>> under(torch.ones(3, 1, 1), RED_BLUE).shape, under(torch.ones(3, 1, 1), GREY).shape
    (torch.Size([1, 1, 1]), torch.Size([3, 1, 1]))
    """
    if picture.shape[0] == 1 or not colors.tinted:
        return picture
    red, green, blue = picture
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue).clamp(0, 1)[None]


def to_rgb(picture: Float[Tensor, "C H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """Turn a picture into bytes.

    Raises:
        InputError: channels other than one or three, or pixels outside [0, 1].

    >>> to_rgb(torch.ones(1, 1, 2)).tolist()
    [[[255, 255, 255], [255, 255, 255]]]
    """
    picture = picture.detach().double().cpu()
    if picture.shape[0] not in (1, 3) or not picture.numel():
        raise InputError(f"a picture of shape {tuple(picture.shape)}", "[1 | 3, H, W]", "put the channels first")
    low, high = float(picture.min()), float(picture.max())
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"pixels from {low:.4g} to {high:.4g}",
            "a picture in [0, 1]",
            "undo the normalization, or declare it: Field(..., normalize=...)",
        )
    return (picture.expand(3, -1, -1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def picture_map(
    attribution: Attribution, example: int = 0, size: tuple[int, int] | None = None
) -> Float[Tensor, "H W"]:
    """Turn an attribution into one number per pixel: the sum over channels, in units of the score (or per input unit).

    Args:
        attribution: on an input [B, C, H, W], on a site's grid [B, h, w] or [B, K, h, w], or on groups of such, of
            which every pixel then shows its group's value, the mean over its channels, as after `spread()`. A map of
            all examples together is example 0.
        example: which of the B.
        size: height and width; a site's grid is interpolated to it bilinearly. The map's own grid by default.

    Raises:
        InputError: the values do not lie on a picture, there is no such example, or an input map has another size.

    >>> import apportion as ap
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1))
    >>> picture_map(ap.Gradient()(ap.Field(net), torch.zeros(1, 3, 2, 2))).shape
    torch.Size([2, 2])
    """
    if isinstance(attribution.groups, Tensor) and attribution.groups.ndim == 4:
        attribution = attribution.spread()
        attribution = replace(attribution, values=attribution.values.mean(1, keepdim=True))
    if attribution.domain is Domain.GLOBAL:  # one map for all examples lies where one of them does
        at_input = attribution.site in ({}, {"type": "Input"})
        attribution = replace(attribution, domain=Domain.INPUT if at_input else Domain.SITE)
    values = attribution.values
    if attribution.domain not in (Domain.INPUT, Domain.SITE):
        raise InputError(
            f"values on the domain {attribution.domain.value!r}",
            "values on the pixels of an input, on the grid of a site, or on groups of pixels",
            "print it instead",
        )
    if not isinstance(values, Tensor):
        raise InputError(
            f"{kind_of(values)} of inputs",
            "values of a single input",
            "pick the picture's: dataclasses.replace(a, values=a.values[...])",
        )
    ranks = (4,) if attribution.domain is Domain.INPUT else (3, 4)
    if values.ndim not in ranks or 0 in values.shape[1:]:
        wanted = "[B, C, H, W]" if attribution.domain is Domain.INPUT else "[B, h, w] or [B, K, h, w]"
        raise InputError(
            f"values of shape {tuple(values.shape)} on the {attribution.domain.value}", wanted, "print it instead"
        )
    if not 0 <= example < len(values):
        raise InputError(f"example {example} of {len(values)}", f"0 to {len(values) - 1}", "count from 0")
    one = values[example].detach().cpu()
    one = one if one.is_floating_point() and one.dtype.itemsize >= 4 else one.float()
    if one.ndim == 3:  # spread over its elements, a group's value stands once in every channel
        one = one.mean(0) if "spread" in attribution.postprocessing[-1:] else one.sum(0)
    flat = one
    if size is None or tuple(flat.shape) == tuple(size):
        return flat
    if attribution.domain is Domain.INPUT:
        raise InputError(
            f"a map of {tuple(flat.shape)} pixels for a picture of {tuple(size)}",
            "the picture that was explained",
            "give the picture as the network saw it, after cropping",
        )
    return F.interpolate(flat[None, None], tuple(size), mode="bilinear", align_corners=False)[0, 0]


def remarks(attribution: Attribution, size: tuple[int, ...] | None = None) -> list[str]:
    """Say what a reader of the map must know: a grid coarser than the picture's, values without direction.

    Args:
        attribution: what is drawn.
        size: height and width of the picture it is drawn for; a grid as fine as that is none to speak of.

    >>> import apportion as ap
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    >>> remarks(ap.GradCAM()(ap.Field(net), torch.ones(1, 1, 5, 5), target=0))
    ["computed on the layer's own grid, 3 × 3; enlarging it adds no detail"]
    """
    found = []
    if attribution.domain is Domain.SITE and isinstance(attribution.values, Tensor):
        high, wide = attribution.values.shape[-2:]
        if size is None or (high, wide) != tuple(size):
            found.append(f"computed on the layer's own grid, {high} × {wide}; enlarging it adds no detail")
    if attribution.domain is Domain.GROUPS and isinstance(attribution.values, Tensor):
        found.append(f"one value for each of up to {attribution.values.shape[1]:,} groups, shown by all its pixels")
    if any(step.startswith(("abs", "channel_max_abs")) for step in attribution.postprocessing):
        found.append("the sign was taken off: colour says how much, not whether it raises or lowers")
    elif not _signed(attribution):
        found.append("this method's values have no direction: colour says how much, not whether it raises or lowers")
    return found


def _signed(attribution: Attribution) -> bool:
    """Tell whether signs mean something: as the method was set, where its record says how, or else by its Card."""
    if isinstance(attribution.method, dict) and attribution.method and attribution.reproducible:
        made = attribution.explainer()
        if isinstance(made, Explainer) and hasattr(made, "card"):
            return made.signed
    name = attribution.method.get("type", "") if isinstance(attribution.method, dict) else ""
    card = registry.methods().get(registry.snake(name.rpartition(":")[2]))
    return card is None or card.signed


def png(image: Image.Image) -> bytes:
    """Store an image, without date or name, so that equal images are equal bytes.

    >>> png(paint(torch.zeros(1, 1)).image())[1:4]
    b'PNG'
    """
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()

"""Figures: heat maps, overlays, and sheets that put methods side by side, on paper of fixed inches.

Matplotlib draws without pyplot, so no global figure, backend or style of the caller's is touched or needed.
Everything is placed in inches and text is measured before it is placed: nothing overlaps, however long a name.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from apportion.core.attribution import Attribution, Domain
from apportion.core.errors import InputError
from apportion.show import maps
from apportion.show.maps import RED_BLUE, Colors, Painted
from apportion.show.page import Page, Panel, baseline, gap, in_units, in_words, inside, passes, printable, warnings_of

DPI = 110
"""Pixels per inch of sheets."""

_FAMILY = "DejaVu Sans"  # comes with Matplotlib
_CELL, _SPACE, _MARGIN, _LINE = 2.5, 0.25, 0.2, 0.165  # inches


@dataclass
class Sheet:
    """A page filled from the top; lengths are in inches.

    Attributes:
        width: of the page.
        height: used so far.
    """

    width: float
    height: float = _MARGIN
    _texts: list[tuple[float, float, str, float, bool]] = field(default_factory=list)
    _images: list[tuple[float, float, float, float, np.ndarray]] = field(default_factory=list)
    _bars: list[tuple[float, float, float, Painted]] = field(default_factory=list)
    _rects: list[tuple[float, float, float, float, str]] = field(default_factory=list)

    def text(
        self, x: float, y: float, text: str, width: float, *, lines: int, size: float = 8, bold: bool = False
    ) -> float:
        """Write wrapped text with its top left corner at (x, y); return where it ends below."""
        for line in wrap(text, width, size=size, most=lines, bold=bold):
            self._texts.append((x, y, line, size, bold))
            y += _LINE * size / 8
        return y

    def image(self, x: float, y: float, width: float, height: float, rgb: UInt8[np.ndarray, "H W 3"]) -> float:
        """Put a picture; return its lower edge."""
        self._images.append((x, y, width, height, rgb))
        return y + height

    def bar(self, x: float, y: float, width: float, painted: Painted) -> float:
        """Put the legend of a map; return the edge under its numbers."""
        self._bars.append((x, y, width, painted))
        return y + 0.12 + _LINE + 0.04

    def rect(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Put a filled rectangle, under everything else."""
        self._rects.append((x, y, width, height, color))

    def figure(self) -> Figure:
        """Draw all of it."""
        width, height = self.width, self.height + _MARGIN
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)

        def axes(x: float, y: float, wide: float, high: float) -> Axes:
            made = figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))
            made.set_axis_off()
            return made

        for x, y, wide, high, color in self._rects:
            axes(x, y, wide, high).add_patch(Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="none"))
        for x, y, wide, high, rgb in self._images:
            axes(x, y, wide, high).imshow(rgb, interpolation="nearest", aspect="auto")
        for x, y, wide, painted in self._bars:
            _legend(figure, axes(x, y, wide, 0.12), x, y, (width, height), painted)
        for x, y, line, size, bold in self._texts:
            _write(figure, x / width, 1 - y / height, line, size=size, bold=bold)
        return figure


def _write(
    figure: Figure, x: float, y: float, text: str, *, size: float, bold: bool = False, align: str = "left"
) -> None:
    figure.text(
        x,
        y,
        text,
        fontsize=size,
        fontfamily=_FAMILY,
        fontweight="bold" if bold else "normal",
        color="black",
        ha=align,
        va="top",
        parse_math=False,  # a name with two $ is no formula
    )


def _legend(figure: Figure, bar: Axes, x: float, y: float, page: tuple[float, float], painted: Painted) -> None:
    palette, scale = painted.colors.palette(), painted.scale
    is_signed = painted.colors.signed
    bar.imshow((palette if is_signed else palette[maps.STEPS :])[None], aspect="auto", interpolation="nearest")
    bar.set_axis_on()
    bar.set(xticks=[], yticks=[])
    for edge in bar.spines.values():
        edge.set(color="0.5", linewidth=0.5)
    left, right = (f"−{scale:.3g}", f"+{scale:.3g}") if is_signed and scale else ("0", f"{scale:.3g}")
    labels = [(0.0, "left", left), (0.5, "center", "0"), (1.0, "right", right)]
    if not scale:
        labels = [(0.5 if is_signed else 0.0, "center" if is_signed else "left", "0")]
    for share, align, label in labels if is_signed or not scale else [labels[0], labels[2]]:
        at = x + share * _CELL
        _write(figure, at / page[0], 1 - (y + 0.15) / page[1], label, size=7.5, align=align)


# -- text that fits -------------------------------------------------------------------------------


def _width(text: str, size: float, bold: bool) -> float:
    font = get_font(findfont(FontProperties(family=_FAMILY, weight="bold" if bold else "normal")))
    font.set_size(size, 72)
    font.set_text(text, 0.0)
    return font.get_width_height()[0] / 64 / 72


def drawable(text: str) -> str:
    r"""Escape the characters that the font of figures does not have.

    >>> drawable("caffè $x$"), drawable("猫")
    ('caffè $x$', '\\u732b')
    """
    font = get_font(findfont(FontProperties(family=_FAMILY)))
    return "".join(c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in printable(text))


def wrap(text: str, width: float, *, size: float = 8, most: int = 2, bold: bool = False) -> list[str]:
    """Break text into lines that fit, at spaces where there are any; what does not fit ends in an ellipsis.

    Args:
        text: what to write.
        width: inches.
        size: points.
        most: lines at most.
        bold: whether it is set in bold type.

    >>> wrap("short", 2), wrap("word " * 40, 1.0, most=2)[-1][-1]
    (['short'], '…')
    """
    rest, lines = drawable(text).strip(), []
    while rest and len(lines) < most:
        low, high = 1, min(len(rest), 400)  # the longest start that fits
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if _width(rest[:middle], size, bold) <= width else (low, middle - 1)
        cut = low
        if cut < len(rest) and " " in rest[: cut + 1].strip():
            cut = rest.rindex(" ", 0, cut + 1)
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    if rest and lines:
        last = lines[-1]
        while last and _width(last + "…", size, bold) > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "…"
    return lines


# -- what is drawn --------------------------------------------------------------------------------


def _shape(size: tuple[int, int]) -> float:
    """Height of a picture in a cell, for its width; extreme ones are squeezed."""
    return min(max(_CELL * size[0] / size[1], 0.8), 2 * _CELL)


def _single(painted: Painted, rgb: np.ndarray, title: str, attribution: Attribution) -> Figure:
    page = Sheet(_CELL + 2 * _MARGIN)
    y = page.text(_MARGIN, page.height, title, _CELL, lines=2, size=9, bold=True) + 0.04
    y = page.image(_MARGIN, y, _CELL, _shape(painted.levels.shape), rgb) + 0.08
    page.height = _captions(page, _MARGIN, y, painted, attribution, (painted.colors.meaning,))
    return page.figure()


def _captions(
    page: Sheet, x: float, y: float, painted: Painted, attribution: Attribution, more: Sequence[str]
) -> float:
    y = page.bar(x, y, _CELL, painted)
    for line in (f"{painted.note}; {in_units(attribution)}", *maps.remarks(attribution, painted.levels.shape), *more):
        y = page.text(x, y, line, _CELL, lines=3, size=7.5) + 0.04 if line else y
    return y


def heat_map(
    attribution: Attribution,
    example: int = 0,
    *,
    title: str = "",
    colors: Colors = RED_BLUE,
    percentile: float = 99.0,
    size: tuple[int, int] | None = None,
) -> Figure:
    """Draw a map alone, with its legend and scale.

    Args:
        attribution: on a picture's pixels or a site's grid.
        example: which one.
        title: above it.
        colors: the colours.
        percentile: of magnitude, at which the colour is full.
        size: height and width a site's grid is enlarged to.

    >>> import torch, apportion as ap
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1))
    >>> figure = heat_map(ap.Gradient()(ap.Field(net), torch.zeros(1, 3, 2, 2)), title="Gradient")
    >>> to_image(figure).mode
    'RGB'
    """
    painted = maps.paint(maps.picture_map(attribution, example, size), colors=colors, percentile=percentile)
    return _single(painted, painted.rgb, title, attribution)


def overlay(
    attribution: Attribution,
    picture: Float[Tensor, "C H W"],
    example: int = 0,
    *,
    title: str = "",
    colors: Colors = RED_BLUE,
    percentile: float = 99.0,
    opacity: float = 0.6,
) -> Figure:
    """Draw a map over its picture; see `maps.under`.

    Args:
        attribution: of the picture.
        picture: in [0, 1].
        example: which one of the attribution's.
        title: what to write above.
        colors: those of the map.
        percentile: where the map's colour is full.
        opacity: the map's, from 0 to 1.

    >>> import torch, apportion as ap
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1))
    >>> x = torch.zeros(1, 3, 2, 2)
    >>> to_image(overlay(ap.Gradient()(ap.Field(net), x), x[0])).mode
    'RGB'
    """
    high, wide = picture.shape[1:]
    painted = maps.paint(maps.picture_map(attribution, example, (high, wide)), colors=colors, percentile=percentile)
    return _single(painted, maps.overlay(painted, maps.under(picture, colors), opacity), title, attribution)


def sheet(page: Page, *, colors: Colors = RED_BLUE, percentile: float = 99.0, opacity: float = 0.6) -> Figure:
    """Draw one picture's methods side by side: each its map, its overlay, gap and cost.

    Sensitivities and saliences stand in rows of their own, under their question.

    Args:
        page: picture and answers.
        colors: of all maps.
        percentile: of each map's magnitudes, its own scale.
        opacity: of the maps in the overlays.
    """
    groups = page.by_kind()
    top = 2 + len(page.extra_pictures)
    columns = min(4, max([2, top, *(len(panels) for _, panels in groups)]))
    at = [_MARGIN + i * (_CELL + _SPACE) for i in range(columns)]
    out = Sheet(at[-1] + _CELL + _MARGIN)
    full = out.width - 2 * _MARGIN
    y = out.text(_MARGIN, out.height, page.name, full, lines=2, size=12, bold=True)
    y = out.text(_MARGIN, y + 0.03, f"Explained: {page.target}", full, lines=2, size=9)
    how = f"In the maps, {colors.meaning}. Each map has its own scale."
    y = out.text(_MARGIN, y, how, full, lines=2, size=9)
    if page.marked:
        y = out.text(_MARGIN, y, "Energy: squares of a map's values, over channels and pixels.", full, lines=2, size=9)
    out.height = y + 0.12
    _head(out, page, at)
    for kind, panels in groups:
        out.rect(_MARGIN, out.height, full, 0.015, "0.6")
        out.height += 0.08
        heading = f"{kind.value.capitalize()}: {kind.question}"
        out.height = out.text(_MARGIN, out.height, heading, full, lines=2, size=10, bold=True) + 0.08
        for first in range(0, len(panels), columns):
            row = panels[first : first + columns]
            head = max(map(_heading, row))  # so that the maps of a row stand side by side
            ends = [
                _panel(out, x, page, panel, head, colors, percentile, opacity)
                for x, panel in zip(at, row, strict=False)
            ]
            out.height = max(ends) + 0.15
    for title, why in page.failures:
        out.height = out.text(_MARGIN, out.height, f"{title} failed: {why}", full, lines=3, size=9) + 0.06
    return out.figure()


def _head(out: Sheet, page: Page, at: list[float]) -> None:
    """The picture, its top classes, and what else was found, in rows."""
    cells = [(None, None), *page.extra_pictures]
    row_end = top = out.height
    lines = max(len(wrap(name or "", _CELL, size=9, bold=True)) for name, _ in cells) or 1  # pictures stand in rows
    for index, (name, extra) in enumerate(cells):
        slot = index if index == 0 else index + 1  # the second is for the classes
        if slot and slot % len(at) == 0:
            top = row_end + 0.1
        x = at[slot % len(at)]
        shown = page.picture if extra is None else extra
        out.text(x, top, "The picture" if name is None else name, _CELL, lines=2, size=9, bold=True)
        y = top + lines * _LINE * 9 / 8 + 0.04
        row_end = max(
            row_end, out.image(x, y, _CELL, _shape((shown.shape[1], shown.shape[2])), maps.to_rgb(shown)) + 0.05
        )
        if index == 0:
            row_end = max(row_end, _classes(out, at[1], top, page))
    out.height = row_end + 0.1


def _classes(out: Sheet, x: float, y: float, page: Page) -> float:
    if not page.classes:
        return y
    y = out.text(x, y, "Top classes", _CELL, lines=1, size=9, bold=True) + 0.04
    for label, chance in page.classes:
        out.rect(x, y, _CELL, 0.06, "0.92")
        out.rect(x, y, max(0.01, _CELL * min(max(chance, 0.0), 1.0)), 0.06, "0.45")
        y = out.text(x, y + 0.07, f"{chance:.3f}  {label}", _CELL, lines=2) + 0.06
    return y


def _energy(page: Page, panel: Panel) -> list[str]:
    return [] if page.telling is None else [in_words(inside(panel.attribution, page.telling, page.size))]


def _heading(panel: Panel) -> float:
    """Height of title and detail."""
    title, detail = wrap(panel.title, _CELL, size=9, bold=True), wrap(panel.detail, _CELL)
    return _LINE * (9 / 8 * max(len(title), 1) + len(detail)) + 0.04


def _panel(
    out: Sheet, x: float, page: Page, panel: Panel, head: float, colors: Colors, percentile: float, opacity: float
) -> float:
    painted = maps.paint(maps.picture_map(panel.attribution, size=page.size), colors=colors, percentile=percentile)
    over = maps.overlay(painted, maps.under(page.picture, colors), opacity)
    high = _shape(page.size)
    y = out.height + head
    out.text(x, out.text(x, out.height, panel.title, _CELL, lines=2, size=9, bold=True), panel.detail, _CELL, lines=2)
    y = out.image(x, y, _CELL, high, painted.rgb) + 0.06
    y = out.image(x, y, _CELL, high, over) + 0.08
    facts = (
        f"baseline {baseline(panel.attribution)}" if baseline(panel.attribution) else "",
        f"gap {gap(panel.attribution)}",
        *_energy(page, panel),
        f"{passes(panel.attribution)}; {panel.seconds:.2f} s",
        *(f"warning: {w}" for w in warnings_of(panel.attribution)),
    )
    return _captions(out, x, y, painted, panel.attribution, facts)


def to_image(figure: Figure) -> Image.Image:
    """Render a figure of this module.

    >>> to_image(Sheet(1.0).figure()).size
    (110, 44)
    """
    canvas = figure.canvas
    if not isinstance(canvas, FigureCanvasAgg):
        canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a title that went past `drawable`
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())


def show(
    attribution: Attribution,
    x: Tensor | None = None,
    *,
    colors: Colors = RED_BLUE,
    percentile: float = 99.0,
    opacity: float = 0.6,
    most: int = 8,
) -> Image.Image:
    """Draw the first examples of an attribution below each other, over their pictures where those are given.

    Args:
        attribution: what to draw.
        x: pictures [B, 1 | 3, H, W] in [0, 1].
        colors: which to use.
        percentile: see `maps.paint`.
        opacity: see `maps.overlay`.
        most: examples drawn; more are counted below.

    Raises:
        InputError: pictures of another number, or values that are no maps.
    """
    of_all = attribution.domain is Domain.GLOBAL
    count = 1 if of_all else len(attribution)
    if x is not None and (x.ndim != 4 or len(x) != count):
        raise InputError(
            f"pictures of shape {tuple(x.shape)} for " + ("one map of all" if of_all else f"{count} examples"),
            f"[{count}, 1 | 3, H, W]",
            "leave x out, or give one picture" if of_all else "give what was explained, the examples first",
        )
    columns = 1 if x is None else 3
    at = [_MARGIN + i * (_CELL + _SPACE) for i in range(columns)]
    out = Sheet(at[-1] + _CELL + _MARGIN)
    full = out.width - 2 * _MARGIN
    name = attribution.method.get("type", "?") if isinstance(attribution.method, dict) else "?"
    heading = f"{name} ({attribution.kind.value}): {colors.meaning}"
    out.height = out.text(_MARGIN, out.height, heading, full, lines=4, size=9) + 0.08
    for example in range(min(count, most)):
        size = None if x is None else (x.shape[2], x.shape[3])
        painted = maps.paint(maps.picture_map(attribution, example, size), colors=colors, percentile=percentile)
        high, y = _shape(painted.levels.shape), out.height
        if x is not None:
            out.image(at[0], y, _CELL, high, maps.to_rgb(x[example]))
            below = maps.under(x[example].detach().cpu(), colors)
            out.image(at[1], y, _CELL, high, maps.overlay(painted, below, opacity))
        y = out.image(at[-1], y, _CELL, high, painted.rgb) + 0.08
        out.height = _captions(out, at[-1], y, painted, attribution, ()) + 0.12
    if count > most:
        out.height = out.text(_MARGIN, out.height, f"the first {most} of {count}", full, lines=1)
    return to_image(out.figure())

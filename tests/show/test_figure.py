"""Figures: of the right size, whatever the names hold, and without matplotlib's global state."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

import apportion as ap
from apportion.core.errors import InputError
from apportion.show import figure, maps
from apportion.show.report import Page, write_sheet

MakePage = Callable[..., Page]
HOSTILE = ["<script>alert(1)</script>", "$x$ and $\\frac{", "猫🐈\u202egnp", "caf\udce9\x00\n", "a" * 500, " ", ""]


def test_sheet_is_a_png_as_wide_as_its_columns(make_page: MakePage, tmp_path) -> None:
    write_sheet(tmp_path / "sheet.png", make_page())
    image = Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes()))
    assert image.format == "PNG"
    assert abs(image.width - figure.DPI * (3 * 2.5 + 2 * 0.25 + 2 * 0.2)) <= 1
    assert image.height > image.width
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def test_sheets_are_the_same_every_time(make_page: MakePage, tmp_path) -> None:
    page = make_page()
    for name in ("one", "two"):
        write_sheet(tmp_path / name, page)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_drawn(make_page: MakePage, name: str) -> None:
    page = make_page(name=name, target=name, label=name, title=name, extra=name)
    image = figure.to_image(figure.sheet(page))
    assert image.width < 1000


@pytest.mark.parametrize("name", ["word " * 300, "W" * 300, "i" * 300, "$" * 300, "猫" * 300])
@pytest.mark.parametrize("bold", [False, True])
def test_text_fits_its_width(name: str, bold: bool) -> None:
    page = figure.Sheet(3.0)
    page.height = page.text(0.2, 0.2, name, 2.6, lines=4, bold=bold)
    drawn = np.asarray(figure.to_image(page.figure()))
    columns = np.flatnonzero((drawn < 200).any((0, 2))) / figure.DPI
    assert columns.min() > 0.15
    assert columns.max() < 2.85
    assert figure.wrap(name, 2.6, most=4, bold=bold)[-1].endswith("…")


def test_dollars_are_no_formula() -> None:
    assert figure.wrap("$x$", 2) == ["$x$"]
    for text in figure.heat_map(picture_gradient(), title="$x$").texts:
        assert not text.get_parse_math()


def picture_gradient(count: int = 1) -> ap.Attribution:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 6 * 8, 2))
    return ap.Gradient()(ap.Field(net), torch.rand(count, 3, 6, 8), target=0)


def test_heat_map_and_overlay_state_the_percentile() -> None:
    a = picture_gradient()
    for drawn in (figure.heat_map(a, percentile=95), figure.overlay(a, torch.rand(3, 6, 8), percentile=95)):
        said = " ".join(t.get_text() for t in drawn.texts)
        assert "95th percentile" in said
        assert "red raises the score" in said
        stored = io.BytesIO()
        figure.to_image(drawn).save(stored, "PNG")
        assert Image.open(stored).size[0] == round(2.9 * figure.DPI)


def test_the_map_is_drawn_in_its_colours() -> None:
    a = picture_gradient()
    wanted = maps.paint(maps.picture_map(a)).rgb
    drawn = {tuple(p) for p in np.asarray(figure.to_image(figure.heat_map(a))).reshape(-1, 3).tolist()}
    assert {tuple(p) for p in wanted.reshape(-1, 3).tolist()} <= drawn


def test_show_draws_the_first_examples() -> None:
    a = picture_gradient(3)
    alone, over = a.show(), a.show(torch.rand(3, 3, 6, 8))
    assert over.width > 2 * alone.width
    assert a.show(most=1).height < alone.height
    assert a.show(colors=maps.GREY).size[0] == alone.size[0]


def test_show_refuses_other_pictures() -> None:
    with pytest.raises(InputError, match="2 examples"):
        picture_gradient(2).show(torch.rand(1, 3, 6, 8))
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        picture_gradient().show(torch.full((1, 3, 6, 8), 2.0))


def test_notebooks_get_a_map_or_text() -> None:
    html = picture_gradient(2)._repr_html_()
    assert html.startswith('<img src="data:image/png;base64,')
    assert "Attribution by Gradient" in html
    flat = ap.Gradient()(ap.Field(torch.nn.Linear(2, 1)), torch.zeros(1, 2))
    assert flat._repr_html_().startswith("<pre>Attribution by Gradient")


def test_notebook_text_is_escaped() -> None:
    import dataclasses

    bad = dataclasses.replace(picture_gradient(), warnings=("<img src=x onerror=alert(1)>",))
    assert "<img src=x" not in bad._repr_html_()
    assert "&lt;img src=x" in bad._repr_html_()


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_does_not_import_pictures_and_pictures_not_pyplot() -> None:
    code = """
import sys, apportion
assert not {"PIL", "matplotlib", "jinja2", "apportion.show"} & set(sys.modules)
import apportion.show.report
assert "matplotlib.pyplot" not in sys.modules and "torchvision" not in sys.modules
"""
    run(code)


def test_without_the_extra_the_error_says_what_to_install() -> None:
    code = """
import sys, torch, apportion as ap
from importlib import util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
a = ap.Gradient()(ap.Field(torch.nn.Linear(2, 1)), torch.zeros(1, 2))
print(a._repr_html_()[:5])
try:
    a.show()
except ap.ApportionError as error:
    print(error)
"""
    said = run(code)
    assert said.startswith("<pre>")
    assert "pip install 'apportion[image]'" in said

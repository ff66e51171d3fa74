"""The report: one file, safe against its own labels, right in a real browser."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import apportion as ap
from apportion.core.errors import InputError, OutputError
from apportion.show.maps import ORANGE_PURPLE
from apportion.show.report import Page, Panel, write_report

MakePage = Callable[..., Page]
SCRIPT = "<script>alert(1)</script>"
BREAKOUT = '"><img src=x onerror="document.title=\'broken\'">'
HOSTILE = [SCRIPT, BREAKOUT, "');--x:url(", "{{ 7 * 7 }}", "$x$", "猫 🐈 \u202egnp.exe", "caf\udce9\x00\x1b", "w" * 600]
VOID = {"meta", "link", "img", "input", "br", "hr"}


class Reader(HTMLParser):
    """Checks that tags are balanced, and keeps what was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture
def report(make_page: MakePage, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    write_report(path, [make_page(), make_page(name="a dog")], title="Why", model="a small network")
    return path


# -- the file -------------------------------------------------------------------------------------


def test_the_file_says_all(report: Path, make_page: MakePage) -> None:
    said = " ".join(" ".join(read(report).text).split())
    for panel in make_page().panels:
        assert panel.title in said
        for caution in panel.attribution.cautions:
            assert caution.replace("`", "") in said
    for words in (
        *("Why", "a small network", "a dog", "logit of cat", "cat 0.900", "99th percentile", "0.25 s", "33 forward"),
        "not applicable: a sensitivity does not sum to the score",
        "of the claimed total",
        ap.Kind.SALIENCE.question,
        ap.Kind.SENSITIVITY.question,
        "red raises the score, blue lowers it, white is 0",
        '"type": "IntegratedGradients"',
        "own grid",
    ):
        assert words in said, words


def test_the_two_kinds_stand_in_rows_of_their_own(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    first, second = html.split(ap.Kind.SENSITIVITY.question)[1].split("Salience: What")[:2]
    assert first.count("<article") == 1
    assert second.split("<section")[0].count("<article") == 3


def test_the_file_needs_nothing_else(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    assert "://" not in html
    reader = read(report)
    for _, attrs in reader.tags:
        for name in ("src", "href"):
            assert name not in attrs or str(attrs[name]).startswith(("data:", "#"))
    assert not re.findall(r"@import|url\((?!data:)", html)


def test_everything_has_a_name_and_headings_do_not_skip(report: Path) -> None:
    reader = read(report)
    assert all(attrs.get("alt") for attrs in reader.all("img"))
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    labelled = {attrs["for"] for attrs in reader.all("label")}
    assert {attrs["id"] for attrs in reader.all("input")} == labelled
    for _, attrs in reader.tags:
        for name in ("aria-labelledby", "for"):
            assert name not in attrs or attrs[name] in ids
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert reader.all("html")[0]["lang"] == "en"


def test_reports_are_the_same_every_time(make_page: MakePage, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_report(tmp_path / name, [make_page()], title="Why", model="m")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_add_no_tag(make_page: MakePage, tmp_path: Path, name: str) -> None:
    path, tame = tmp_path / "report.html", tmp_path / "tame.html"
    page = make_page(name=name, target=name, label=name, title=name, extra=name)
    write_report(path, [page, page], title=name, model=name)
    page = make_page(title="x")
    write_report(tame, [page, page], title="tame", model="tame")
    assert [(tag, set(attrs)) for tag, attrs in read(path).tags] == [
        (tag, set(attrs)) for tag, attrs in read(tame).tags
    ]


def test_other_colours_reach_legend_and_words(make_page: MakePage, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, [make_page()], title="Why", model="m", colors=ORANGE_PURPLE, percentile=90)
    html = path.read_text(encoding="utf-8")
    assert "orange raises" in html
    assert "red raises" not in html
    assert "rgb(241 163 64)" in html
    assert "90th percentile" in html


def test_a_failed_report_leaves_nothing(make_page: MakePage, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a directory that exists"):
        write_report(tmp_path / "no" / "report.html", [make_page()], title="Why", model="m")
    assert not list(tmp_path.iterdir())


def test_panels_hold_one_map_of_the_picture(make_page: MakePage) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1))
    two = ap.Gradient()(ap.Field(net), torch.zeros(2, 3, 2, 2))
    with pytest.raises(InputError, match="2 examples"):
        Panel("two", two, 0.0)
    one = Panel("one", ap.Gradient()(ap.Field(net), torch.zeros(1, 3, 2, 2)), 0.0)
    with pytest.raises(InputError, match="picture that was explained"):
        Page("name", torch.zeros(3, 4, 4), (), "target", (one,))
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        Page("name", torch.full((3, 2, 2), 2.0), (), "target", (one,))


# -- in a browser ---------------------------------------------------------------------------------


FITS = """(() => {
  const wide = document.documentElement.clientWidth;
  const out = [];
  for (const e of document.body.querySelectorAll("*:not(.unseen):not(.skip)")) {
    const box = e.getBoundingClientRect();
    if (box.width && (box.left < -0.5 || box.right > wide + 0.5) && !e.closest(".skip, .under, .unseen")) {
      out.push(e.tagName + "." + e.className + " " + box.left + " " + box.right);
    }
  }
  return {wide, scroll: document.documentElement.scrollWidth, out: out.slice(0, 5)};
})()"""

OVERLAPS = """(() => {
  const out = [];
  const parents = "main, section, .facts, .others, .row, .panel, .below, dl, .slider, .ticks";
  for (const parent of document.querySelectorAll(parents)) {
    const boxes = [...parent.children].filter(e => e.offsetParent).map(e => [e, e.getBoundingClientRect()]);
    boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
      const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (wide > 1 && high > 1) out.push(parent.className + ": " + a.tagName + " " + b.tagName);
    }));
  }
  return out.slice(0, 5);
})()"""

CONTRAST = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const under = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  let least = 21, where = "";
  for (const e of document.body.querySelectorAll("*")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || /SCRIPT|STYLE/.test(e.tagName)) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(under(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least) [least, where] = [ratio, e.tagName + "." + e.className + " " + e.textContent.slice(0, 30)];
  }
  return [least, where];
})()"""


@pytest.mark.parametrize("width", [320, 360, 800, 1280])
def test_it_fits(browser: Any, report: Path, width: int) -> None:
    browser.open(report, width)
    fits = browser.run(FITS)
    assert fits["wide"] == width
    assert fits["scroll"] <= width
    assert not fits["out"]
    assert not browser.run(OVERLAPS)
    assert browser.complaints() == []
    assert browser.loaded() == [report.as_uri()]


def test_the_check_of_overlaps_notices(browser: Any, report: Path) -> None:
    browser.open(report)
    browser.run("document.querySelector('.panel dl').style.marginTop = '-5rem'")
    assert browser.run(OVERLAPS)
    browser.run("document.querySelector('.panel').style.width = '3000px'")
    assert browser.run(FITS)["out"]


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_dark_and_light(browser: Any, report: Path, dark: bool) -> None:
    browser.open(report, dark=dark)
    red = int(re.findall(r"\d+", browser.run("getComputedStyle(document.body).backgroundColor"))[0])
    assert red < 60 if dark else red > 200
    least, where = browser.run(CONTRAST)
    assert least >= 4.5, where


def test_pictures_are_there(browser: Any, report: Path) -> None:
    browser.open(report)
    sizes = browser.run("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
    assert len(sizes) == 2 * (1 + 1 + 4)
    assert all(size == [True, 24, 16] for size in sizes)
    under = browser.run("getComputedStyle(document.querySelector('.under')).backgroundImage")
    assert under.startswith('url("data:image/png;base64,')


SHOWN = """[...document.querySelectorAll('[data-panel]')].map(p => [
  getComputedStyle(p.querySelector('[data-map]')).opacity, p.querySelector('output').textContent])"""


def test_sliders_move_with_the_keyboard(browser: Any, report: Path) -> None:
    browser.open(report)
    assert browser.run(SHOWN) == [["0.6", "60 %"]] * 8
    assert browser.run("document.querySelectorAll('[data-needs-script][hidden]').length") == 0
    browser.run("document.querySelector('[data-panel] input').focus()")
    browser.press("ArrowRight", 39)
    assert browser.run(SHOWN) == [["0.65", "65 %"], *[["0.6", "60 %"]] * 7]
    browser.press("Home", 36)
    assert browser.run(SHOWN)[0] == ["0", "0 %"]
    browser.press("End", 35)
    assert browser.run(SHOWN)[0] == ["1", "100 %"]
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.run("document.querySelector('[data-all] input').focus()")
    browser.press("Home", 36)
    assert browser.run(SHOWN) == [*[["0", "0 %"]] * 4, *[["0.6", "60 %"]] * 4]
    assert browser.complaints() == []


def test_tab_reaches_every_control(browser: Any, report: Path) -> None:
    browser.open(report)
    seen = []
    for _ in range(60):
        browser.press("Tab", 9)
        seen.append(browser.run("document.activeElement.tagName + (document.activeElement.id || '')"))
    wanted = browser.run("[...document.querySelectorAll('input')].map(e => 'INPUT' + e.id)")
    assert seen[0] == "A"
    assert set(wanted) <= set(seen)
    assert seen.count("SUMMARY") >= 8


def test_screen_readers_get_names(browser: Any, report: Path) -> None:
    browser.open(report)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]

    def names(role: str) -> list[str]:
        return [n["name"]["value"] for n in nodes if n.get("role", {}).get("value") == role and not n["ignored"]]

    assert len(names("slider")) == 10
    assert "Opacity of the map by Grad-CAM" in names("slider")
    assert all(names("image"))
    assert any("raises the score. Of nine equal parts" in name for name in names("image"))
    assert "a dog" in names("region")


def test_motion_is_reduced_where_asked(browser: Any, report: Path) -> None:
    for reduced, behaviour in ((False, "smooth"), (True, "auto")):
        browser.open(report, reduced=reduced)
        assert browser.run("getComputedStyle(document.documentElement).scrollBehavior") == behaviour


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("width", [360, 1280])
def test_hostile_names_are_text(browser: Any, make_page: MakePage, tmp_path: Path, name: str, width: int) -> None:
    path = tmp_path / "report.html"
    page = make_page(name=name, target=name, label=name, title=name, extra=name)
    write_report(path, [page, page], title=name, model=name)
    browser.open(path, width)
    title = browser.run("document.title")
    shown = browser.run("document.querySelector('h2').textContent")
    assert title == " ".join(shown.split())
    if "\x00" in name:
        assert shown == "caf\\udce9\\x00\\x1b"
    elif "\u202e" in name:
        assert shown == name.replace("\u202e", "\\u202e")
    else:
        assert shown == name
    assert json.loads(browser.run("JSON.stringify(document.querySelector('td bdi').textContent)")) == shown
    assert not browser.run("document.querySelectorAll('body script').length - 1")
    assert not browser.run(FITS)["out"]
    assert not browser.run(OVERLAPS)
    assert browser.complaints() == []
    assert browser.loaded() == [path.as_uri()]


def test_a_script_that_got_in_would_not_run(browser: Any, report: Path, tmp_path: Path) -> None:
    """The page's policy, and the test's own ear for complaints."""
    path = tmp_path / "bad.html"
    html = report.read_text(encoding="utf-8")
    path.write_text(html.replace("</main>", "<script>document.title='run'</script></main>"), encoding="utf-8")
    browser.open(path)
    assert browser.run("document.title") == "Why"
    assert browser.complaints()


def test_errors_on_the_page_are_heard(browser: Any, report: Path) -> None:
    browser.open(report)
    browser.run("console.error('heard')")
    assert browser.complaints()

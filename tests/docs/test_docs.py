"""The documentation tells the truth: its code runs, its tables are whole, its docstrings exist once."""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import re
import subprocess
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import apportion as ap
from apportion.core import config, errors, registry
from apportion.metrics import names as metric_names

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "apportion"
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FENCE = re.compile(r"^```(\S*)")


# -- the code in the pages ------------------------------------------------------------------------


def session(page: Path) -> str:
    """Turn a page into one interactive session of as many lines, so that failures name the page's own line.

    Fenced blocks with prompts stay as they are; a Python block without becomes one call that runs it whole,
    as the file it is; everything else becomes empty.
    """
    out: list[str] = []
    block: list[str] | None = None
    language = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = FENCE.match(line)
        if block is None:
            out.append("")
            if fence:
                block, language = [], fence[1]
        elif line == "```":
            if any(b.startswith(">>> ") for b in block):
                out += block
            elif language == "python":
                whole = "\n" * len(out) + "\n".join(block)
                out += [f">>> exec(compile({whole!r}, {page.name!r}, 'exec'))", *[""] * (len(block) - 1)]
            else:
                out += [""] * len(block)
            out.append("")
            block = None
        else:
            block.append(line)
    assert block is None, f"{page.name}: a fence is not closed"
    return "\n".join(out) + "\n"


def run_session(text: str, page: Path) -> list[str]:
    """Run a session, in a module of its own, and give what failed."""
    module = types.ModuleType(f"docs_{page.stem.replace('-', '_')}")
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    test.globs = module.__dict__
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    said = io.StringIO()
    sys.modules[module.__name__] = module
    try:
        with contextlib.redirect_stderr(said):
            runner.run(test, out=said.write, clear_globs=False)
    finally:
        del sys.modules[module.__name__]
    return [said.getvalue()] if runner.failures else []


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let a page register methods and write files without leaving a trace."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    known = sys.modules[metric_names.__module__]
    monkeypatch.setattr(known, "_METRICS", dict(known._METRICS))
    monkeypatch.setattr(config.Configurable, "_known", dict(config.Configurable._known))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_in_page_runs(page: Path) -> None:
    failures = run_session(session(page), page)
    assert not failures, failures[0]


@pytest.mark.parametrize("name", ["quick-start", "command-line", "which-method", "add-a-method", "errors"])
def test_page_has_code(name: str) -> None:
    assert session(ROOT / "docs" / f"{name}.md").count(">>> ") >= 5


def test_runner_catches_a_wrong_output(tmp_path: Path) -> None:
    page = tmp_path / "wrong.md"
    page.write_text("text\n\n```python\n>>> 1 + 1\n3\n```\n")
    (failure,) = run_session(session(page), page)
    assert "line 4" in failure
    page.write_text("```python\ndef f():\n    raise ValueError\n\n\nf()\n```\n")
    assert run_session(session(page), page)


# -- generated tables -----------------------------------------------------------------------------


def test_methods_table_has_every_method() -> None:
    table = registry.methods_table()
    assert ap.methods()
    for name, card in ap.methods().items():
        assert f"name `{name}`" in table
        assert card.title in table
        for caution in card.cautions:
            assert caution in table


def _all_errors(base: type[ap.ApportionError]) -> set[type[ap.ApportionError]]:
    return {e for sub in base.__subclasses__() for e in (sub, *_all_errors(sub))}


def test_errors_table_has_every_error() -> None:
    table = errors.errors_table()
    ours = {e for e in _all_errors(ap.ApportionError) if e.__module__.startswith("apportion.")}
    assert errors.InputError in ours
    for error in ours:
        assert f"| `{error.__name__}` | {error.cause} | {error.fix} |" in table
        assert error.cause
        assert error.fix


@pytest.mark.parametrize(("page", "table"), [("which-method", "methods"), ("errors", "errors")])
def test_pages_include_the_generated_tables(page: str, table: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert f"```{{include}} _generated/{table}.md" in text


def test_guide_names_every_method() -> None:
    text = (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8")
    missing = [n for n in ap.methods() if f"`{registry.method(n).__name__}`" not in text]
    assert not missing, "docs/which-method.md says nothing of these: give each a row"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_architecture_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [p for p in SOURCE.rglob("*.py") if p.name != "__init__.py"]
    for path in rooms:
        inside = path.relative_to(SOURCE)
        folder = f"`{inside.parts[0]}/"
        named = f"`{inside}`" in text or (folder in text and f"`{path.name}`" in text)
        one_a_file = inside.parts[0] == "methods" and f"`{inside.parts[1]}/`" in text
        assert named or one_a_file, f"docs/architecture.md does not say what lives in {inside}"


# -- docstrings -----------------------------------------------------------------------------------


def test_public_names_are_described() -> None:
    for name in ap.__all__:
        assert (getattr(ap, name).__doc__ or "").strip(), f"ap.{name} has no docstring"
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    missing = [n for n in ap.__all__ if not re.search(rf"apportion[\w.]*\.{n}\b|^\s+{n}\b", reference, re.M)]
    assert not missing, "docs/reference.md leaves these out"


def sentences(docstring: str) -> Iterator[str]:
    """Split a docstring into sentences of at least eight words; an entry's name is not part of its sentence."""
    for part in re.split(r"\n\s*\n|\n(?=\s*\w+: )|\n(?=\s*>>> )|(?<=[.:])\s+(?=[A-Z`])", docstring):
        text = " ".join(re.sub(r"^\s*\w+: ", "", part).split())
        if not text.startswith(">>>") and len(text.split()) >= 8:
            yield text


def repeated(sources: dict[str, str]) -> dict[str, list[str]]:
    """Find sentences that stand in two docstrings or more."""
    where: dict[str, list[str]] = defaultdict(list)
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for sentence in set(sentences(ast.get_docstring(node) or "")):
                    where[sentence].append(f"{name}:{getattr(node, 'name', 'module')}")
    return {s: w for s, w in where.items() if len(w) > 1}


def test_no_sentence_stands_in_two_docstrings() -> None:
    sources = {str(p.relative_to(SOURCE)): p.read_text(encoding="utf-8") for p in SOURCE.rglob("*.py")}
    found = repeated(sources)
    assert not found, "\n".join(f"{s!r} in {w}" for s, w in found.items())


def test_repetition_is_noticed() -> None:
    twice = '"""Takes rows. The target is the output explained by all methods."""\n'
    also = (
        'def f():\n    """Other.\n\n    Args:\n        t: The target is the output explained by all methods.\n    """\n'
    )
    assert len(repeated({"a": twice, "b": also})) == 1
    assert not repeated({"a": twice, "b": also.replace("all", "most")})


# -- the example ----------------------------------------------------------------------------------


def test_example_runs() -> None:
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / "examples" / "own_model.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "4 of 4 pictures are classified rightly" in done.stdout
    shares = dict(re.findall(r"^([^:\n]+): (\d+)% of the map on the stripes", done.stdout, re.M))
    assert len(shares) == 4
    assert all(int(share) > 14 for share in shares.values())  # the patch's share of the picture
    assert int(shares["integrated gradients from the grey around the stripes"]) == 100


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("table", ["patients are classified rightly", "no warning: the linear", "warning: held-out R²", "than 6 of"]),
        ("evaluate", ["417 forward", "12 finished pairs", "not better than Edges", "dominated by"]),
        ("text", ["100% of the reviews", "LIME: 250 passes", "exact, by all subsets: 255 passes"]),
    ],
)
def test_examples_of_local_surrogates_run(name: str, told: list[str]) -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for words in told:
        assert words in done.stdout


def test_example_runs_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("cyclopts")
    pytest.importorskip("matplotlib")
    from PIL import Image

    from apportion.cli import main

    Image.new("RGB", (40, 40), "orange").save(tmp_path / "a.png")
    spec = f"{ROOT / 'examples' / 'own_model.py'}:trained"
    told = ["--size", "32", "--method", "gradient", "--quiet", "--out", str(tmp_path / "out")]
    assert main(["explain", str(tmp_path / "a.png"), "--model", spec, *told]) == 0
    assert (tmp_path / "out" / "report.html").is_file()

"""How Sphinx builds the documentation.

Two tables are not written by hand: the methods, from their Cards, and the errors, from their classes.
They are generated at the start of every build into docs/_generated/, where pages pull them in with

    ```{include} _generated/methods.md
    ```
"""

import re
from pathlib import Path

import apportion

project = "apportion"
author = "The apportion authors"
copyright = author
version = release = apportion.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "_generated"]  # the generated tables are parts of pages, not pages
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
default_role = "code"  # docstrings are read in terminals and editors first: one pair of backticks
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are no entries of the index: many classes share their names

html_theme = "furo"
html_title = f"apportion {version}"


def write_tables(app):
    """Write the generated tables; an unchanged one keeps its date, so its pages are not rebuilt."""
    from apportion.core.errors import errors_table
    from apportion.core.registry import methods_table

    folder = Path(app.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)
    for name, table in (("methods", methods_table), ("errors", errors_table)):
        path, text = folder / f"{name}.md", table()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def keep_symbols(app, what, name, obj, options, lines):
    """Let docstrings write |x|, x* and x_ as mathematics: outside code, these are no markup."""
    in_doctest = False
    for i, line in enumerate(lines):
        in_doctest = line.lstrip().startswith(">>>") or (in_doctest and bool(line.strip()))
        if not in_doctest:
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
            lines[i] = "".join(parts)


def setup(app):
    app.connect("builder-inited", write_tables)
    app.connect("autodoc-process-docstring", keep_symbols, priority=100)  # before napoleon

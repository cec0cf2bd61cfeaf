"""Sphinx configuration: `make docs`. Any warning is an error."""

from __future__ import annotations

import re
from typing import Any

import fairopt

project = "fairopt"
author = "the fairopt authors"
project_copyright = author
release = fairopt.__version__
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # `name` in a docstring links to that name where it is known
add_module_names = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Attributes of the class", "params_style")]

html_theme = "furo"
html_title = f"fairopt {release}"
html_show_sourcelink = False
html_show_copyright = False

BAR = re.compile(r"(``.*?``|`[^`]*`)|\\?(\|)")


def formulas_keep_their_bars(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings write |gap| ≤ tolerance, which reStructuredText would read as a substitution."""
    for i, line in enumerate(lines):
        if not line.startswith("    "):  # code stays as it is
            lines[i] = BAR.sub(lambda m: m[1] or r"\|", line)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", formulas_keep_their_bars)

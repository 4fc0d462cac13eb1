"""Configuration of the documentation: Sphinx, MyST Markdown, the furo theme."""

import doctest
import os
from pathlib import Path

import pyro_iw

project = "pyro-iw"
author = "The pyro-iw contributors"
copyright = author
release = version = pyro_iw.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"pyro-iw {release}"
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}

napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False

python_use_unqualified_type_names = True


def _skip(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples, which the docstring of the class describes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _public_bases(app, name, obj, options, bases):
    """Name the public base class where the direct one is private."""
    bases[:] = [base.__base__ if base.__name__.startswith("_") else base for base in bases]


def _execute_tutorial(app):
    """Run what the tutorial prints, so that no build shows figures that the code does not give."""
    os.environ.setdefault("MPLBACKEND", "agg")
    page = Path(app.srcdir) / "evaluation.md"
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testfile(str(page), module_relative=False, optionflags=flags, encoding="utf-8")
    if failed:
        from sphinx.errors import ExtensionError  # not there where pytest collects this file alone

        raise ExtensionError(f"{failed} example(s) of {page.name} do not give what it says; see above")


def setup(app):
    app.connect("builder-inited", _execute_tutorial)
    app.connect("autodoc-process-bases", _public_bases)
    app.connect("autodoc-skip-member", _skip)

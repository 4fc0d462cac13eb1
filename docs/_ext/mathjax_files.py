"""Formulas without a network: MathJax from a Python package, beside the pages.

Its SVG output is one file that holds its glyphs as well. Web fonts would be a dozen files, which browsers
refuse to pages that are opened from a disk.
"""

from importlib.metadata import files
from pathlib import Path

PACKAGE, COMPONENT = "sphinx-mathjax-offline", "tex-svg.js"


def component():
    """The path of the installed file."""
    found = [path for path in files(PACKAGE) or () if path.name == COMPONENT]
    if not found:
        raise FileNotFoundError(f"{COMPONENT} is not in the package {PACKAGE}")
    return Path(found[0].locate())


def setup(app):
    app.config.html_static_path.append(str(component()))
    app.config.mathjax_path = COMPONENT
    # Menu and screen reader support would load parts that are not there.
    app.config.mathjax3_config = {"options": {"enableMenu": False}}
    return {"parallel_read_safe": True, "parallel_write_safe": True}

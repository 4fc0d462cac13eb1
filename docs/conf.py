"""Configuration of the pages: Sphinx, MyST Markdown, the furo theme. None of it needs a network."""

import doctest
import os
import sys
from pathlib import Path

import pyro_iw

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "pyro-iw"
author = "The pyro-iw contributors"
copyright = author
release = version = pyro_iw.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "references",
    "mathjax_files",
    "tutorials",
]
exclude_patterns = ["_build", "_ext", "_templates", "tutorials/*.py", "tutorials/*.ipynb"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"pyro-iw {release}"
html_theme_options = {"navigation_with_keys": True}
# The theme's own, and the choice of a version.
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/versions.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ["amsmath", "attrs_block", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
# Of each page, the module whose text says what the names on it are about.
autosummary_context = {
    "background": {
        f"pyro_iw.{name}": f"pyro_iw.{module}"
        for name, module in {
            "Bound": "bounds",
            "ImportanceSampler": "posterior.sampler",
            "ImportanceSamples": "posterior.to_arviz",
            "LeaveOneOut": "posterior.leave_one_out",
            "AnnealedImportanceSampler": "posterior.annealed",
            "sandwich": "posterior.sandwich",
            "active_units": "posterior.evaluation",
            "aggregated_posterior": "posterior.aggregated",
            "TwoSamples": "posterior.two_samples",
            "gradient_snr": "gradients.snr",
            "FIVO_ELBO": "sequences.fivo",
            "ParticleFilter": "sequences.evaluation",
            "FilteredSequences": "sequences.to_arviz",
            "AdversarialSVI": "adversarial.svi",
        }.items()
    }
}

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}

napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False

python_use_unqualified_type_names = True
maximum_signature_line_length = 80

# Filled by the extension "references", from files.
intersphinx_mapping = {}

# Prompts and what a program prints are not to be copied.
copybutton_exclude = ".linenos, .gp, .go"


def _skip(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples, which the docstring of the class describes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _public_bases(app, name, obj, options, bases):
    """Name the public base class where the direct one is private."""
    bases[:] = [base.__base__ if base.__name__.startswith("_") else base for base in bases]


def _execute_evaluation(app):
    """Run what the page on evaluation prints, so that no build shows figures that the code does not give."""
    os.environ.setdefault("MPLBACKEND", "agg")
    page = Path(app.srcdir) / "evaluation.md"
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testfile(str(page), module_relative=False, optionflags=flags, encoding="utf-8")
    if failed:
        from sphinx.errors import ExtensionError  # not there where pytest collects this file alone

        raise ExtensionError(f"{failed} example(s) of {page.name} do not give what it says; see above")


def setup(app):
    app.connect("builder-inited", _execute_evaluation)
    app.connect("autodoc-process-bases", _public_bases)
    app.connect("autodoc-skip-member", _skip)

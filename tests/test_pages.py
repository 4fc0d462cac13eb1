"""The reference has a page for every public name, with a formula and an example; tutorials are short."""

import ast
import importlib
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest

import pyro_iw

ROOT = Path(__file__).parent.parent
MODULES = ["bounds", "nn", "plots", "psis", "resampling", "sequences.plots"]
LISTED = set(re.findall(r"^   (pyro_iw\.[\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.M))
TUTORIALS = sorted((ROOT / "examples" / "tutorials").glob("*.py"))
# An optimiser computes no formula of ours, and neither does a look at a pair, nor an error.
WITHOUT_FORMULA = {"FusedOptim", "PairCheck", "RankError", "SiteCheck"}


def test_every_public_name_has_a_page():
    names = {f"pyro_iw.{name}" for name in pyro_iw.__all__}
    bounds = importlib.import_module("pyro_iw.bounds")
    kinds = {f"pyro_iw.bounds.{name}" for name in bounds.__all__ if isinstance(getattr(bounds, name), type)}
    base = {"pyro_iw.training.TrainedLoss"}  # where the losses have their methods from
    modules = {f"pyro_iw.{name}" for name in MODULES} - {"pyro_iw.bounds"}
    assert names | (kinds - {"pyro_iw.bounds.Bound"}) | modules | base == LISTED


@pytest.mark.parametrize("name", pyro_iw.__all__)
def test_every_public_name_has_an_example_and_every_class_a_formula(name):
    documented = getattr(pyro_iw, name)
    text = inspect.getdoc(documented)
    assert ">>> " in text
    if inspect.isclass(documented) and name not in WITHOUT_FORMULA:
        assert ".. math::" in text or ":math:" in text


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_short_and_draws(path):
    """Five to ten cells, the first of which is a title; the build of the pages runs them."""
    text = path.read_text()
    assert 5 <= len(re.findall(r"^# %%$", text, re.M)) <= 10
    assert ast.get_docstring(ast.parse(text)).splitlines()[1].startswith("===")
    assert text.count("plt.show()") >= 2
    order = re.search(
        r"^ORDER = (\[.*?\])", (ROOT / "docs" / "_ext" / "tutorials.py").read_text(), re.M | re.S
    )
    assert path.name in ast.literal_eval(order[1])


def test_versions_stand_side_by_side(tmp_path):
    """The newest release is what one lands on, whichever was published last."""
    spec = importlib.util.spec_from_file_location("site_script", ROOT / "scripts" / "site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    for version in ("0.9.0", "0.10.0", "0.11.0rc1", "0.2.0"):
        html = tmp_path / "html"
        html.mkdir(exist_ok=True)
        (html / "objects.inv").write_bytes(f"# Sphinx\n# Project: p\n# Version: {version}\n# zlib\n".encode())
        (html / "index.html").write_text(version)
        site.main([str(html), str(tmp_path / "site")])
    versions = json.loads((tmp_path / "site" / "versions.json").read_text())
    assert versions == ["0.11.0rc1", "0.10.0", "0.9.0", "0.2.0"]
    assert 'href="0.10.0/index.html"' in (tmp_path / "site" / "index.html").read_text()
    assert all((tmp_path / "site" / name / "index.html").read_text() == name for name in versions)

"""Links: from names in prose to the reference, and from Pyro's and PyTorch's names to their pages.

Both work without a network. What Sphinx would download, the other projects' inventories, is written here from
the lists in ``inventories/``: the names that our own pages use and nothing more.
"""

import re
import zlib
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

import pyro_iw
import pyro_iw.bounds
import pyro_iw.nn

LISTS = Path(__file__).parent / "inventories"
NAME = re.compile(r"([A-Za-z_][\w.]*)(?:\(.*\))?", re.DOTALL)
# What the pages call by these names belongs to somebody else or to a formula.
NOT_LINKED = {"describe"}
# Where a name without its module would be found.
HOMES = (
    "",
    "pyro.infer.",
    "pyro.infer.autoguide.",
    "pyro.",
    "pyro.optim.",
    "pyro.nn.",
    "torch.",
    "torch.utils.data.",
)


def entries(project):
    """The address of a project's pages, and (name, kind, page) of each name in its list."""
    lines = (LISTS / f"{project}.txt").read_text().splitlines()
    listed = [line.split() for line in lines if line and not line.startswith("#")]
    return lines[0].lstrip("# "), listed


def inventory(project, listed):
    """The list as Sphinx's ``objects.inv``, version 2: four lines of text, the rest compressed."""
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: stable\n"
    head += "# The remainder of this file is compressed using zlib.\n"
    body = "".join(f"{name} py:{kind} 1 {page} -\n" for name, kind, page in listed)
    return head.encode() + zlib.compress(body.encode())


def write_inventories(app, config):
    """Give ``sphinx.ext.intersphinx`` files instead of addresses to load from."""
    folder = Path(app.doctreedir) / "inventories"
    folder.mkdir(parents=True, exist_ok=True)
    for project in ("pyro", "torch"):
        address, listed = entries(project)
        path = folder / f"{project}.inv"
        path.write_bytes(inventory(project, listed))
        config.intersphinx_mapping[project] = (address, str(path))


def known():
    """Full names by what prose may call them: ``IWAE_ELBO``, ``SVI``, ``poutine.scale``."""
    names = {}
    for project in ("pyro", "torch"):
        for name, _, _ in entries(project)[1]:
            for home in HOMES:
                short = name.removeprefix(home)
                if short.startswith("poutine.") or (short[:1].isupper() and "." not in short):
                    names.setdefault(short, name)
            names[name] = name
    for module in (pyro_iw.nn, pyro_iw.bounds, pyro_iw):
        for name in module.__all__:
            if name not in NOT_LINKED and callable(getattr(module, name)):
                names[name] = names[f"{module.__name__}.{name}"] = f"{module.__name__}.{name}"
    return names


def target(text, names):
    """The full name behind ``IWAE_ELBO(K=64)`` or ``ImportanceSampler.log_marginal``, or None."""
    found = NAME.fullmatch(text)
    if not found:
        return None
    name = found[1]
    if name in names:
        return names[name]
    owner, _, member = name.rpartition(".")
    full = names.get(owner, "")
    if not full.startswith("pyro_iw.") or not owner[:1].isupper():
        return None
    module, _, kind = full.rpartition(".")
    return f"{full}.{member}" if hasattr(getattr(_module(module), kind), member) else None


def _module(name):
    return {"pyro_iw": pyro_iw, "pyro_iw.bounds": pyro_iw.bounds, "pyro_iw.nn": pyro_iw.nn}[name]


def link_names(app, doctree):
    """Make a link of every piece of code in the prose that is a public name."""
    names = known()
    docname = app.env.docname
    apart = (nodes.reference, nodes.title, addnodes.pending_xref, addnodes.desc_signature)
    for node in list(doctree.findall(nodes.literal)):
        ancestor = node.parent
        while ancestor is not None and not isinstance(ancestor, apart):
            ancestor = ancestor.parent
        full = target(node.astext(), names)
        if ancestor is not None or full is None or docname.endswith(full):
            continue
        link = addnodes.pending_xref(
            "",
            refdomain="py",
            reftype="obj",
            reftarget=full,
            refexplicit=False,
            refwarn=False,
            refdoc=docname,
        )
        node.replace_self(link)
        link += node


def tidy(app, doctree):
    """Leave out what says nothing: the base ``object``, and the blank line that closes a doctest."""
    for node in list(doctree.findall(nodes.paragraph)):
        if node.astext() == "Bases: object":
            node.parent.remove(node)
    for node in doctree.findall(nodes.literal_block):
        text = node.astext()
        if len(node) == 1 and node.rawsource == text != text.rstrip():
            node.rawsource = text.rstrip()
            node[:] = [nodes.Text(node.rawsource)]


def keep_first_line(app, what, name, obj, options, lines):
    """Keep napoleon from reading a property's text before a colon as its type: an empty line comes first."""
    if what in {"property", "attribute"} and lines:
        lines.insert(0, "")


def setup(app):
    app.connect("config-inited", write_inventories, priority=100)
    app.connect("autodoc-process-docstring", keep_first_line, priority=100)
    app.connect("doctree-read", link_names)
    app.connect("doctree-read", tidy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

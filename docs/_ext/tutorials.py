"""The gallery of tutorials: programs of ``examples/tutorials``, run as the pages are built."""

import warnings

ORDER = [
    "from_elbo_to_miwae.py",
    "is_my_fit_any_good.py",
    "discrete_latents.py",
    "hierarchical_models.py",
    "sequences.py",
    "a_bound_of_your_own.py",
]


OUTSIDE = []  # the filters of warnings outside of the programs


def clean_slate(gallery_conf, name, when):
    """Before and after each program: no parameters, seeds or styles of the one before."""
    import matplotlib
    import pyro
    import torch

    matplotlib.rcdefaults()
    matplotlib.use("agg")
    matplotlib.rcParams.update(STYLE)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float32)
    if when == "before":
        OUTSIDE[:] = warnings.filters
        warnings.simplefilter("ignore", DeprecationWarning)  # between Matplotlib, NumPy and PyTorch
        warnings.simplefilter(
            "error", UserWarning
        )  # what a program warns of would be the reader's first question
    else:
        warnings.filters[:] = OUTSIDE


# What all figures share; the programs themselves say nothing of it.
STYLE = {
    "figure.dpi": 110,
    "figure.figsize": (6.4, 3.6),
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def place(file):
    """Where a program stands in the gallery; one that is not in the list is an error."""
    return ORDER.index(file)


def setup(app):
    app.config.sphinx_gallery_conf = {
        "examples_dirs": "../examples/tutorials",
        "gallery_dirs": "tutorials",
        "filename_pattern": r"\.py$",
        "ignore_pattern": r"__init__\.py$",
        "within_subsection_order": "tutorials.place",
        "abort_on_example_error": True,
        "reset_modules": ("tutorials.clean_slate",),
        "reset_modules_order": "both",
        "image_srcset": ["2x"],
        "thumbnail_size": (480, 270),
        "download_all_examples": False,
        "show_signature": False,
        "min_reported_time": 0,
        "write_computation_times": False,
        "remove_config_comments": True,
        "capture_repr": (),
        "backreferences_dir": "tutorials/backreferences",
        "doc_module": ("pyro_iw",),
        "reference_url": {"pyro_iw": None},
        "inspect_global_variables": False,
    }
    return {"parallel_read_safe": True, "parallel_write_safe": True}

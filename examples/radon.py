"""Radon in the counties of Minnesota: a hierarchical regression whose minibatches are counties.

Log radon in house i of county j, on floor x_ij (0: basement), over soil of log uranium u_j::

    a_j ~ Normal(intercept + uranium · u_j, spread),   y_ij ~ Normal(a_j + floor · x_ij, noise)

Five latents are global, and each county has one of its own, a_j, in a plate. The guide takes the counties for
independent of one another and of the global latents, as AutoNormal does. The ELBO pays for that with global
sds that are too small. An importance weight of the counties given the global latents repairs it; one joint
weight of everything cannot, and knows no minibatches. NUTS is the judge. Try::

    python examples/radon.py                       # four minutes on one core, one of them for NUTS
    python examples/radon.py --data arviz          # downloads the survey (Price et al., 1996) once

The survey is used where ArviZ has it on disk. Otherwise data of its shape are generated, from known values.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS, SVI
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_iw import IWAE_ELBO, MIWAE_ELBO, ImportanceWeightedELBO, LocallyEnhancedELBO
from pyro_iw._support.optional import require
from pyro_iw.bounds import IWAE, MIWAE
from shared.options import new_parser, positive_float, positive_int
from shared.running import in_one_line, progress_bar, step
from shared.skeleton import finish, parse

GLOBALS = ["intercept", "uranium", "floor", "spread", "noise"]
TRUTH = {"intercept": 1.4, "uranium": 0.7, "floor": -0.65, "spread": 0.3, "noise": 0.75}
COUNTIES, HOUSES = 85, 919  # of the survey, and of the data in its place
DATA = ("auto", "arviz", "generated")
METHODS = {
    "elbo": "ELBO",
    "joint": "joint IWAE",
    "levels": "two levels",
    "elbo, minibatches": "ELBO, minibatches",
    "levels, minibatches": "two levels, minibatches",
}
DRAWS = 4000  # from a guide
SMOKE = {"steps": 8, "global_particles": 2, "local_particles": 3, "nuts_samples": 4}


class Survey(NamedTuple):
    """Log radon and floor of houses, ``[J, H]``; which of these exist; log uranium of a county, ``[J]``."""

    y: Tensor
    floor: Tensor
    seen: Tensor
    uranium: Tensor


def tabulate(y: Tensor, floor: Tensor, county: Tensor, uranium: Tensor) -> Survey:
    """A row a county, padded to the largest one, from a line a house."""
    counts = county.bincount(minlength=len(uranium))
    seen = torch.arange(int(counts.max())) < counts[:, None]
    order = county.argsort(stable=True)
    # Entries of a mask count row by row, as the houses in order of their counties do.
    table, storey = torch.zeros(seen.shape), torch.zeros(seen.shape)
    table[seen], storey[seen] = y[order].float(), floor[order].float()
    return Survey(table, storey, seen, uranium.float())


def generated(seed: int = 1) -> Survey:
    """Data of the survey's shape, from :data:`TRUTH`."""
    noise = torch.Generator().manual_seed(seed)
    weights = torch.randn(COUNTIES, generator=noise).exp()  # most counties have few houses
    others = weights.multinomial(HOUSES - COUNTIES, replacement=True, generator=noise)
    county = torch.cat([torch.arange(COUNTIES), others])
    uranium = 0.4 * torch.randn(COUNTIES, generator=noise)
    level = TRUTH["intercept"] + TRUTH["uranium"] * uranium
    level = level + TRUTH["spread"] * torch.randn(COUNTIES, generator=noise)
    floor = (torch.rand(len(county), generator=noise) < 1 / 6).float()
    y = level[county] + TRUTH["floor"] * floor
    y = y + TRUTH["noise"] * torch.randn(len(county), generator=noise)
    return tabulate(y, floor, county, uranium)


def load(kind: str) -> tuple[Survey, str]:
    """The data, and in words where they are from."""
    if kind == "auto":
        kind = "arviz" if survey_on_disk() else "generated"
    if kind == "generated":
        return generated(), "generated from known values, in the shape of the survey"
    data: Any = require("arviz", "arviz", "the survey").load_arviz_data("radon")
    given, table = data["constant_data"], data["observed_data"]
    floor, county, uranium = (given[name].values for name in ("floor_idx", "county_idx", "uranium"))
    columns = (torch.as_tensor(column) for column in (table["y"].values, floor, county, uranium))
    y, floor, county, uranium = columns
    return tabulate(y, floor, county.long(), uranium), "the survey, by arviz.load_arviz_data"


def survey_on_disk() -> bool:
    """Whether ArviZ is installed and has downloaded the survey before."""
    try:
        arviz: Any = require("arviz", "arviz", "the survey")
    except ImportError:
        return False
    folder = Path(os.environ.get("ARVIZ_DATA", "~/arviz_data")).expanduser()
    return (folder / arviz.load_arviz_data()["radon"].filename).exists()


def model(survey: Survey, counties: int | None = None) -> None:
    """With ``counties`` a minibatch of so many."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
    slope = pyro.sample("uranium", dist.Normal(0.0, 10.0))
    floor = pyro.sample("floor", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.Exponential(1.0))
    noise = pyro.sample("noise", dist.Exponential(1.0))
    with pyro.plate("county", len(survey.uranium), counties, dim=-2) as rows:
        level = pyro.sample("level", dist.Normal(intercept + slope * survey.uranium[rows, None], spread))
        mean = level + floor * survey.floor[rows]
        with pyro.plate("house", survey.y.shape[1], dim=-1), poutine.mask(mask=survey.seen[rows]):
            pyro.sample("y", dist.Normal(mean, noise), obs=survey.y[rows])


def counties_plate(survey: Survey, counties: int | None = None) -> pyro.plate:
    """That of the guide, which without it would keep to the size of its first minibatch."""
    return pyro.plate("county", len(survey.uranium), counties, dim=-2)


def make_guide() -> AutoGuideList:
    """One normal of the global latents with all correlations, and one of each county by itself."""
    guide = AutoGuideList(model, create_plates=counties_plate)
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=GLOBALS), init_scale=0.1))
    guide.append(AutoNormal(poutine.block(model, hide=GLOBALS), init_scale=0.1))
    return guide


def make_losses(S: int, L: int) -> dict[str, ImportanceWeightedELBO]:
    """A loss for each of :data:`METHODS`, all of S L particles."""
    local = {"local": IWAE(L), "over": "county", "outer": MIWAE(S, 1)}
    losses = {
        "elbo": MIWAE_ELBO(M=S * L, K=1),
        "joint": IWAE_ELBO(K=S * L, estimator="dreg"),
        "levels": LocallyEnhancedELBO(**local, estimator="dreg"),
    }
    return losses | {f"{name}, minibatches": losses[name] for name in ("elbo", "levels")}


def fit(
    guide: Callable, survey: Survey, loss: ImportanceWeightedELBO, counties: int | None, args: Any, label: str
):
    """Train by clipped Adam; the learning rate falls to a hundredth."""
    optimiser = pyro.optim.ClippedAdam({"lr": args.learning_rate, "lrd": 0.01 ** (1 / args.steps)})
    svi = SVI(model, guide, optimiser, loss=loss)
    with progress_bar(args.steps, label) as bar:
        for number in range(args.steps):
            nats = step(svi, (survey, counties), args.learning_rate, number)
            bar.set_postfix_str(f"bound {-nats:.1f}", refresh=False)
            bar.update()


@torch.no_grad()
def draw_globals(guide: Callable, survey: Survey, number: int = DRAWS) -> Tensor:
    """The guide's global latents, ``[number, 5]``."""
    with pyro.plate("draws", number, dim=-3):
        nodes = poutine.trace(guide).get_trace(survey).nodes
    return torch.stack([nodes[name]["value"].flatten() for name in GLOBALS], -1)


def nuts(survey: Survey, number: int) -> tuple[Tensor, float]:
    """Draws of one chain, ``[number, 5]``, and the smallest ESS of a global latent."""
    # Levels and spread would make a funnel: counties in units of the spread do not.
    centred = poutine.reparam(model, {"level": LocScaleReparam(0.0)})
    warmup = min(250, number)
    with progress_bar(warmup + number, "NUTS") as bar, pyro.validation_enabled(False):
        kernel = NUTS(centred, max_tree_depth=6)
        options = {"warmup_steps": warmup, "disable_progbar": True}
        mcmc = MCMC(kernel, number, hook_fn=lambda *_: bar.update(), **options)
        mcmc.run(survey)
    draws = mcmc.get_samples()
    values = torch.stack([draws[name].flatten() for name in GLOBALS], -1)
    return values, effective_sample_size(values[None], chain_dim=0, sample_dim=1).min().item()


def refusal(loss: ImportanceWeightedELBO, guide: Callable, survey: Survey, counties: int) -> str:
    """What the loss says of a minibatch: the first sentence of its error."""
    try:
        loss.loss(model, guide, survey, counties)
    except ValueError as error:
        return str(error).split(". ")[0] + "."
    return ""


def run(args: argparse.Namespace) -> dict:
    """Fit, sample, compare: what ``radon.json`` holds."""
    survey, source = load(args.data)
    methods, refused = {}, ""
    for method, loss in make_losses(args.global_particles, args.local_particles).items():
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        guide = make_guide()
        counties = args.counties if "minibatches" in method else None
        start = time.perf_counter()
        fit(guide, survey, loss, counties, args, METHODS[method])
        seconds = time.perf_counter() - start
        with torch.no_grad():
            bound = -sum(loss.loss(model, guide, survey) for _ in range(10)) / 10
        if method == "joint":
            refused = refusal(loss, guide, survey, args.counties)
        methods[method] = {**moments(draw_globals(guide, survey)), "bound": bound, "seconds": seconds}
    start = time.perf_counter()
    draws, ess = nuts(survey, args.nuts_samples)
    methods["nuts"] = {**moments(draws), "ess": ess, "seconds": time.perf_counter() - start}
    size = {"counties": len(survey.uranium), "houses": int(survey.seen.sum())}
    return {"source": source, **size, "refused": refused, "methods": methods}


def moments(draws: Tensor) -> dict[str, list[float]]:
    """Means and sds."""
    return {"mean": draws.mean(0).tolist(), "sd": draws.std(0).tolist()}


def against_nuts(results: dict, method: str) -> list[tuple[float, float]]:
    """By global latent: difference of the means in sds of NUTS, and ratio of the sds."""
    own, truth = results["methods"][method], results["methods"]["nuts"]
    rows = zip(own["mean"], own["sd"], truth["mean"], truth["sd"], strict=True)
    return [((mean - centre) / unit, sd / unit) for mean, sd, centre, unit in rows]


def table(results: dict) -> str:
    """A line a method; Δ is the difference of the means in sds of NUTS, × the ratio of the sds."""
    settings, chain = results["settings"], results["methods"]["nuts"]
    lines = [
        f"{results['houses']} houses in {results['counties']} counties: {results['source']}",
        f"{'':<25}" + "".join(f"{name:^13}" for name in GLOBALS) + f"{'bound':>10}{'seconds':>9}",
        f"{'':<25}" + f"{'Δ':>7}{'×':>5} " * len(GLOBALS),
    ]
    for method, label in METHODS.items():
        own = results["methods"][method]
        cells = "".join(f"{shift:>+7.2f}{ratio:>5.2f} " for shift, ratio in against_nuts(results, method))
        lines.append(f"{label:<25}{cells}{own['bound']:>10.1f}{own['seconds']:>9.0f}")
    cells = "".join(f"{mean:>6.2f}±{sd:<5.3f} " for mean, sd in zip(chain["mean"], chain["sd"], strict=True))
    lines.append(f"{'NUTS':<25}{cells}{'':>10}{chain['seconds']:>9.0f}")
    lines.append(
        f"{settings['global_particles']} x {settings['local_particles']} particles, minibatches of "
        f"{settings['counties']} counties; ESS of NUTS {chain['ess']:.0f} of {settings['nuts_samples']}"
    )
    return "\n".join([*lines, f"joint IWAE, minibatches: refused. {results['refused']}"])


def draw(results: dict) -> Figure:
    """Means ± sds in units of those of NUTS, which is the grey band."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(-1, 1, color="0.9", label="NUTS")
    axes.axvline(0, color="0.6", linewidth=1)
    colours = {"elbo": "C0", "joint": "C1", "levels": "C2"}
    for i, (method, label) in enumerate(METHODS.items()):
        full, _, batches = method.partition(",")
        shifts, ratios = zip(*against_nuts(results, method), strict=True)
        heights = [row + 0.16 * (i - 2) for row in range(len(GLOBALS))]
        style = {"fmt": "s" if batches else "o", "color": colours[full], "markersize": 4, "capsize": 2}
        style |= {"markerfacecolor": "white"} if batches else {}
        axes.errorbar(shifts, heights, xerr=ratios, label=label, **style)
    axes.set_yticks(range(len(GLOBALS)), GLOBALS)
    axes.invert_yaxis()
    axes.set(xlabel="mean ± sd, from the mean of NUTS in its sds")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data", choices=DATA, default="auto", help="arviz: the survey, downloaded where it is not on disk")
    add("--steps", type=positive_int, default=1000, help="of each fit")
    add("--learning-rate", type=positive_float, default=0.05, help="at first; it falls to a hundredth")
    add("--global-particles", type=positive_int, default=2, help="of the global latents")
    add("--local-particles", type=positive_int, default=16, help="of a county, for each of those")
    add("--counties", type=positive_int, default=17, help="in a minibatch")
    add("--nuts-samples", type=positive_int, default=500, help="draws of NUTS after its warm-up")
    add("--seed", type=int, default=0, help="of everything random")
    add("--out", type=Path, default=Path("results/radon"), help="folder; of a smoke run, in results/smoke")
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = parse(make_parser(), argv, SMOKE)
    with in_one_line(ImportError):
        return finish(args, "radon", run, draw, table)


if __name__ == "__main__":
    main()

"""The eight schools (Rubin, 1981): a fitted guide, the same guide after importance resampling, and NUTS.

The effect of coaching on test scores in eight schools, each with an estimate y and its standard error σ::

    μ ~ Normal(0, 5),  τ ~ HalfCauchy(5),  η_j ~ Normal(0, 1),  θ_j = μ + τ η_j,  y_j ~ Normal(θ_j, σ_j)

The guide is one multivariate normal over the unconstrained latents. Fitted by IWAE it covers the skewed
posterior of log τ and so is too wide by itself: a good proposal, to be corrected by its weights. These are
Pareto-smoothed before the resampling: where k̂ is below 0.5 that changes next to nothing, and where it is not
it takes noise off the few largest weights. Try::

    python examples/eight_schools.py                       # about two minutes on one core
    python examples/eight_schools.py --K 1 --seed 3        # the ELBO: the evidence falls short, unseen by k̂
    python -c "import arviz as az; print(az.summary('results/eight-schools/posterior.nc'))"
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS, SVI
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_iw import IWAE_ELBO, ImportanceSampler
from pyro_iw._support.optional import require
from shared.options import at_smoke_size, new_parser, positive_int
from shared.running import in_one_line, progress_bar, smoke_apart

SCHOOLS = list("ABCDEFGH")
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
NAMES = ["mu", "tau", *(f"theta[{school}]" for school in SCHOOLS)]
METHODS = {"guide": "guide alone", "importance": "guide + weights", "nuts": "NUTS"}
FILES = ("eight_schools.json", "eight_schools.png", "posterior.nc")
# What the picture shows: τ has no negative values, which its mean less an sd may be.
QUANTILES = {"low": 0.05, "median": 0.5, "high": 0.95}
WARMUP = 500
SMOKE = {"steps": 20, "K": 4, "num_particles": 200, "nuts_samples": 20}


def model(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def fit(steps: int, K: int, learning_rate: float = 0.02) -> AutoMultivariateNormal:
    """A guide fitted to the schools; the learning rate falls to a tenth."""
    guide = AutoMultivariateNormal(model, init_scale=0.3)
    optimiser = pyro.optim.ClippedAdam({"lr": learning_rate, "lrd": 0.1 ** (1 / steps)})
    # Many particles inside the logarithm leave the plain gradient of a guide little signal.
    svi = SVI(model, guide, optimiser, loss=IWAE_ELBO(K=K, estimator="dreg"))
    with progress_bar(steps, f"IWAE-{K}") as bar:
        for _ in range(steps):
            loss = svi.step(EFFECTS, ERRORS)
            bar.set_postfix_str(f"bound {-loss:.2f}", refresh=False)
            bar.update()
    return guide


def nuts(num_samples: int) -> tuple[dict[str, Tensor], float, int]:
    """Draws of one chain, their smallest ESS over all of :data:`NAMES`, and the number of divergences."""
    warmup = min(WARMUP, num_samples)
    options = {"warmup_steps": warmup, "disable_progbar": True}
    with progress_bar(warmup + num_samples, "NUTS") as bar, pyro.validation_enabled(False):
        kernel = NUTS(model, target_accept_prob=0.9)
        mcmc = MCMC(kernel, num_samples, hook_fn=lambda *_: bar.update(), **options)
        mcmc.run(EFFECTS, ERRORS)
    draws = mcmc.get_samples()
    ess = effective_sample_size(quantities(draws)[None], chain_dim=0, sample_dim=1).min().item()
    return draws, ess, sum(map(len, mcmc.diagnostics()["divergences"].values()))


def quantities(draws: Mapping[str, Tensor]) -> Tensor:
    """Draws ``[n, 10]`` of what the table shows, from those of the latent sites."""
    mu, tau = draws["mu"].reshape(-1, 1), draws["tau"].reshape(-1, 1)
    return torch.cat([mu, tau, mu + tau * draws["eta"]], 1)


def compare(draws: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, dict[str, float]]]:
    """By quantity and method: ``mean``, ``sd``, ``shift`` of the mean in NUTS's sds, ``ratio`` of the sds.

    And the quantiles of :data:`QUANTILES`, by name.
    """
    drawn = {m: quantities(given).double() for m, given in draws.items()}
    moments = {m: torch.std_mean(values, 0) for m, values in drawn.items()}
    unit, centre = moments["nuts"]
    levels = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    columns = {
        method: {"mean": mean, "sd": sd, "shift": (mean - centre) / unit, "ratio": sd / unit}
        | dict(zip(QUANTILES, drawn[method].quantile(levels, 0), strict=True))
        for method, (sd, mean) in moments.items()
    }
    return {
        name: {m: {key: x[i].item() for key, x in column.items()} for m, column in columns.items()}
        for i, name in enumerate(NAMES)
    }


def run(args: argparse.Namespace) -> tuple[dict, Any]:
    """Fit, weigh and compare: what ``eight_schools.json`` holds, and the posterior as ArviZ takes it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    start = time.perf_counter()
    guide = fit(args.steps, args.K)
    samples = ImportanceSampler(model, guide, args.num_particles, chunk_size=2000)(EFFECTS, ERRORS)
    posterior = samples.smoothed().to_arviz(num_samples=args.nuts_samples, coords={"school": SCHOOLS})
    resampled = {name: torch.as_tensor(posterior["posterior"][name].values[0]) for name in samples.values}
    fitted = time.perf_counter()
    reference, nuts_ess, divergences = nuts(args.nuts_samples)
    draws = {"guide": samples.values, "importance": resampled, "nuts": reference}
    ess, size = samples.ess.item(), samples.num_particles
    weights = {"particles": size, "ess": ess, "khat": samples.khat.item()}
    weights |= {"log_evidence": samples.log_marginal.item(), "error": samples.monte_carlo_error.item()}
    return {
        "settings": {**vars(args), "out": str(args.out)},
        "weights": weights,
        "nuts": {"draws": args.nuts_samples, "ess": nuts_ess, "divergences": divergences},
        "quantities": compare(draws),
        "seconds": {"weights": fitted - start, "nuts": time.perf_counter() - fitted},
    }, posterior


def table(results: dict) -> str:
    """Means and sds side by side; Δ is the difference of the means in sds of NUTS, × the ratio of the sds."""
    lines = [
        " " * 10 + "".join(f"{label:^33}" for label in METHODS.values()),
        " " * 10 + f"{'mean':>9}{'sd':>8}{'Δ':>8}{'×':>8}" * 2 + f"{'mean':>9}{'sd':>8}",
    ]
    for name, row in results["quantities"].items():
        cells = [f"{x['mean']:9.2f}{x['sd']:8.2f}{x['shift']:+8.2f}{x['ratio']:8.2f}" for x in row.values()]
        # NUTS is the last, and compared with itself.
        lines.append(f"{name:<10}" + "".join(cells)[:-16])
    weights, chain, seconds = results["weights"], results["nuts"], results["seconds"]
    return "\n".join(lines) + (
        f"\n\nk̂ {weights['khat']:.2f}, ESS {weights['ess']:.0f} of {weights['particles']}, log evidence "
        f"{weights['log_evidence']:.3f} ± {weights['error']:.3f}; {seconds['weights']:.0f} s with the fit\n"
        f"NUTS: ESS {chain['ess']:.0f} of {chain['draws']}, {chain['divergences']} divergences"
        f"; {seconds['nuts']:.0f} s"
    )


def save_figure(results: dict, path: Path) -> None:
    """Median of every quantity, and what 90 % of the draws lie between, a line for each method."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for i, (method, label) in enumerate(METHODS.items()):
        rows = [row[method] for row in results["quantities"].values()]
        heights = [j + 0.22 * (i - 1) for j in range(len(rows))]
        low, median, high = (torch.tensor([row[key] for row in rows]) for key in QUANTILES)
        bars = torch.stack([median - low, high - median])
        style = {"fmt": "osD"[i], "markersize": 4, "capsize": 2, "color": f"C{i}"}
        axes.errorbar(median.numpy(), heights, xerr=bars.numpy(), label=label, **style)
    axes.set_yticks(range(len(NAMES)), NAMES)
    axes.invert_yaxis()
    axes.set(xlabel="posterior median, and quantiles of 5 % and 95 % [points]")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=100)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=positive_int, default=2000, help="of the fit")
    add("--K", type=positive_int, default=16, help="particles of the IWAE bound; 1 is the ELBO")
    add("--num-particles", type=positive_int, default=20_000, help="draws from the guide to be weighted")
    add("--nuts-samples", type=positive_int, default=3000, help="draws of NUTS, and of the resampling")
    add("--seed", type=int, default=0, help="of everything random")
    add(
        "--out",
        type=Path,
        default=Path("results/eight-schools"),
        help="folder for the results; of a smoke run, in results/smoke",
    )
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    return smoke_apart(parser, at_smoke_size(parser.parse_args(argv), SMOKE))


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with in_one_line(OSError, ImportError):
        require("arviz", "arviz", "posterior.nc")  # now, and not only after the fit
        args.out.mkdir(parents=True, exist_ok=True)
        results, posterior = run(args)
        (args.out / FILES[0]).write_text(json.dumps(results, indent=2) + "\n")
        posterior.to_netcdf(str(args.out / FILES[2]))
        save_figure(results, args.out / FILES[1])
    print(table(results), *(args.out / name for name in FILES), sep="\n")
    return results


if __name__ == "__main__":
    main()

"""A VAE on tables with missing values, and imputation by importance weights (Mattei & Frellsen, 1812.02633).

Half of a table's values are deleted at random. The likelihood is masked where they were, so the bound of a
row is one on the evidence of what is left of it, and nothing has to be filled in to train. The weights of
particles z from the guide then turn the decoder into the distribution of what is missing, given what is not::

    p(missing | observed) ≈ Σ_k w_k p(missing | z_k) / Σ_k w_k

Resampling z by weight and drawing from p(missing | z) gives multiple imputations. (What the paper calls
MIWAE is IWAE on masked data, and not the bound with M groups.) Try::

    python examples/missing_data.py                            # a minute
    python examples/missing_data.py --data wine --missing 0.3

Columns are standardised by their observed values; RMSE and log-likelihood are those of a missing value.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from pyro_iw import ImportanceSampler, ImportanceSamples
from shared.networks import mlp
from shared.options import loss_of, positive_int, unit_interval
from shared.skeleton import finish, fit, parse, training_parser

DATA = ("breast-cancer", "wine", "diabetes")
SMOKE = {"epochs": 2, "num_particles": 50, "hidden": 16}
LEVELS = [i / 20 for i in range(1, 20)]
DRAWS = 200
ROWS = 100  # that are imputed at once


def load(name: str, missing: float, seed: int) -> tuple[Tensor, Tensor]:
    """A standardised table ``[N, D]``, and which of its values are observed, of the same shape."""
    from sklearn import datasets

    table = torch.tensor(getattr(datasets, f"load_{name.replace('-', '_')}")().data, dtype=torch.float32)
    observed = torch.rand(table.shape, generator=torch.Generator().manual_seed(seed)) >= missing
    seen = table.masked_fill(~observed, torch.nan)
    centre = seen.nanmean(0)
    spread = (seen - centre).square().nanmean(0).sqrt()
    if not bool((spread > 0).all()):
        raise SystemExit(f"error: a column of {name} has no two different observed values: lower --missing")
    return (table - centre) / spread, observed


class TableVAE(nn.Module):
    """p(z) = N(0, I), p(x | z) a Student's t for each of the D columns, and the guide q(z | observed)."""

    def __init__(self, columns: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = mlp(2 * columns, hidden, hidden, 2 * latent)
        self.decoder = mlp(latent, hidden, hidden, 3 * columns)

    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        """The columns' distributions, of batch shape ``[*leading, D]`` for z ``[*leading, latent]``."""
        loc, scale, df = self.decoder(z).chunk(3, -1)
        return dist.StudentT(3 + F.softplus(df), loc, 0.01 + F.softplus(scale))

    def model(self, x: Tensor, observed: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(z).mask(observed).to_event(1), obs=x)

    def guide(self, x: Tensor, observed: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            # Zero is the mean of a column; the mask tells it from a value that happens to be zero.
            seen = torch.cat([x * observed, observed.to(x.dtype)], -1)
            loc, log_scale = self.encoder(seen).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def particles(vae: TableVAE, x: Tensor, observed: Tensor, num_particles: int) -> Iterator[ImportanceSamples]:
    """Weighted particles for the table, some rows at a time."""
    for rows in torch.arange(len(x)).split(ROWS):
        yield ImportanceSampler(vae.model, vae.guide, num_particles, progress=False)(x[rows], observed[rows])


@torch.no_grad()
def impute(vae: TableVAE, x: Tensor, observed: Tensor, num_particles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the values given what is observed, log densities at ``x``, ``[N, D]``, and ESS, ``[N]``."""
    parts = []
    for samples, truth in zip(particles(vae, x, observed, num_particles), x.split(ROWS), strict=True):
        mean = samples.expectation(lambda draws: vae.likelihood(draws["z"]).mean, event_dim=1)
        columns = vae.likelihood(samples.values["z"])
        log_prob = (samples.weights.log().unsqueeze(-1) + columns.log_prob(truth)).logsumexp(0)
        parts.append((mean, log_prob, samples.ess))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@torch.no_grad()
def impute_many(vae: TableVAE, x: Tensor, observed: Tensor, num_particles: int, num_draws: int) -> Tensor:
    """Multiple imputations, ``[num_draws, N, D]``: z resampled by weight, then drawn from p(x | z)."""
    drawn = []
    for samples in particles(vae, x, observed, num_particles):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*effective particles")  # the table says in how many rows
            drawn.append(vae.likelihood(samples.posterior(num_draws)["z"]).sample())
    return torch.where(observed, x, torch.cat(drawn, 1))


def iterative(x: Tensor, observed: Tensor) -> Tensor:
    """scikit-learn's iterative imputer: each column from the others, by ridge regression."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401 - makes the next one importable
    from sklearn.impute import IterativeImputer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it goes round in small circles
        filled = IterativeImputer(random_state=0).fit_transform(x.masked_fill(~observed, torch.nan).numpy())
    return torch.from_numpy(filled).float()


def run(args: argparse.Namespace) -> dict:
    """Train, impute and compare: what ``missing_data.json`` holds."""
    x, observed = load(args.data, args.missing, args.seed)
    missing = ~observed

    def rmse(imputed: Tensor) -> float:
        return (imputed - x)[missing].square().mean().sqrt().item()

    vae = TableVAE(x.shape[1], args.latent, args.hidden)
    history = fit(vae.model, vae.guide, (x, observed), loss_of(args), args, f"{args.loss} on {args.data}")
    methods = {"column means": (torch.zeros_like(x), dist.Normal(0.0, 1.0).log_prob(x))}
    sizes = [4**i for i in range((args.num_particles.bit_length() + 1) // 2)]
    for size in sizes:
        *methods[f"weights, {size}"], ess = impute(vae, x, observed, size)
    results = {
        name: {"rmse": rmse(mean), "log_prob": log_prob[missing].mean().item()}
        for name, (mean, log_prob) in methods.items()
    }
    results["iterative ridge"] = {"rmse": rmse(iterative(x, observed))}
    ranks = (impute_many(vae, x, observed, sizes[-1], DRAWS) < x).float().mean(0)[missing]
    return {
        "table": {"rows": len(x), "columns": x.shape[1], "missing": missing.float().mean().item()},
        "history": history,
        "results": results,
        "ess": {"median": ess.median().item(), "below 10": (ess < 10).float().mean().item()},
        "coverage": [((ranks - 0.5).abs() <= level / 2).float().mean().item() for level in LEVELS],
    }


def draw(results: dict) -> Figure:
    """The error over the number of particles, and how many values the intervals of the draws cover."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    errors = {name: numbers["rmse"] for name, numbers in results["results"].items()}
    sizes = {int(name.split()[1]): error for name, error in errors.items() if name.startswith("weights")}
    left.plot(list(sizes), list(sizes.values()), "o-", label="VAE, weighted particles")
    for i, name in enumerate(("column means", "iterative ridge"), 1):
        left.axhline(errors[name], color=f"C{i}", linestyle="--", label=name)
    left.set_xscale("log", base=4)
    left.set_xticks(list(sizes), list(sizes))
    left.set(xlabel="particles", ylabel="RMSE of a missing value [sd]", ylim=(0, None))
    left.legend()
    left.grid(alpha=0.3)
    right.plot([0, 1], [0, 1], color="grey", linewidth=1)
    right.plot(LEVELS, results["coverage"], "o-", markersize=4)
    right.set(xlabel="central interval of the multiple imputations", ylabel="share of missing values inside")
    right.grid(alpha=0.3)
    return figure


def table(results: dict) -> str:
    """A line for each way to impute."""
    lines = [f"{'':<18}{'RMSE':>8}{'log-lik':>10}"]
    for name, numbers in results["results"].items():
        log_prob = f"{numbers['log_prob']:10.3f}" if "log_prob" in numbers else ""
        lines.append(f"{name:<18}{numbers['rmse']:8.3f}{log_prob}")
    ess = results["ess"]
    lines.append(f"ESS {ess['median']:.0f} in the median row, below 10 in {ess['below 10']:.0%} of them")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    defaults = {"loss": "iwae", "M": 1, "K": 20, "estimator": "dreg", "epochs": 300, "batch_size": 64}
    parser = training_parser(__doc__, "results/missing-data", learning_rate=3e-3, **defaults)
    add = parser.add_argument
    add("--data", choices=DATA, default="breast-cancer", help="one of scikit-learn's tables")
    add("--missing", type=unit_interval, default=0.5, help="share of values to delete")
    add("--latent", type=positive_int, default=10, help="dimension of z")
    add("--hidden", type=positive_int, default=128, help="width of the hidden layers")
    add("--num-particles", type=positive_int, default=1024, help="to impute with, at most")
    return finish(parse(parser, argv, SMOKE), "missing_data", run, draw, table)


if __name__ == "__main__":
    main()

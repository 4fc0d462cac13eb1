"""Runs a pair through the package and the reference, and says how they compare."""

from __future__ import annotations

import math
import random
import re
import warnings
from dataclasses import dataclass, field

import pyro
import pyro.poutine as poutine
import torch

from pyro_iw import ImportanceSampler, ImportanceWeightedELBO, LocallyEnhancedELBO
from pyro_iw.bounds import IWAE
from pyro_iw.sequences.protocol import Protocol, read_sequences

from .bounds import BOUNDS, Formula, has_ovis, lme
from .draw import make_pair
from .families import DISCRETE
from .filters import Loop, make_loss, make_steps
from .levels import Levels, local_particles
from .reference import Reference, Refuse
from .replay import log_prob, plates, run

ESTIMATORS = ["reparam", "stl", "dreg", "score", "vimco", "ovis", "rws"]
WAYS = ["vectorized", "vectorized", "one by one", "chunks", "subset"]
# Warnings that speak of something else than a difference from the reference.
BENIGN = [
    "are observed in the guide",
    "one joint importance weight",
    "effective particles",
    "normaliser of that tempered",
    "Pareto",
]


@dataclass
class Outcome:
    """What became of the checks of one pair."""

    seed: int
    agreed: int = 0
    refused: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class Disagreement(Exception):
    """The package and the reference differ, and where."""


class Recorder(poutine.messenger.Messenger):
    """Runs a guide and keeps the values of its sites, run by run."""

    def __init__(self, guide):
        super().__init__()
        self.fn = guide
        self.runs = []

    def __call__(self, *args, **kwargs):
        before = torch.get_rng_state()
        self.found = {}
        with self:
            result = self.fn(*args, **kwargs)
        # A run that draws nothing only repeats another one, and so does one from the same random state.
        known = any(torch.equal(before, other) for other, _ in self.runs)
        if not known and not torch.equal(before, torch.get_rng_state()):
            self.runs.append((before, self.found))
        return result

    def _pyro_post_sample(self, msg):
        if not msg["is_observed"]:
            self.found[msg["name"]] = (msg["value"].detach(), type(msg["fn"]).__name__ == "_Subsample")

    def particles(self, sizes, vectorized):
        """The particles of the runs, which hold so many each."""
        assert len(self.runs) == len(sizes), f"{len(self.runs)} runs of the guide for {len(sizes)}"
        return [
            {
                name: value if is_minibatch or size == 1 or not vectorized else value[i]
                for name, (value, is_minibatch) in found.items()
            }
            for size, (_, found) in zip(sizes, self.runs, strict=True)
            for i in range(size)
        ]


def check(seed: int, compiled: bool = False) -> Outcome:
    """Check one pair in a handful of ways."""
    outcome, pair, r = Outcome(seed), make_pair(seed), random.Random(-seed - 1)
    if compiled:
        check_loss(outcome, pair, r, "compiled")
        return outcome
    check_loss(outcome, pair, r, r.choice(WAYS))
    if seed % 3 == 0:
        check_filters(outcome)
    if pair.has_levels and r.random() < 0.3:
        r.choice([check_levels, check_levels, check_local_sampler])(outcome, pair, r)
    elif r.random() < 0.5:
        check_loss(outcome, pair, r, r.choice(WAYS))
    else:
        check_sampler(outcome, pair, r)
    return outcome


def _chunks(total, size):
    return [min(size, total - start) for start in range(0, total, size)]


def _keep(pair, r):
    """What plates= gets: mostly nothing."""
    if r.random() < 0.9:
        return None
    return tuple(plate.name for plate in pair.plates if r.random() < 0.5)


def check_loss(outcome, pair, r, way):
    """A loss and its gradients."""
    bound = BOUNDS[r.choice(list(BOUNDS))](r)
    discrete = any(s.guide_family in (*DISCRETE, "through") for s in pair.sites)
    estimators = ["score", "vimco", "ovis", "rws"]
    estimator = r.choice(estimators if discrete and r.random() < 0.85 else ESTIMATORS)
    if (estimator in ("vimco", "rws") and bound.K == 1) or (estimator == "ovis" and not has_ovis(bound)):
        estimator = "score"
    kl_weight = 0.5 if r.random() < 0.15 else 1.0
    S, keep = bound.M * bound.K, _keep(pair, r)
    some = r.randint(1, S)
    options, sizes = {
        "vectorized": ({}, [S]),
        "compiled": ({"compile": True}, [S]),
        "one by one": ({"vectorize_particles": False}, [1] * S),
        "chunks": ({"chunk_size": some}, _chunks(S, some)),
        "subset": ({"backward_particles": some}, [S]),
    }[way]
    guide, noise = Recorder(pair.guide), r.randrange(2**31)
    options |= {"estimator": estimator, "plates": keep}
    loss = ImportanceWeightedELBO(bound.package, kl_weight=kl_weight, **options)

    def step():
        torch.manual_seed(noise)
        for leaf in leaves().values():
            leaf.grad = None
        return loss.loss_and_grads(pair.model, guide)

    def compare():
        first = step()
        if way == "compiled":
            guide.runs = guide.runs[-1:]  # the second step need not run the guide
        else:
            guide.runs.clear()  # of probes and the first step
        second = step()
        if not (first == second or way == "compiled" or math.isnan(first)):
            raise Disagreement(f"the first run gives {first}, the next {second}")
        particles = guide.particles(sizes, way != "one by one")
        params = leaves()
        grads = {name: leaf.grad for name, leaf in params.items()}
        truth = Reference(pair, particles, kl_weight, bound.linear, keep)
        size = largest(truth.log_w)
        same(pair, "loss", torch.tensor(second, dtype=torch.float64), truth.loss(bound), size)
        right = truth.gradients(bound, estimator, list(params.values()))
        if way == "subset" and some < S:
            return
        size = max(map(largest, right), default=1.0)
        for (name, grad), wanted in zip(grads.items(), right, strict=True):
            same(pair, f"d loss / d {name}", wanted * 0 if grad is None else grad, wanted, size)

    judge(outcome, pair, f"{loss!r} kl_weight={kl_weight}", estimator, compare)


def check_levels(outcome, pair, r):
    """A loss on two levels of particles and its gradients, of one plate."""
    while True:  # the reference runs the pair for each of the particles
        outer = BOUNDS[r.choice(list(BOUNDS))](r)
        inner = BOUNDS[r.choice([name for name in BOUNDS if name != "PIWAE"])](r)
        if outer.M * outer.K * inner.M * inner.K <= 12:
            break
    over = r.choice(pair.plates).name
    discrete = any(s.guide_family in DISCRETE for s in pair.sites)
    estimator = r.choice(["score", "vimco", "ovis"] if discrete and r.random() < 0.85 else ESTIMATORS[:-1])
    if estimator == "ovis" and not all(has_ovis(b) or b.K == 1 for b in (outer, inner)):
        estimator = "vimco"
    S, L, kl_weight = outer.M * outer.K, inner.M * inner.K, 0.5 if r.random() < 0.15 else 1.0
    chunk_size = r.randint(1, S) if r.random() < 0.3 else S
    options = {"estimator": estimator, "kl_weight": kl_weight, "chunk_size": chunk_size}
    guide, noise = Recorder(pair.guide), r.randrange(2**31)
    loss = LocallyEnhancedELBO(inner.package, over, outer.package, **options)

    def compare():
        for _ in range(2):
            torch.manual_seed(noise)
            guide.runs.clear()  # of probes and the first step
            for leaf in leaves().values():
                leaf.grad = None
            value = loss.loss_and_grads(pair.model, guide)
        sizes = _chunks(S, chunk_size)
        assert len(guide.runs) == len(sizes), f"{len(guide.runs)} runs of the guide for {len(sizes)}"
        particles = []
        for size, (_, found) in zip(sizes, guide.runs, strict=True):
            particles += local_particles(found, size, L)
        truth = Levels(pair, over, particles, kl_weight)
        size = sum(map(largest, truth.log_w))
        same(pair, "loss", torch.tensor(value, dtype=torch.float64), truth.loss(outer, inner), size)
        params = leaves()
        right = truth.gradients(outer, inner, estimator, list(params.values()))
        size = max(map(largest, right), default=1.0)
        for (name, leaf), wanted in zip(params.items(), right, strict=True):
            same(pair, f"d loss / d {name}", wanted * 0 if leaf.grad is None else leaf.grad, wanted, size)

    judge(outcome, pair, f"{loss!r}", estimator, compare)


def _drawn(sampler, guide, noise):
    """The evidence, and samples on the same noise; the guide's recorded runs are those of the latter."""
    torch.manual_seed(noise)
    marginal = sampler.log_marginal()
    torch.manual_seed(noise)
    guide.runs.clear()
    return marginal, sampler()


def check_local_sampler(outcome, pair, r):
    """Weights on two levels and an expectation of local latents."""
    S, L, over, noise = r.randint(2, 4), r.randint(1, 3), r.choice(pair.plates).name, r.randrange(2**31)
    chunk_size, guide = r.randint(1, S), Recorder(pair.guide)
    options = {"chunk_size": chunk_size, "local": over, "num_local": L}
    sampler = ImportanceSampler(pair.model, guide, S, progress=False, **options)

    @torch.no_grad()
    def compare():
        marginal, samples = _drawn(sampler, guide, noise)
        particles = []
        for size, (_, found) in zip(_chunks(S, chunk_size), guide.runs, strict=True):
            particles += local_particles(found, size, L)
        truth = Levels(pair, over, particles, 1.0)
        size = sum(map(largest, truth.log_w))
        log_w = truth.total(Formula(IWAE(L), lambda log_w: lme(log_w, (0, 1))), *truth.log_w)
        same(pair, "log_weights", samples.log_weights, log_w, size)
        same(pair, "log_marginal", marginal, torch.logsumexp(log_w, 0) - math.log(S), size)
        local = torch.softmax(truth.log_w[1], 1)
        above = torch.softmax(log_w, 0)
        for i, name in enumerate(truth.cells):
            above = above if name in truth.kept else above.unsqueeze(1 + i)
        ess = (above * 1 / local.square().sum(1)).sum(0)
        same(pair, "local_ess", samples.local_ess[over], ess, size * L)
        inside = [n for n in samples.latents if samples.plate_of(n) and not samples.latents[n].event_dim]
        for name in inside:
            values = [one[name] for row in particles for one in row]
            values = [one.reshape([1] * truth.rank + [*one.shape])[(0,) * one.dim()] for one in values]
            drawn = torch.stack(values).to(local.dtype)
            drawn = drawn.reshape(S, L, *drawn.shape[1:])
            shape = [1] * truth.rank
            for cell in truth.cells:
                shape[truth.frames[cell].dim] = truth.frames[cell].size
            weights = (above.unsqueeze(1) * local).reshape(S, L, *shape)
            wanted = (weights * drawn).sum((0, 1))
            got = samples.expectation(name)
            same(pair, f"expectation of {name}", got, wanted.reshape(got.shape), largest(drawn))

    judge(outcome, pair, f"ImportanceSampler({S}, {options})", "", compare)


def check_filters(outcome):
    """A filter's loss and its gradients, of a pair of sequences."""
    seed = outcome.seed
    pair, r = make_steps(seed), random.Random(-seed - 1)
    loss, kl_weight = make_loss(pair, r)

    def compare():
        sequences = read_sequences([range(pair.T)], {})
        torch.manual_seed(seed)
        filtered, estimate = loss._estimate(
            Protocol(pair.part("model"), pair.part("guide")), sequences, kl_weight
        )
        truth = Loop(pair, filtered, loss, kl_weight)
        same(pair, "loss", estimate.loss.detach(), -truth.bound, largest(truth.bound))
        params = list(pair.params.values())
        got, wanted = (
            torch.autograd.grad(total, params, materialize_grads=True, allow_unused=True)
            for total in (estimate.loss, -truth.surrogate)
        )
        size = max(map(largest, wanted))
        for name, one, other in zip(pair.params, got, wanted, strict=True):
            same(pair, f"d loss / d {name}", one, other, size)

    judge(outcome, pair, repr(loss), "", compare)


def check_sampler(outcome, pair, r):
    """The importance sampler and, at times, what it gives to ArviZ."""
    S, vectorize, keep, noise = r.randint(2, 6), r.random() < 0.7, _keep(pair, r), r.randrange(2**31)
    options = {"chunk_size": r.randint(1, S), "vectorize_particles": vectorize, "plates": keep}
    guide = Recorder(pair.guide)
    sampler = ImportanceSampler(pair.model, guide, S, progress=False, **options)
    arviz = r.random() < 0.3

    @torch.no_grad()
    def compare():
        marginal, samples = _drawn(sampler, guide, noise)
        sizes = _chunks(S, options["chunk_size"]) if vectorize else [1] * S
        particles = guide.particles(sizes, vectorize)
        truth = Reference(pair, particles, keep=keep)
        log_w = truth.log_w
        size = largest(log_w)
        same(pair, "log_weights", samples.log_weights, log_w, size)
        same(pair, "log_marginal", marginal, torch.logsumexp(log_w, 0) - math.log(S), size)
        weights = torch.softmax(log_w, 0)
        same(pair, "ess", samples.ess, 1 / weights.square().sum(0), size * S)
        name = r.choice(list(samples.latents))
        event_dim = samples.latents[name].event_dim
        rank = min(particle[name].dim() for particle in particles)
        values = [x[name].reshape(x[name].shape[x[name].dim() - rank :]) for x in particles]
        values = torch.stack(values).to(log_w.dtype)
        rank = values.dim() - 1 - event_dim
        shape = [1] * rank
        for frame in truth.kept:
            shape[frame.dim] = frame.size
        placed = weights.reshape(S, *shape, *[1] * event_dim)
        got = samples.expectation(name)
        wanted = (placed * values).sum(0)
        same(pair, f"expectation of {name}", got, wanted.reshape(got.shape), largest(values))
        if arviz:
            check_arviz(pair, samples, particles[0], truth)

    judge(outcome, pair, f"ImportanceSampler({S}, {options})", "", compare)


def check_arviz(pair, samples, minibatch, truth):
    """Draws are particles, and the log-likelihood that of the model at each draw."""
    data = samples.to_arviz(num_samples=3, log_likelihood=not pair.enumerated, predictive=not pair.enumerated)
    draws = {name: torch.as_tensor(data.posterior[name].values)[0] for name in samples.latents}
    weights = torch.as_tensor(data.sample_stats["log_weight"].values)[0]
    nearest = (weights[:, None] - truth.log_w[None]).abs()
    if nearest.min(1).values.max() > 1e-3:
        raise Disagreement("to_arviz: log_weight holds none of the particles'")
    if pair.enumerated:
        return
    sites = None
    for i in range(3):
        values = {**minibatch, **{name: draw[i] for name, draw in draws.items()}}
        sites = run(pair.model, values)
        for name, site in sites.items():
            if site["is_observed"] and type(site["fn"]).__name__ != "Unit":
                wanted = log_prob(site, [site["mask"]])
                got = torch.as_tensor(data.log_likelihood[name].values)[0, i]
                size = largest(wanted)
                same(pair, f"log_likelihood of {name}", got, wanted.reshape(got.shape), size)
                dims = [frame.name for frame in sorted(plates(site).values(), key=lambda f: f.dim)]
                found = [dim for dim in data.log_likelihood[name].dims[2:] if dim in dims]
                if found != dims:
                    raise Disagreement(f"to_arviz: dims {found} of {name!r} for {dims}")


def leaves():
    return dict(sorted(pyro.get_param_store().named_parameters()))


def largest(tensor):
    """The order of magnitude that rounding is relative to."""
    return 1 + torch.nan_to_num(tensor.abs(), posinf=0.0).max().item()


def same(pair, what, got, wanted, size):
    """Raise Disagreement unless equal to rounding."""
    tolerance = size * (1e-9 if pair.dtype == torch.float64 else 1e-3)
    if got.shape != wanted.shape:
        raise Disagreement(f"{what} has shape {tuple(got.shape)} for {tuple(wanted.shape)}")
    equal = got == wanted  # infinities among them
    if not bool((equal | ((got - wanted).abs() <= tolerance)).all()):
        raise Disagreement(f"{what} is {got.tolist()} for {wanted.tolist()}")


def judge(outcome, pair, what, estimator, compare):
    """Run a comparison and put down what came of it."""
    reason = pair.improper.get(estimator) or pair.improper.get("")
    told, problem = [], ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pyro.enable_validation(pair.validate)
        try:
            pair.start()
            compare()
        except Refuse as error:
            problem = f"passes though {error}"
        except Disagreement as error:
            problem = str(error)
        except (ValueError, NotImplementedError) as error:
            if names_something(str(error), pair):
                outcome.refused.append(str(error))
                return
            problem = f"refused without a name: {type(error).__name__}: {error}"
        except Exception as error:
            problem = f"crashed: {type(error).__name__}: {error}"
        finally:
            pyro.enable_validation(True)
            told = [str(warning.message) for warning in caught]
    told = [text for text in told if names_something(text, pair) and not any(b in text for b in BENIGN)]
    if reason:
        problem = f"passes without a word though {reason}" + (problem and f" ({problem})")
    if not problem:
        outcome.agreed += 1
    elif told:
        outcome.warned.append(told[0])
    else:
        outcome.failed.append(f"seed {pair.seed}, {what} {pair.traits}: {problem}")


def names_something(message, pair):
    # Terms of enumerated sites are named by all that has gone into them: 'z0 + x1'.
    names = [*pair.names, "_Auto"]
    return any(re.search(rf"['\"]([\w +]* )?{name}\w*[ +.'\"]", message) for name in names)

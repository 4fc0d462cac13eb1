"""Runs a pair through the package and the reference, and says how they compare."""

from __future__ import annotations

import math
import random
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field

import pyro
import pyro.poutine as poutine
import torch

import pyro_iw
from pyro_iw import ImportanceSampler, ImportanceWeightedELBO

from .bounds import BOUNDS
from .pairs import Pair, make_pair
from .reference import Reference, Refuse

ESTIMATORS = ["reparam", "stl", "dreg", "score", "vimco", "rws"]
WAYS = ["vectorized", "one by one", "chunks"]


@dataclass
class Outcome:
    """What became of the checks of one pair."""

    seed: int
    agreed: int = 0
    refused: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


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
            self.fn(*args, **kwargs)
        # A run that draws nothing only repeats another one, and so does one from the same random state.
        known = any(torch.equal(before, other) for other, _ in self.runs)
        if not known and not torch.equal(before, torch.get_rng_state()):
            self.runs.append((before, self.found))

    def _pyro_post_sample(self, msg):
        if not msg["is_observed"]:
            is_minibatch = type(msg["fn"]).__name__ == "_Subsample"
            event_dim = 1 if is_minibatch else msg["fn"].event_dim
            self.found[msg["name"]] = (msg["value"].detach(), is_minibatch, event_dim)

    def particles(self, sizes, vectorized):
        """The particles of the runs, which hold so many each."""
        assert len(self.runs) == len(sizes), f"{len(self.runs)} runs of the guide for {len(sizes)}"
        return [
            {
                name: value if is_minibatch or size == 1 or not vectorized else value[i]
                for name, (value, is_minibatch, _) in found.items()
            }
            for size, (_, found) in zip(sizes, self.runs, strict=True)
            for i in range(size)
        ]


def check(seed: int) -> Outcome:
    """Check one pair in a handful of ways."""
    outcome = Outcome(seed)
    pair = make_pair(seed)
    r = random.Random(-seed - 1)
    for _ in range(2):
        compare(outcome, pair, r)
    return outcome


def compare(outcome, pair, r):
    pyro.clear_param_store()
    name = r.choice(list(BOUNDS))
    bound = BOUNDS[name](r)
    discrete = any(s.guide_family in ("bernoulli", "poisson", "geometric", "categorical", "onehot", "through", "bits") for s in pair.sites)
    estimator = r.choice(["score", "vimco", "rws"] if discrete and r.random() < 0.8 else ESTIMATORS)
    if estimator in ("vimco", "rws") and bound.K == 1:
        estimator = "score"
    way = r.choice(WAYS)
    kl_weight = 0.5 if r.random() < 0.15 else 1.0
    S = bound.M * bound.K
    chunk = r.randint(1, S)
    options = {"vectorized": {}, "one by one": {"vectorize_particles": False}, "chunks": {"chunk_size": chunk}}
    sizes = {"vectorized": [S], "one by one": [1] * S}.get(way) or [
        min(chunk, S - start) for start in range(0, S, chunk)
    ]
    loss = ImportanceWeightedELBO(bound.package, estimator=estimator, kl_weight=kl_weight, **options[way])
    what = f"{bound.package} {estimator} {way} {options[way]} kl_weight={kl_weight}"
    guide = Recorder(pair.guide)
    noise = r.randrange(2**31)

    def run():
        guide.runs.clear()
        torch.manual_seed(noise)
        for leaf in leaves():
            leaf.grad = None
        return loss.loss_and_grads(pair.model, guide)

    def package():
        first, again = run(), run()
        assert first == again or math.isnan(first), f"the first run gives {first}, the next {again}"
        return again, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves()]

    def reference():
        particles = guide.particles(sizes, way != "one by one")
        truth = Reference(pair.model, pair.guide, particles, pair.enumerated, kl_weight, bound.linear)
        return truth.loss(bound).item(), truth.gradients(bound, estimator, leaves()), truth

    judge(outcome, pair, what, estimator, package, reference)


def leaves():
    return [value for _, value in sorted(pyro.get_param_store().named_parameters())]


def judge(outcome, pair, what, estimator, package, reference):
    def fail(why):
        outcome.failed.append(f"seed {pair.seed}, {what}: {why}")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loss, grads = package()
        except (ValueError, NotImplementedError) as error:
            if names_something(str(error), pair):
                outcome.refused.append(str(error))
            else:
                fail(f"refused without a name: {type(error).__name__}: {error}")
            return
        except Exception as error:
            fail(f"crashed: {type(error).__name__}: {error}")
            return
    told = [str(w.message) for w in caught if names_something(str(w.message), pair)]
    reason = pair.improper.get(estimator) or pair.improper.get("")
    if reason and not told:
        fail(f"passes without a word though {reason}")
        return
    try:
        right_loss, right_grads, truth = reference()
    except Refuse as error:
        fail(f"passes though {error}")
        return
    names = sorted(name for name, _ in pyro.get_param_store().named_parameters())
    tolerance = 1e-9 if pair.dtype == torch.float64 else 1e-3
    size = 1 + abs(right_loss) + truth.log_w.abs().max().item()
    wrong = []
    if not abs(loss - right_loss) <= tolerance * size:
        wrong.append(f"loss {loss} for {right_loss}")
    size = size * (1 + max((g.abs().max().item() for g in right_grads), default=0.0))
    for name, mine, right in zip(names, grads, right_grads, strict=True):
        if not (mine - right).abs().max().item() <= tolerance * size:
            wrong.append(f"d loss / d {name} {mine.tolist()} for {right.tolist()}")
    if not wrong:
        outcome.agreed += 1
    elif told:
        outcome.warned.append(told[0])
    else:
        fail("; ".join(wrong[:4]))


def names_something(message, pair):
    return any(re.search(rf"['\"]{name}\w*['\"]", message) for name in pair.names)

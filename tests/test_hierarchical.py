"""Two levels of particles: values and gradients against a double loop, closed forms and quadrature."""

import pyro
import pytest
import torch

from pyro_iw import LocallyEnhancedELBO
from pyro_iw.bounds import CIWAE, IWAE, MIWAE, VR

from .helpers.two_levels import ByHand, Pair, data, lme, parameters

INNER = {
    "IWAE": (IWAE(3), lme),
    "MIWAE": (MIWAE(2, 2), lambda log_w: (lme(log_w[:2]) + lme(log_w[2:])) / 2),
    "CIWAE": (CIWAE(3, 0.3), lambda log_w: 0.3 * log_w.mean() + 0.7 * lme(log_w)),
    "VR": (VR(0.5, 3), lambda log_w: lme(0.5 * log_w) / 0.5),
    "ELBO": (MIWAE(2, 1), lambda log_w: log_w.mean()),
    "one": (IWAE(1), lambda log_w: log_w[0]),
}
OUTER = {
    "mean": (MIWAE(3, 1), lambda log_w: log_w.mean()),
    "IWAE": (IWAE(3), lme),
    "MIWAE": (MIWAE(2, 2), lambda log_w: (lme(log_w[:2]) + lme(log_w[2:])) / 2),
}
WAYS = {
    "one pass": {},
    "one by one": {"vectorize_particles": False},
    "chunks": {"chunk_size": 2},
    "compiled": {"compile": True},
}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def drawn(levels, vectorized=True):
    """The values of both levels' latents, as ``[S]`` and ``[S, L, B]``."""

    def at(particles, name):
        sites = [site for site in particles.sites if site.role == "guide" and site.name == name]
        shape = particles.log_p.shape
        if len(sites) > 1:
            return torch.stack([site.message["value"] for site in sites]).reshape(*shape[:2], -1)
        return sites[0].message["value"]

    S = levels.top.log_p.shape[0]
    local = levels.local["data"]
    S, L, B = local.log_p.shape
    return {
        "g1": at(levels.top, "g1").reshape(S), "g2": at(levels.top, "g2").reshape(S),
        "z1": at(local, "z1").reshape(S, L, B), "z2": at(local, "z2").reshape(S, L, B),
    }  # fmt: skip


class Watched(LocallyEnhancedELBO):
    """Keeps the values of the particles that it draws."""

    def _read(self, kl_weight, traces):
        levels = super()._read(kl_weight, traces)
        self.seen.append({name: value.detach().clone() for name, value in drawn(levels).items()})
        return levels


def step(loss, pair, seed=0):
    """The value, the gradients, and the latents' values of a step."""
    for parameter in parameters().values():
        parameter.grad = None
    loss.seen = []
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(pair.model, pair.guide, *data())
    grads = {
        name: torch.zeros(()) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in parameters().items()
    }
    return value, grads


def particles_of(loss, pair, seed=0):
    """The particles of that step: without chunks, compilation or gradients."""
    step(loss, pair, seed)
    number = loss.bound.num_particles
    size, values, found = 0, [], list(loss.seen)
    while size < number:  # a first pass over the chunks
        values.append(found.pop(0))
        size += len(values[-1]["g1"])
    return {name: torch.cat([part[name] for part in values]) for name in values[0]}


def by_hand(pair, values, estimator, outer, inner, outer_is_linear):
    hand = ByHand(pair, values)
    if estimator == "dreg":
        return hand.dreg(outer, inner, outer_is_linear)
    if estimator in ("score", "vimco"):
        return hand.score(outer, inner, lme if estimator == "score" else torch.mean)
    return {"reparam": hand.reparam, "stl": hand.stl}[estimator](outer, inner)


SOME = [("IWAE", "mean"), ("MIWAE", "IWAE"), ("CIWAE", "MIWAE")]
PAIRS = [*SOME, ("VR", "mean"), ("ELBO", "IWAE"), ("one", "mean"), ("one", "IWAE")]


def check(estimator, inner, outer, way, pair=None):
    pair = Pair() if pair is None else pair
    bounds = INNER[inner][0], "data", OUTER[outer][0]
    values = particles_of(
        Watched(*bounds, estimator=estimator, **({} if way == "compiled" else WAYS[way])), pair
    )
    hand = by_hand(pair, values, estimator, OUTER[outer][1], INNER[inner][1], OUTER[outer][0].is_linear)
    bound = ByHand(pair, values)
    wanted = bound.value(OUTER[outer][1], INNER[inner][1], *bound.log_weights()).item()
    loss = LocallyEnhancedELBO(*bounds, estimator=estimator, **WAYS[way])
    for _ in range(3 if way == "compiled" else 2):
        value, grads = step(loss, pair)
        assert value == pytest.approx(-wanted, rel=1e-9)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, hand[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
@pytest.mark.parametrize("estimator", ["reparam", "stl", "dreg"])
def test_gradients_of_both_levels_are_those_of_a_double_loop(estimator, inner, outer):
    check(estimator, inner, outer, "one pass")


@pytest.mark.parametrize("way", ["one by one", "chunks"])
@pytest.mark.parametrize(("inner", "outer"), SOME)
@pytest.mark.parametrize("estimator", ["reparam", "stl", "dreg"])
def test_however_the_particles_run(estimator, inner, outer, way):
    check(estimator, inner, outer, way)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "inner", "outer"), [("dreg", "MIWAE", "IWAE"), ("reparam", "IWAE", "mean")]
)
def test_compiled(estimator, inner, outer):
    check(estimator, inner, outer, "compiled")


@pytest.mark.parametrize("way", ["one pass", "one by one", "chunks"])
@pytest.mark.parametrize(
    ("inner", "outer"), [("IWAE", "mean"), ("IWAE", "IWAE"), ("CIWAE", "IWAE"), ("ELBO", "mean")]
)
@pytest.mark.parametrize("estimator", ["score", "vimco"])
def test_coins_inside_of_the_plate(estimator, inner, outer, way):
    check(estimator, inner, outer, way, Pair(discrete=True))

"""Two levels of particles: values and gradients against a double loop, closed forms and quadrature."""

import math
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

from helpers import hierarchy
from helpers.two_levels import ByHand, Pair, data, lme, parameters
from pyro_iw import IWAE_ELBO, ImportanceSampler, LocallyEnhancedELBO
from pyro_iw.bounds import CIWAE, IWAE, MIWAE, PIWAE, VR
from pyro_iw.gradients.two_levels import total_log_weights

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
    suggestions = {"score": lme, "vimco": torch.mean, "ovis": lambda others: torch.tensor(-math.inf)}
    if estimator in suggestions:
        return hand.score(outer, inner, suggestions[estimator])
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
def test_coins_inside_the_plate(estimator, inner, outer, way):
    check(estimator, inner, outer, way, Pair(discrete=True))


LOCAL = {
    "IWAE": (lambda K: IWAE(K), lambda elbo, iwae: iwae),
    "MIWAE": (lambda K: MIWAE(2, K), lambda elbo, iwae: iwae),
    "CIWAE": (lambda K: CIWAE(K, 0.4), lambda elbo, iwae: 0.4 * elbo + 0.6 * iwae),
}


def of_particles(local, number, *args, seed=0, name="data"):
    """Log-weights of independent global particles, local bounds included, of shape ``[S]``."""
    loss = LocallyEnhancedELBO(local, name, MIWAE(number, 1))
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        levels = loss.particles(hierarchy.model, hierarchy.guide, *args)
    return total_log_weights(loss.bound, levels.log_weights, levels.scale)


def mean_and_error(values):
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


@pytest.mark.filterwarnings("ignore:.*poutine.scale that not everything in a weight shares")
@pytest.mark.parametrize("estimator", ["reparam", "dreg"])
def test_a_scale_of_the_local_plate_alone(estimator):
    """It multiplies a cell's bound, and twice the outer bound's curvature."""
    check(estimator, "IWAE", "IWAE", "one pass", Pair(scale=2.5))


@pytest.mark.parametrize("outer", ["mean", "IWAE"])
def test_coins_under_ovis(outer):
    check("ovis", "IWAE", outer, "one pass", Pair(discrete=True))


class TestConjugateHierarchy:
    @pytest.mark.parametrize("K", [1, 4, 64])
    @pytest.mark.parametrize("kind", LOCAL)
    def test_the_bound_is_that_of_nested_quadrature(self, kind, K):
        bound, combine = LOCAL[kind]
        mean, error = mean_and_error(of_particles(bound(K), 4000))
        wanted = hierarchy.expected_bound(hierarchy.parameters(), combine, K).item()
        assert error < 0.02
        assert mean == pytest.approx(wanted, abs=4 * error)

    def test_it_tightens_in_the_number_of_local_particles(self):
        means = [of_particles(IWAE(K), 4000).mean().item() for K in (1, 4, 64)]
        assert means == sorted(means)
        assert means[2] - means[0] > 0.1
        assert means[2] < hierarchy.log_evidence()

    def test_an_outer_iwae_is_tighter_than_the_outer_mean(self):
        log_w = of_particles(IWAE(16), 8000)
        groups = torch.logsumexp(log_w.reshape(-1, 8), 1) - math.log(8)
        mean, error = mean_and_error(groups)
        assert mean > log_w.mean() + 8 * error
        assert mean < hierarchy.log_evidence()
        loss = LocallyEnhancedELBO(IWAE(16), "data", MIWAE(1000, 8))
        pyro.set_rng_seed(0)
        assert loss.loss(hierarchy.model, hierarchy.guide) == pytest.approx(-mean, rel=1e-9)

    def test_minibatches_agree_with_all_of_the_data(self):
        wanted = hierarchy.expected_bound(hierarchy.parameters(), lambda elbo, iwae: iwae, 8).item()
        values = torch.stack([of_particles(IWAE(8), 50, hierarchy.X, 2, seed=i).mean() for i in range(400)])
        mean, error = mean_and_error(values)
        assert error < 0.2
        assert mean == pytest.approx(wanted, abs=4 * error)

    @pytest.mark.parametrize("estimator", ["auto", "dreg"])
    def test_one_local_particle_is_trace_elbo_sample_by_sample(self, estimator):
        for batch in (None, 2):
            found = []
            for loss in (
                LocallyEnhancedELBO(IWAE(1), "data", MIWAE(5, 1), estimator=estimator),
                Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1),
            ):
                pyro.clear_param_store()
                hierarchy.parameters()
                pyro.set_rng_seed(3)
                value = loss.loss_and_grads(hierarchy.model, hierarchy.guide, hierarchy.X, batch)
                found.append([torch.tensor(value), *(p.grad for p in hierarchy.parameters().values())])
            torch.testing.assert_close(found[0][0], found[1][0])
            for name, ours, theirs in zip(hierarchy.START, found[0][1:], found[1][1:], strict=True):
                if estimator == "auto" or name == "slope":
                    torch.testing.assert_close(ours, theirs)


class TestUnbiased:
    """Gradients over 20 000 draws and more, against the derivative of the quadrature."""

    def draws(self, loss, number):
        rows = []
        for i in range(number):
            for p in hierarchy.parameters().values():
                p.grad = None
            pyro.set_rng_seed(i)
            loss.loss_and_grads(hierarchy.model, hierarchy.guide)
            rows.append(torch.stack([p.grad.clone() for p in hierarchy.parameters().values()]))
        return torch.stack(rows)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["IWAE", "CIWAE"])
    @pytest.mark.parametrize("estimator", ["reparam", "dreg"])
    def test_with_an_outer_mean(self, estimator, kind):
        bound, combine = LOCAL[kind]
        p = {name: value.detach().clone().requires_grad_() for name, value in hierarchy.parameters().items()}
        exact = torch.autograd.grad(-hierarchy.expected_bound(p, combine, 3), list(p.values()))
        loss = LocallyEnhancedELBO(bound(3), "data", MIWAE(500, 1), estimator=estimator)
        grads = self.draws(loss, 60)  # 30 000 draws
        error = grads.std(0) / math.sqrt(len(grads))
        assert ((grads.mean(0) - torch.stack(exact)).abs() < 4 * error).all()
        assert (error < 0.02).all()

    @pytest.mark.slow
    def test_dreg_with_an_outer_iwae(self):
        """Against the total derivative, on the same particles."""
        found = [
            self.draws(LocallyEnhancedELBO(IWAE(3), "data", MIWAE(250, 2), estimator=name), 80)
            for name in ("dreg", "reparam")
        ]
        apart = found[0] - found[1]
        error = apart.std(0) / math.sqrt(len(apart))
        assert (apart.mean(0).abs() < 4 * error + 1e-9).all()
        assert found[0].std(0)[3] < found[1].std(0)[3]  # b: that of the local latents alone

    @pytest.mark.slow
    def test_stl_is_biased(self):
        """The test sees a bias where there is one."""
        found = [
            self.draws(LocallyEnhancedELBO(IWAE(3), "data", MIWAE(500, 1), estimator=name), 60)
            for name in ("stl", "reparam")
        ]
        apart = found[0] - found[1]
        error = apart.std(0) / math.sqrt(len(apart))
        assert (apart.mean(0).abs() > 10 * error).any()


class TestWhatRunsHowOften:
    def test_networks_of_data_or_globals_alone_run_once_for_each(self):
        seen = {}

        def network(name, h):
            seen.setdefault(name, []).append(tuple(h.shape))
            return 0.5 * h

        def model(x):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(network("of g", g), 1.0), obs=torch.tensor(0.3))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(network("prior", g), 1.0))
                pyro.sample("x", dist.Normal(network("of z", z), 1.0), obs=x)

        def guide(x):
            g = pyro.sample("g", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(network("encoder", x) + network("link", g), 1.0))

        loss = LocallyEnhancedELBO(IWAE(5), "data", MIWAE(4, 1))
        x = torch.zeros(3)
        loss.loss(model, guide, x)
        seen.clear()
        loss.loss(model, guide, x)
        assert seen == {
            "encoder": [(3,)],
            "link": [(4, 1, 1)],
            "of g": [(4, 1, 1)],
            "prior": [(4, 1, 1)],
            "of z": [(4, 5, 3)],
        }
        levels = loss.particles(model, guide, x)
        sizes = {(s.role, s.name): s.log_prob.numel() for s in levels.sites}
        assert sizes["model", "y"] == sizes["model", "g"] == sizes["guide", "g"] == 4
        assert sizes["model", "x"] == 4 * 5 * 3


class TestStructure:
    def test_plates_side_by_side_have_a_bound_each(self):
        """Equal to two separate calls, for what they share is a constant."""

        def model():
            with pyro.plate("students", 3):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.arange(3.0))
            with pyro.plate("items", 2):
                w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0))
                with pyro.plate("answers", 4, dim=-2):
                    pyro.sample("y", dist.Normal(w, 1.0), obs=torch.arange(8.0).reshape(4, 2))

        def guide():
            with pyro.plate("students", 3):
                pyro.sample("z", dist.Normal(torch.arange(3.0) / 2, 1.0))
            with pyro.plate("items", 2):
                pyro.sample("w", dist.Normal(torch.tensor([2.0, 3.0]), 0.8))

        loss = LocallyEnhancedELBO({"students": IWAE(5), "items": CIWAE(3, 0.3)}, outer=MIWAE(4, 1))
        for way in ({}, {"vectorize_particles": False}):
            loss = LocallyEnhancedELBO(loss.local, outer=loss.outer, **way)
            pyro.set_rng_seed(0)
            levels = loss.particles(model, guide)
            assert levels.local["students"].log_p.shape == (4, 5, 3)
            assert levels.local["items"].log_p.shape == (4, 3, 2)
            total = 0.0
            for name, bound in (("students", lme), ("items", lambda v: 0.3 * v.mean() + 0.7 * lme(v))):
                w = levels.local[name].log_weights
                total += sum(bound(w[s, :, n]) for s in range(4) for n in range(w.shape[2])) / 4
            pyro.set_rng_seed(0)
            assert loss.loss(model, guide) == pytest.approx(-total.item())
            z = next(s for s in levels.local["items"].sites if (s.role, s.name) == ("guide", "w")).message
            if not way:
                w = z["value"]
                by_hand = dist.Normal(0.0, 2.0).log_prob(w) - dist.Normal(
                    z["fn"].base_dist.loc if hasattr(z["fn"], "base_dist") else z["fn"].loc, 0.8
                ).log_prob(w)
                x = torch.arange(8.0).reshape(4, 2)
                by_hand = by_hand.reshape(4, 3, 2) + dist.Normal(w.reshape(4, 3, 1, 2), 1.0).log_prob(x).sum(
                    2
                )
                torch.testing.assert_close(levels.local["items"].log_weights, by_hand)

    def test_a_plate_around_the_local_one_belongs_to_the_cells(self):
        def pair(sampled):
            def run():
                g = pyro.sample("g", dist.Normal(0.0, 1.0))
                with pyro.plate("schools", 2, dim=-2), pyro.plate("pupils", 3, dim=-1):
                    z = pyro.sample("z", dist.Normal(g, 1.0))
                    if not sampled:
                        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2, 3))

            return run

        for over, cells in (("pupils", (2, 3)), ("schools", (2,))):
            levels = LocallyEnhancedELBO(IWAE(4), over, MIWAE(2, 1)).particles(pair(False), pair(True))
            assert levels.local[over].log_p.shape == (2, 4, *cells)

    def test_no_global_latent_is_the_bound_of_every_cell(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.4)) * x, 0.8))

        for estimator in ("reparam", "stl", "dreg"):
            found = []
            for loss in (
                LocallyEnhancedELBO(IWAE(6), "data", estimator=estimator),
                IWAE_ELBO(6, estimator=estimator),
            ):
                pyro.clear_param_store()
                pyro.set_rng_seed(1)
                found.append(loss.loss_and_grads(model, guide, torch.arange(3.0)))
                found.append(pyro.param("a").grad.item())
            assert found[:2] == pytest.approx(found[2:])

    def test_a_scale_of_everything_scales_everything(self):
        pair = [poutine.scale(fn, 0.1) for fn in (hierarchy.model, hierarchy.guide)]
        for outer in (MIWAE(3, 1), IWAE(3)):
            values = []
            for model, guide in (pair, (hierarchy.model, hierarchy.guide)):
                pyro.set_rng_seed(0)
                values.append(LocallyEnhancedELBO(IWAE(4), "data", outer).loss(model, guide))
            assert values[0] == pytest.approx(0.1 * values[1])

    def test_kl_weight(self):
        """By the pieces of both levels."""
        loss = LocallyEnhancedELBO(IWAE(3), "data", IWAE(2), kl_weight=0.4)
        pyro.set_rng_seed(0)
        value = loss.differentiable_loss(hierarchy.model, hierarchy.guide).item()
        pyro.set_rng_seed(0)
        levels = loss.particles(hierarchy.model, hierarchy.guide)
        part = {(s.role, s.name): s.log_prob.detach() for s in levels.sites}
        local = part["model", "x"] + 0.4 * (part["model", "z"] - part["guide", "z"])
        top = 0.4 * (part["model", "g"] - part["guide", "g"]).reshape(2)
        total = top + torch.stack([sum(lme(local[s, :, n]) for n in range(4)) for s in range(2)])
        assert value == pytest.approx(-lme(total).item())

    def test_repr(self):
        assert repr(LocallyEnhancedELBO({"a": IWAE(2), "b": IWAE(3)}, chunk_size=2)) == (
            "LocallyEnhancedELBO(local={'a': IWAE(K=2), 'b': IWAE(K=3)}, outer=MIWAE(M=1, K=1), chunk_size=2)"
        )
        copy = pickle.loads(pickle.dumps(LocallyEnhancedELBO(IWAE(2), "data", estimator="dreg")))
        assert copy.loss(hierarchy.model, hierarchy.guide) != 0


def outside(role):
    """A pair in which an observation, or a latent of the guide, outside the plate depends on one inside."""

    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(g, 1.0))
        if role == "model":
            pyro.sample(
                "y",
                dist.Normal(z.mean(-1, keepdim=True) if z.dim() > 1 else z.mean(), 1.0),
                obs=torch.tensor(0.1),
            )

    def guide():
        loc = torch.tensor(0.0)
        if role == "model":
            loc = pyro.sample("g", dist.Normal(loc, 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
        if role == "guide":
            pyro.sample("g", dist.Normal(z.mean(-1, keepdim=True) if z.dim() > 1 else z.mean(), 1.0))

    return model, guide


class TestBadInput:
    @pytest.mark.parametrize("vectorize", [True, False])
    @pytest.mark.parametrize("role", ["model", "guide"])
    def test_what_lies_outside_and_depends_on_what_is_inside(self, role, vectorize):
        loss = LocallyEnhancedELBO(IWAE(4), "data", MIWAE(2, 1), vectorize_particles=vectorize)
        name = "y" if role == "model" else "g"
        with pytest.raises(ValueError, match=f"site '{name}' .*lies outside of the plate and depends on"):
            loss.loss(*outside(role))

    @pytest.mark.parametrize("validate", [True, False])
    @pytest.mark.parametrize("role", ["model", "guide"])
    @pytest.mark.parametrize("mix", [lambda z: z.roll(1, -1), lambda z: z.mean(-1, keepdim=True)])
    def test_an_index_that_depends_on_the_latents_of_others(self, mix, role, validate):
        """There the local weights are no weights: the value was 3 nats above log p(x)."""

        def model():
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(g, 1.0))
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
                x = z - mix(z) if role == "model" else z
                pyro.sample("x", dist.Normal(x + w, 1.0), obs=torch.ones(3))

        def guide():
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(g, 1.0))
                pyro.sample("w", dist.Normal(mix(z) if role == "guide" else z, 1.0))

        with pyro.validation_enabled(validate):
            for outer in (MIWAE(1, 1), MIWAE(3, 1)):
                with pytest.raises(ValueError, match="index of plate 'data' depends on latents of others"):
                    LocallyEnhancedELBO(IWAE(4), "data", outer).loss(model, guide)
            with pytest.raises(ValueError, match="index of plate 'data' depends on latents of others"):
                ImportanceSampler(model, guide, 5, local="data", num_local=3, progress=False)()
        IWAE_ELBO(K=3, plates=()).loss(model, guide)  # as the message advises

    @pytest.mark.parametrize("role", ["model", "guide"])
    def test_so_too_without_validation(self, role):
        """Particles one by one have no shapes to tell by: the first of them would be read alone."""
        with pyro.validation_enabled(False):
            loss = LocallyEnhancedELBO(IWAE(4), "data", MIWAE(2, 1), vectorize_particles=False)
            with pytest.raises(ValueError, match="lies outside of the plate and depends on"):
                loss.loss(*outside(role))
            sampler = ImportanceSampler(
                *outside(role), 4, local="data", num_local=3, vectorize_particles=False, progress=False
            )
            with pytest.raises(ValueError, match="lies outside of the plate and depends on"):
                sampler()

    def test_an_outer_iwae_on_a_minibatch(self):
        with pytest.raises(ValueError, match=r"'data' is subsampled \(2 of 4\).*outer=MIWAE\(M, 1\)"):
            LocallyEnhancedELBO(IWAE(4), "data", IWAE(2)).loss(
                hierarchy.model, hierarchy.guide, hierarchy.X, 2
            )
        LocallyEnhancedELBO(IWAE(4), "data", MIWAE(2, 1)).loss(
            hierarchy.model, hierarchy.guide, hierarchy.X, 2
        )

    def test_a_plate_that_is_not_there(self):
        with pytest.raises(ValueError, match=r"plate 'rows', but .*\['data'\]"):
            LocallyEnhancedELBO(IWAE(4), "rows").loss(hierarchy.model, hierarchy.guide)

    def test_a_plate_that_is_a_loop(self):
        def pair(sampled):
            def run():
                g = pyro.sample("g", dist.Normal(0.0, 1.0))
                for i in pyro.plate("data", 2):
                    pyro.sample(f"z_{i}", dist.Normal(g, 1.0))

            return run

        with pytest.raises(ValueError, match="'data' is a Python loop"):
            LocallyEnhancedELBO(IWAE(4), "data").loss(pair(False), pair(True))

    def test_a_joint_guide(self):
        guide = AutoDiagonalNormal(hierarchy.model)
        with pytest.raises(ValueError, match=r"draws nothing inside plate 'data'.*AutoNormal"):
            LocallyEnhancedELBO(IWAE(4), "data").loss(hierarchy.model, guide)
        LocallyEnhancedELBO(IWAE(4), "data").loss(hierarchy.model, AutoNormal(hierarchy.model))

    @pytest.mark.parametrize("side", ["model", "guide"])
    def test_a_latent_that_lies_inside_on_one_side(self, side):
        def make(inside):
            def run():
                g = pyro.sample("g", dist.Normal(0.0, 1.0)) if not inside else None
                with pyro.plate("data", 1):
                    g = g if g is not None else pyro.sample("g", dist.Normal(0.0, 1.0))
                    pyro.sample("z", dist.Normal(g, 1.0))

            return run

        pair = make(side == "model"), make(side == "guide")
        with pytest.raises(ValueError, match=r"'g' lie.* plate 'data' in .*both"):
            LocallyEnhancedELBO(IWAE(4), "data").loss(*pair)

    def test_plates_that_cross(self):
        def pair(sampled):
            def run():
                with pyro.plate("students", 2, dim=-1), pyro.plate("items", 3, dim=-2):
                    pyro.sample("z", dist.Normal(0.0, 1.0))

            return run

        with pytest.raises(
            ValueError, match=r"'z' lies in 2 of the plates .*'items', 'students'|'students', 'it"
        ):
            LocallyEnhancedELBO({"students": IWAE(2), "items": IWAE(2)}).loss(pair(False), pair(True))

    def test_dims_counted_from_the_left(self):
        def model(x):
            g = pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("data", 4):
                z = pyro.sample("z", dist.Normal(g.unsqueeze(-1) + torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(torch.softmax(z, 1), 1.0).to_event(1), obs=torch.zeros(4, 3))

        def guide(x):
            g = pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("data", 4):
                pyro.sample("z", dist.Normal(g.unsqueeze(-1) + torch.zeros(3), 1.0).to_event(1))

        with pytest.raises(ValueError, match="not independent of one another at site 'x'"):
            LocallyEnhancedELBO(IWAE(4), "data", MIWAE(3, 1)).loss(model, guide, None)

    def test_arguments(self):
        with pytest.raises(ValueError, match="over must name the plate"):
            LocallyEnhancedELBO(IWAE(4))
        with pytest.raises(ValueError, match="local must be"):
            LocallyEnhancedELBO({"data": 4})
        with pytest.raises(ValueError, match="Drop it"):
            LocallyEnhancedELBO({"data": IWAE(4)}, "data")
        with pytest.raises(ValueError, match="outer must be"):
            LocallyEnhancedELBO(IWAE(4), "data", 3)
        with pytest.raises(ValueError, match="another for the guide"):
            LocallyEnhancedELBO(PIWAE(2, 2), "data")
        with pytest.raises(ValueError, match="no form for particles on two levels"):
            LocallyEnhancedELBO(IWAE(4), "data", estimator="rws")


def test_a_global_site_that_is_summed_out_with_local_latents():
    """It would be summed over the product of all local particles. What is advised gives p(x)."""
    x, locs = torch.tensor([0.5, 1.5, 2.0]), torch.arange(3.0)

    def model(**infer):
        c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3), infer=infer)
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(locs[c], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(draws_c):
        if draws_c:
            pyro.sample("c", dist.Categorical(torch.ones(3) / 3))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x / 2, 0.9))

    summing, without = partial(model, enumerate="parallel"), partial(guide, False)
    with pytest.raises(ValueError, match="sums out 'c', outside of the plate of local particles"):
        LocallyEnhancedELBO(local=IWAE(4), over="data").loss(summing, without)
    with pytest.raises(ValueError, match="Let the guide sample 'c'"):
        ImportanceSampler(summing, without, 4, local="data", num_local=4).log_marginal()
    exact = dist.Normal(locs, math.sqrt(2.0)).log_prob(x[:, None]).sum(0).logsumexp(0) - math.log(3)
    levels = ImportanceSampler(model, partial(guide, True), 1000, local="data", num_local=100)
    value, error, _ = levels.evidence()
    assert abs(value - exact) < 4 * error < 0.2

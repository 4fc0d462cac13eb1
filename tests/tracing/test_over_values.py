"""Guides that enumerate: chains, plates, AutoGuides, examples of Pyro's; and what is refused."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, AutoNormal, AutoNormalMessenger
from pyro.ops.indexing import Vindex
from pyro.optim import Adam

from helpers.enumerated import Minibatch, PerValue, TwoSites, set_up
from helpers.semi_supervised import M2, SCANVI
from helpers.steps import value_and_grads
from helpers.truth import RecordedNormal, normal
from pyro_iw import (
    IWAE_ELBO,
    MIWAE_ELBO,
    Bound,
    ImportanceSampler,
    ImportanceWeightedELBO,
    LocallyEnhancedELBO,
    bounds,
)

PARALLEL = {"enumerate": "parallel"}
NOT_TRAINED = pytest.mark.filterwarnings("ignore:.*is not trained")


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(loss, model, guide, *args, seed=0):
    """Loss and gradients, the pair probed before."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guide(*args)
    loss.loss(model, guide, *args)
    RecordedNormal.draws.clear()
    pyro.set_rng_seed(seed)
    return value_and_grads(loss, model, guide, *args)


def assert_same(first, second):
    assert first[0] == pytest.approx(second[0], rel=1e-10)
    assert first[1].keys() == second[1].keys()
    for name, grad in first[1].items():
        other = second[1][name]
        if grad is None or other is None:
            assert not any(g is not None and g.any() for g in (grad, other))
        else:
            torch.testing.assert_close(grad, other, rtol=1e-8, atol=1e-10, msg=name)


class Chain:
    """A chain of T states enumerated in the guide, given each of which a continuous value is drawn."""

    T = 4
    x = torch.randn(T, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def __init__(self, markov=True, draws=True):
        self.markov, self.draws = markov, draws

    def steps(self):
        return pyro.markov(range(self.T)) if self.markov else range(self.T)

    def model(self):
        step = pyro.param("step", torch.tensor([[1.0, -0.5], [0.3, 0.2]]))
        means = pyro.param("means", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", 3):
            y = 0
            for t in self.steps():
                y = pyro.sample(f"y_{t}", dist.Categorical(logits=step[y]))
                z = pyro.sample(f"z_{t}", dist.Normal(means[y], 1.0)) if self.draws else means[y]
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=self.x[t])

    def guide(self):
        a = pyro.param("a", torch.tensor([[0.4, -0.5], [0.3, 0.9]]))
        with pyro.plate("data", 3):
            y = 0
            for t in self.steps():
                logits = a[y] + self.x[t][:, None] * a[0]
                y = pyro.sample(f"y_{t}", dist.Categorical(logits=logits), infer=PARALLEL)
                if self.draws:
                    pyro.sample(f"z_{t}", RecordedNormal(a[1][y] * self.x[t], torch.tensor(0.9)))

    def log_weight(self, noise, n):
        """log sum over paths of p(x, y, z) / q(z | y), given noise[t][y]."""
        step, means, a = (pyro.param(name).detach() for name in ("step", "means", "a"))
        terms = []
        for path in itertools.product(range(2), repeat=self.T):
            term, before = 0.0, 0
            for t, y in enumerate(path):
                loc = a[1][y] * self.x[t, n]
                z = loc + 0.9 * noise[t][y]
                term = term + torch.log_softmax(step[before], 0)[y] + normal(z, means[y], 1.0)
                term = term + normal(self.x[t, n], z, 1.0) - normal(z, loc, 0.9)
                before = y
            terms.append(term)
        return torch.stack(terms).logsumexp(0)


@pytest.mark.parametrize("markov", [True, False])
@pytest.mark.parametrize("draws", [True, False])
def test_a_chain_is_pyros_for_one_particle(markov, draws):
    chain = Chain(markov, draws)
    theirs = run(TraceEnum_ELBO(max_plate_nesting=1), chain.model, chain.guide)
    assert_same(run(IWAE_ELBO(K=1), chain.model, chain.guide), theirs)


@NOT_TRAINED
@pytest.mark.parametrize("vectorize", [True, False])
def test_a_chain_inside_the_logarithm_is_the_sum_over_all_paths(vectorize):
    chain, loss = Chain(), IWAE_ELBO(K=3, stratified=True, vectorize_particles=vectorize)
    value, _ = run(loss, chain.model, chain.guide)
    draws = RecordedNormal.draws
    truth = 0.0
    for n in range(3):
        log_w = []
        for k in range(3):
            if vectorize:
                noise = [d.reshape(2, 3, 3)[:, k, n] for d in draws]
            else:
                noise = [d.reshape(2, 3)[:, n] for d in draws[4 * k : 4 * k + 4]]
            log_w.append(chain.log_weight(noise, n))
        truth -= torch.stack(log_w).logsumexp(0) - math.log(3)
    assert value == pytest.approx(truth.item(), rel=1e-10)


@NOT_TRAINED
def test_a_chain_without_draws_is_the_evidence_either_way():
    """Inside the logarithm the guide's chain is the model's, summed out."""
    chain = Chain(draws=False)
    inside = run(IWAE_ELBO(K=2, stratified=True), chain.model, chain.guide)
    summed = run(IWAE_ELBO(K=1), config_enumerate(chain.model), lambda: pyro.param("a", torch.zeros(())))
    assert inside[0] == pytest.approx(summed[0], rel=1e-10)
    for name in ("step", "means"):
        torch.testing.assert_close(inside[1][name], summed[1][name], rtol=1e-8, atol=1e-10)


def mixture(data):
    """A Gaussian mixture with global latents, whose assignments the guide enumerates."""
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        c = pyro.sample("c", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(Vindex(locs)[..., c], scale), obs=data)


def mixture_guide():
    guide = AutoGuideList(mixture)
    guide.append(AutoNormal(poutine.block(mixture, expose=["weights", "scale", "locs"])))
    guide.append(AutoDiscreteParallel(poutine.block(mixture, expose=["c"])))
    return guide


def local_mixture(data):
    loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 10.0))
    with pyro.plate("data", len(data)):
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
        z = pyro.sample("z", dist.Normal(loc + 5 * c, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)


def local_guide(data):
    loc = pyro.sample("loc", dist.Normal(torch.tensor(3.0, dtype=torch.float64), 1.0))
    with pyro.plate("data", len(data)):
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)), infer=PARALLEL)
        pyro.sample("z", dist.Normal(loc + 5 * c, 1.0))


DATA = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0], dtype=torch.float64)


def test_automatic_guides_with_global_latents():
    theirs = TraceEnum_ELBO(max_plate_nesting=1)
    assert_same(
        run(IWAE_ELBO(K=1), mixture, mixture_guide(), DATA), run(theirs, mixture, mixture_guide(), DATA)
    )
    theirs = TraceEnum_ELBO(max_plate_nesting=1, num_particles=3)
    ours = MIWAE_ELBO(M=3, K=1, vectorize_particles=False)
    assert_same(run(ours, mixture, mixture_guide(), DATA), run(theirs, mixture, mixture_guide(), DATA))


@NOT_TRAINED
def test_assignments_inside_the_logarithm_are_those_of_the_model_summed_out():
    guide = AutoNormal(poutine.block(mixture, hide=["c"]))
    summed = config_enumerate(mixture)
    loss = IWAE_ELBO(K=4, vectorize_particles=False)
    truth = run(loss, summed, guide, DATA)
    found = run(IWAE_ELBO(K=4, vectorize_particles=False, stratified=True), mixture, mixture_guide(), DATA)
    assert found[0] == pytest.approx(truth[0], rel=1e-10)


def test_a_minibatch_below_global_latents():
    rows = torch.tensor([1, 3])

    def model():
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        with pyro.plate("data", 5, subsample=rows):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("obs", dist.Normal(Vindex(locs)[..., c], 1.0), obs=DATA[rows])

    def guide():
        p = pyro.param("p", torch.linspace(-1, 1, 5))
        loc = pyro.param("loc", torch.tensor([1.0, 9.0]))
        pyro.sample("locs", dist.Normal(loc, 0.5).to_event(1))
        with pyro.plate("data", 5, subsample=rows):
            logits = torch.stack([p[rows], -p[rows]], -1)
            pyro.sample("c", dist.Categorical(logits=logits), infer=PARALLEL)

    theirs = TraceEnum_ELBO(max_plate_nesting=1, num_particles=3, vectorize_particles=True)
    assert_same(run(MIWAE_ELBO(M=3, K=1), model, guide), run(theirs, model, guide))
    with pytest.raises(ValueError, match="Plate 'data' is subsampled"):
        IWAE_ELBO(K=3).loss(model, guide)


@NOT_TRAINED
@pytest.mark.parametrize(
    "make",
    [
        lambda: IWAE_ELBO(K=1),
        lambda: IWAE_ELBO(K=3),
        lambda: IWAE_ELBO(K=3, estimator="dreg"),
        lambda: IWAE_ELBO(K=3, stratified=True),
    ],
)
def test_a_value_that_cannot_be_counts_for_nothing(make):
    """As if there were one value fewer, where neither prior nor guide allows it."""

    def pair(number):
        ruled_out = torch.full((number - 2,), -math.inf)

        def model():
            with pyro.plate("data", 3):
                logits = torch.cat([torch.tensor([0.2, 0.0]), ruled_out])
                y = pyro.sample("y", dist.Categorical(logits=logits))
                z = pyro.sample("z", dist.Normal(1.0 * y, 1.0))
                pyro.sample("x", dist.Normal(z, pyro.param("s", torch.tensor(0.8))), obs=torch.zeros(3))

        def guide():
            a = pyro.param("a", torch.tensor([0.3, -0.2]))
            with pyro.plate("data", 3):
                y = pyro.sample("y", dist.Categorical(logits=torch.cat([a, ruled_out])), infer=PARALLEL)
                # The same noise for each value, so that the pairs can be compared.
                pyro.sample("z", SameNoise(a[0] * y, torch.tensor(0.9)))

        return model, guide

    assert_same(run(make(), *pair(3)), run(make(), *pair(2)))


class SameNoise(dist.Normal):
    """Draws from the same standard normal noise along the leftmost dim."""

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.loc + self.scale * torch.randn(shape[1:]).expand(shape)


class Rows:
    """A latent for each row; in each column of it an enumerated site, and what is drawn given that."""

    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def model(self):
        means = pyro.param("means", torch.tensor([-1.0, 1.0]))
        with pyro.plate("rows", 2, dim=-2):
            u = pyro.sample("u", dist.Normal(torch.tensor(0.0), 1.0))
            with pyro.plate("columns", 3, dim=-1):
                y = pyro.sample("y", dist.Categorical(logits=torch.tensor([0.3, 0.1])))
                z = pyro.sample("z", dist.Normal(means[y] + u, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=self.x)

    def guide(self):
        a = pyro.param("a", torch.tensor([0.4, -0.5]))
        with pyro.plate("rows", 2, dim=-2):
            u = pyro.sample("u", dist.Normal(a[0] * self.x.mean(-1, keepdim=True), 1.0))
            with pyro.plate("columns", 3, dim=-1):
                logits = a * self.x[..., None] + u[..., None] * a
                y = pyro.sample("y", dist.Categorical(logits=logits), infer=PARALLEL)
                pyro.sample("z", dist.Normal(a[y] * self.x + u, 0.8))

    def log_evidence(self):
        """By quadrature over u of each row."""
        u = torch.linspace(-10, 10, 20001)
        log_p = torch.log_softmax(torch.tensor([0.3, 0.1]), 0)
        rows = []
        for row in self.x:
            total = normal(u, 0.0, 1.0)
            for x in row:
                both = [log_p[i] + normal(x, mean + u, 2**0.5) for i, mean in enumerate((-1.0, 1.0))]
                total = total + torch.stack(both).logsumexp(0)
            rows.append(total.logsumexp(0) + math.log(u[1] - u[0]))
        return torch.stack(rows)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_entries_of_a_deeper_plate(num_particles):
    rows = Rows()
    theirs = TraceEnum_ELBO(
        max_plate_nesting=2, num_particles=num_particles, vectorize_particles=num_particles > 1
    )
    ours = MIWAE_ELBO(M=num_particles, K=1)
    assert_same(run(ours, rows.model, rows.guide), run(theirs, rows.model, rows.guide))


def test_the_samplers_weight_is_the_stratified_one():
    rows = Rows()
    pyro.set_rng_seed(0)
    sampler = ImportanceSampler(rows.model, rows.guide, 200_000, chunk_size=50_000)
    torch.testing.assert_close(sampler.log_marginal(), rows.log_evidence(), rtol=0, atol=0.02)
    with pytest.raises(NotImplementedError, match=r"Site\(s\) 'y' are enumerated in the guide.*log_marginal"):
        sampler()


@NOT_TRAINED
def test_bounds_are_in_order():
    """ELBO <= outside <= inside <= log p(x), in expectation; outside increases in K."""
    case = PerValue()
    set_up(case)
    pyro.set_rng_seed(0)

    def mean(make, draws=300):
        loss = make()
        with torch.no_grad():
            return -sum(loss.loss(case.model, case.guide) for _ in range(draws)) / draws

    values = [
        mean(lambda: IWAE_ELBO(K=1)),
        mean(lambda: IWAE_ELBO(K=8)),
        mean(lambda: IWAE_ELBO(K=64)),
        mean(lambda: IWAE_ELBO(K=64, stratified=True)),
        ImportanceSampler(case.model, case.guide, 100_000).log_marginal().sum().item() + 0.02,
    ]
    assert values == sorted(values)


def test_the_network_of_data_alone_runs_once():
    """Not for each value, nor each particle."""
    m2, rows = M2(), []
    m2.encoder_y.register_forward_hook(lambda module, args, out: rows.append(out.numel() // 3))
    x = torch.ones(4, 6)
    loss = IWAE_ELBO(K=5)
    guide = config_enumerate(m2.guide)
    loss.loss(m2.model, guide, x)
    rows.clear()
    loss.loss(m2.model, guide, x)
    assert rows == [4]


@pytest.mark.parametrize(
    "make",
    [
        lambda: IWAE_ELBO(K=5),
        lambda: IWAE_ELBO(K=5, chunk_size=2),
        pytest.param(lambda: IWAE_ELBO(K=5, stratified=True), marks=NOT_TRAINED),
        lambda: IWAE_ELBO(K=5, vectorize_particles=False),
    ],
)
@pytest.mark.parametrize("expand", [True, False])
def test_a_semi_supervised_autoencoder_with_one_line_changed(make, expand):
    """Batches with and without labels in turn, and the classifier's own loss beside it."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    m2 = M2()
    optimiser = Adam({"lr": 0.01})
    guide = config_enumerate(m2.guide, "parallel", expand=expand)
    basic = SVI(m2.model, guide, optimiser, loss=make())
    auxiliary = SVI(m2.model_classify, m2.guide_classify, optimiser, loss=Trace_ELBO())
    labels = torch.arange(60) % 3
    x = (torch.rand(60, 6) < 0.1 + 0.8 * torch.eye(3).repeat_interleave(2, 1)[labels]).double()
    y = torch.eye(3)[labels]
    for _ in range(60):
        assert math.isfinite(basic.step(x[30:]))
        assert math.isfinite(basic.step(x[:30], y[:30]) + auxiliary.step(x[:30], y[:30]))
    assert (m2.encoder_y(x).argmax(-1) == labels).double().mean() > 0.9


def test_a_semi_supervised_autoencoder_is_pyros_for_one_particle():
    torch.manual_seed(0)
    m2, x = M2(), torch.bernoulli(torch.full((4, 6), 0.4))
    y = torch.eye(3)[[0, 2, 1, 0]]
    guide = config_enumerate(m2.guide)
    for args in ((x,), (x, y)):
        theirs = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
        theirs = run(theirs, m2.model, guide, *args)
        theirs = theirs[0], {name: grad.clone() for name, grad in theirs[1].items() if grad is not None}
        m2.zero_grad()
        ours = run(IWAE_ELBO(K=1), m2.model, guide, *args)
        ours = ours[0], {name: grad for name, grad in ours[1].items() if grad is not None}
        m2.zero_grad()
        assert_same(ours, theirs)


def scanvi_data():
    return torch.poisson(torch.full((6, 5), 3.0)), torch.eye(3)[[0, 1, 2, 0, 1, 2]]


@pytest.mark.parametrize("make", [lambda: IWAE_ELBO(K=4), lambda: MIWAE_ELBO(M=2, K=2, chunk_size=3)])
def test_labels_enumerated_after_a_draw_with_one_line_changed(make):
    torch.manual_seed(0)
    pyro.clear_param_store()
    scanvi, (x, y) = SCANVI(), scanvi_data()
    guide = config_enumerate(scanvi.guide, "parallel", expand=True)
    svi = SVI(scanvi.model, guide, Adam({"lr": 0.02}), loss=make())
    before = svi.evaluate_loss(x)
    for _ in range(40):
        svi.step(x)
        svi.step(x, y)
    assert svi.evaluate_loss(x) < before
    assert all(p.grad is None or p.grad.isfinite().all() for p in scanvi.parameters())


def test_labels_enumerated_after_a_draw_are_pyros_for_one_particle():
    torch.manual_seed(0)
    scanvi, (x, _) = SCANVI(), scanvi_data()
    guide = config_enumerate(scanvi.guide, "parallel", expand=True)
    found = []
    for loss in (TraceEnum_ELBO(max_plate_nesting=1), IWAE_ELBO(K=1)):
        value, grads = run(loss, scanvi.model, guide, x)
        found.append((value, {name: g.clone() for name, g in grads.items() if g is not None}))
        scanvi.zero_grad()
    assert_same(*found)


def test_a_factor_that_hides_its_origin_is_refused_with_the_way_out():
    """As in Pyro's own example, whose factor claims to need a score."""
    scanvi, (x, y) = SCANVI(has_rsample=False), scanvi_data()
    with pytest.raises(ValueError, match=r"'classification'.*pass has_rsample=True"):
        IWAE_ELBO(K=4).loss_and_grads(scanvi.model, config_enumerate(scanvi.guide), x, y)


def test_labels_of_some_rows():
    """obs_mask in the model; the guide enumerates what is not observed, and takes the label elsewhere."""
    known = torch.tensor([True, False, True, False])
    labels, x = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0.3, -1.0, 2.0, 0.7])

    def model(known, used=None):
        m = pyro.param("m", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(known)):
            prior = dist.Bernoulli(torch.tensor(0.4))
            if used is None:
                y = pyro.sample("y", prior, obs=labels, obs_mask=known)
            else:
                y = pyro.sample("y", prior, obs=used)
            z = pyro.sample("z", dist.Normal(m[y.long()], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[: len(known)] if used is None else x)

    def guide(known, used=None):
        a, b = pyro.param("a", torch.tensor(0.3)), pyro.param("b", torch.tensor([0.2, 0.9]))
        with pyro.plate("data", len(known)):
            if used is None:
                y = pyro.sample("y_unobserved", dist.Bernoulli(logits=a * x), infer=PARALLEL)
                used = torch.where(known, labels, y)
            pyro.sample("z", dist.Normal(b[used.long()] * x, 0.9))

    loss = MIWAE_ELBO(M=20_000, K=2)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with torch.no_grad():
        loss.loss(model, guide, known)
        log_w = -loss.loss(model, guide, known)
        # Row by row: known labels in pairs without enumeration, and unknown ones by their mixture.
        truth = 0.0
        q = torch.sigmoid(0.3 * x)
        for used in (torch.zeros(4), torch.ones(4)):
            per_row = loss.bound.value(
                loss.particles(model, guide, known, used).log_weights.reshape(20_000, 2, 4)
            )
            r = torch.where(used > 0, q, 1 - q)
            share = torch.where(known, (labels == used).double(), r)
            truth = truth + (share * (per_row - torch.where(known, 0.0, r.log()))).sum()
    assert log_w == pytest.approx(truth.item(), abs=0.02)


def test_a_weight_of_the_prior_reaches_the_enumerated_site():
    case = PerValue()
    set_up(case)
    loss = IWAE_ELBO(K=3, kl_weight=0.5)
    particles = loss._draw(0.5, _pair(case), 3)[0]
    sites = {(site.role, site.name): site for site in particles.sites}

    def log_prob(*key):
        return sites[key].log_prob.expand(3, 3, 3).transpose(0, 1)

    likelihood = log_prob("model", "x")
    prior = log_prob("model", "y") + log_prob("model", "z")
    proposal = log_prob("guide", "y") + log_prob("guide", "z")
    torch.testing.assert_close(particles.log_weights, likelihood + 0.5 * (prior - proposal))


def _pair(case):
    from pyro_iw.tracing.traces import Pair

    return Pair(case.model, case.guide)


def test_a_guide_that_begins_to_enumerate_later():
    infer = {}
    case = PerValue()
    case.infer = infer
    set_up(case)
    loss = IWAE_ELBO(K=3, estimator="vimco")
    loss.loss_and_grads(case.model, case.guide)
    infer.update(PARALLEL)
    assert loss.particles(case.model, case.guide).log_weights.shape == (3, 3, 3)
    infer.clear()
    assert loss.particles(case.model, case.guide).log_weights.shape == (3, 3)


def test_repr():
    assert repr(IWAE_ELBO(K=2, stratified=True)) == "IWAE_ELBO(K=2, stratified=True)"


def test_the_density_that_drops_out_is_named_once():
    case = PerValue()
    set_up(case)
    loss = IWAE_ELBO(K=2, stratified=True)
    with pytest.warns(UserWarning, match=r"guide site\(s\) 'y' inside the logarithm.*is not trained"):
        loss.loss_and_grads(case.model, case.guide)
    loss.loss_and_grads(case.model, case.guide)
    grads = [pyro.param(name).unconstrained().grad for name in "abc"]
    assert grads[0] is None
    assert grads[1].any()
    assert grads[2].any()


class Doubled(Bound):
    """A user's own bound of several groups."""

    def value(self, log_w):
        return 2 * (log_w / 2).logsumexp((0, 1))


class TestRefusals:
    @pytest.mark.parametrize("vectorize", [True, False])
    def test_entries_of_a_deeper_plate_outside_the_logarithm(self, vectorize):
        rows = Rows()
        with pytest.raises(
            NotImplementedError, match=r"Site 'y' .* in plate\(s\) 'columns'.*stratified=True"
        ):
            IWAE_ELBO(K=3, vectorize_particles=vectorize).loss(rows.model, rows.guide)

    def test_a_chain_outside_the_logarithm(self):
        chain = Chain()
        with pytest.raises(NotImplementedError, match=r"'y_0' and 'y_2' .* on the same dim.*pyro.markov"):
            IWAE_ELBO(K=3).loss(chain.model, chain.guide)
        free = Chain(markov=False, draws=False)
        IWAE_ELBO(K=3).loss(free.model, free.guide)

    def test_wake_wake(self):
        case = PerValue()
        set_up(case)
        with pytest.raises(NotImplementedError, match=r"Site\(s\) 'y' are enumerated.*estimator='rws'"):
            IWAE_ELBO(K=3, estimator="rws").loss_and_grads(case.model, case.guide)

    @NOT_TRAINED
    @pytest.mark.parametrize("estimator", ["stl", "dreg"])
    def test_paths_of_strata(self, estimator):
        case = PerValue()
        set_up(case)
        with pytest.raises(NotImplementedError, match=rf"'z' are drawn for each value.*'{estimator}'"):
            IWAE_ELBO(K=3, estimator=estimator, stratified=True).loss_and_grads(case.model, case.guide)

    @NOT_TRAINED
    def test_a_weighted_prior_inside_the_logarithm(self):
        case = PerValue()
        set_up(case)
        with pytest.raises(NotImplementedError, match=r"kl_weight other than 1.*leave out stratified=True"):
            IWAE_ELBO(K=3, kl_weight=0.5, stratified=True).loss_and_grads(case.model, case.guide)

    @pytest.mark.parametrize("keywords", [{}, {"stratified": True}])
    @NOT_TRAINED
    def test_a_backward_subset(self, keywords):
        case = PerValue()
        set_up(case)
        with pytest.raises(NotImplementedError, match=r"backward_particles .* 'y' the guide enumerates"):
            IWAE_ELBO(K=3, backward_particles=2, **keywords).loss_and_grads(case.model, case.guide)

    @pytest.mark.parametrize("estimator", ["dreg", "score", "vimco"])
    def test_a_mixture_over_particles(self, estimator):
        scanvi, (x, _) = SCANVI(), scanvi_data()
        guide = config_enumerate(scanvi.guide)
        with pytest.raises(NotImplementedError, match=r"'y' of the guide are enumerated after others"):
            IWAE_ELBO(K=3, estimator=estimator).loss_and_grads(scanvi.model, guide, x)
        MIWAE_ELBO(M=3, K=1, estimator="dreg").loss_and_grads(scanvi.model, guide, x)

    def test_groups_of_a_bound_of_ones_own(self):
        scanvi, (x, _) = SCANVI(), scanvi_data()
        guide = config_enumerate(scanvi.guide)
        with pytest.raises(NotImplementedError, match=r"Doubled\(M=2, K=2\) takes its M groups together"):
            ImportanceWeightedELBO(Doubled(M=2, K=2)).loss_and_grads(scanvi.model, guide, x)
        ImportanceWeightedELBO(Doubled(K=4)).loss_and_grads(scanvi.model, guide, x)

    @pytest.mark.parametrize("vectorize", [True, False])
    def test_local_particles(self, vectorize):
        loss = LocallyEnhancedELBO(local=bounds.IWAE(3), over="data", vectorize_particles=vectorize)
        with pytest.raises(NotImplementedError, match=r"Site\(s\) 'c' .* local particles do not go together"):
            loss.loss(local_mixture, local_guide, DATA)

    def test_a_distribution_without_a_finite_support(self):
        def model():
            pyro.sample("x", dist.Normal(pyro.sample("y", dist.Poisson(2.0)), 1.0), obs=torch.tensor(1.0))

        def guide():
            pyro.sample("y", dist.Poisson(3.0), infer=PARALLEL)

        with pytest.raises(NotImplementedError, match=r"Site 'y' of the guide.*Poisson has no values"):
            IWAE_ELBO(K=2).loss(model, guide)

    def test_sampled_enumeration(self):
        case = PerValue()
        case.infer = {**PARALLEL, "num_samples": 2}
        set_up(case)
        with pytest.raises(NotImplementedError, match="Site 'y' of the guide asks for num_samples"):
            IWAE_ELBO(K=2).loss(case.model, case.guide)

    def test_a_model_that_sums_around_what_the_guide_enumerates(self):
        def model():
            c = pyro.sample("c", dist.Bernoulli(0.4), infer=PARALLEL)
            with pyro.plate("data", 3):
                y = pyro.sample("y", dist.Bernoulli(0.3))
                pyro.sample("x", dist.Normal(y + c, 1.0), obs=torch.zeros(3))

        def guide():
            with pyro.plate("data", 3):
                pyro.sample("y", dist.Bernoulli(torch.tensor(0.6)), infer=PARALLEL)

        with pytest.raises(NotImplementedError, match=r"Site 'c' is to be summed out.*guide enumerates 'y'"):
            IWAE_ELBO(K=1).loss(model, guide)

    def test_a_site_outside_of_the_plate_that_it_depends_on(self):
        def model():
            with pyro.plate("data", 3):
                y = pyro.sample("y", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(y.sum(-1, keepdim=True), 1.0), obs=torch.zeros(()))

        def guide():
            with pyro.plate("data", 3):
                pyro.sample("y", dist.Bernoulli(torch.tensor(0.6)), infer=PARALLEL)

        with pytest.raises(NotImplementedError, match=r"'x' \(model\) lies outside plate 'data', but .* 'y'"):
            IWAE_ELBO(K=1).loss(model, guide)

    def test_a_guide_messenger(self):
        class Messenger(AutoNormalMessenger):
            def get_posterior(self, name, prior):
                return prior if name == "y" else super().get_posterior(name, prior)

        @config_enumerate
        def model():
            with pyro.plate("data", 3):
                y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.3)))
                z = pyro.sample("z", dist.Normal(y, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

        with pytest.raises(NotImplementedError, match=r"Site 'y' of the guide.*guide messenger"):
            IWAE_ELBO(K=2).loss(model, Messenger(model))

    def test_draws_without_a_path_in_a_deeper_plate(self):
        def model():
            u = pyro.sample("u", dist.Normal(torch.tensor(0.0), 1.0))
            with pyro.plate("data", 3):
                y = pyro.sample("y", dist.Bernoulli(0.3))
                d = pyro.sample("d", dist.Bernoulli(0.2 + 0.5 * y))
                pyro.sample("x", dist.Normal(u + d, 1.0), obs=torch.zeros(3))

        def guide():
            a = pyro.param("a", torch.tensor([0.1, 0.4]))
            pyro.sample("u", dist.Normal(a[0], 1.0))
            with pyro.plate("data", 3):
                y = pyro.sample("y", dist.Bernoulli(logits=a[1]), infer=PARALLEL)
                pyro.sample("d", dist.Bernoulli(logits=a[y.long()]))

        pyro.clear_param_store()
        with pytest.raises(NotImplementedError, match=r"'d' have no path, and are drawn for each value"):
            IWAE_ELBO(K=1, estimator="score").loss_and_grads(model, guide)
        with pytest.raises(ValueError, match=r"Guide site\(s\) 'd' cannot be reparameterised"):
            IWAE_ELBO(K=1).loss_and_grads(model, guide)


@pytest.mark.parametrize("case", [Minibatch, TwoSites])
def test_scale_and_shape_of_particles(case):
    case = case()
    set_up(case)
    particles = IWAE_ELBO(K=4).particles(case.model, case.guide)
    assert particles.log_weights.shape == (4, len(case.values), 3)
    assert particles.scale == pytest.approx(case.outer)
    assert [plate.name for plate in particles.plates] == ["data"]

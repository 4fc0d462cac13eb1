"""Sites of the guide that are no latents of the model: right, or refused by name."""

import copy
import math
import pickle
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from pyro.infer.reparam import LocScaleReparam

from pyro_iw import IWAE_ELBO, ImportanceSampler
from pyro_iw.tracing.change_of_variables import change_of_variables
from pyro_iw.tracing.counterparts import pattern_of
from pyro_iw.tracing.traces import Pair, trace_pair

AUXILIARY = {"is_auxiliary": True}
X = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64)
#: log p(x_n) of :func:`model`; with a guide at the posterior every weight is that.
EXACT = dist.Normal(torch.zeros((), dtype=torch.float64), 2**0.5).log_prob(X)
RUNS = [{}, {"vectorize_particles": False}, {"chunk_size": 2}, {"backward_particles": 2}]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def plate():
    return pyro.plate("data", 3)


def model(more=lambda: None):
    """z_n ~ N(0, 1), x_n ~ N(z_n, 1), and more sites inside the plate."""
    with plate():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X)
        more()


def posterior():
    return pyro.sample("z", dist.Normal(X / 2, 0.5**0.5))


def verdict(guide, of=model, *args):
    pair = Pair(of, guide, args)
    traces = trace_pair(pair)
    return change_of_variables(pair, traces, pattern_of(traces).unmatched)


def noise(name="noise", scale=1.0, **keywords):
    return pyro.sample(name, dist.Normal(0.0, scale), infer=AUXILIARY, **keywords)


# The scale 1/2 of all of these has the log-determinant -log 2, and a mean off from the posterior's.
def shifted():
    with plate():
        pyro.sample("z", dist.Delta(X / 2 + 0.1 + noise() / 2, log_density=math.log(2)))


def by_factor():
    with plate():
        pyro.sample("z", dist.Delta(X / 2 + 0.1 + noise() / 2))
        pyro.factor("correction", torch.full((3,), math.log(2)), has_rsample=True)


def without_gradient():
    with torch.no_grad():
        shifted()


def unmarked():
    with plate():
        drawn = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Delta(X / 2 + 0.1 + drawn / 2, log_density=math.log(2)))


def in_two_steps():
    with plate():
        drawn = noise()
        middle = pyro.sample("middle", dist.Delta(drawn.exp(), log_density=-drawn), infer=AUXILIARY)
        z = X / 2 + 0.1 + middle.log() / 2
        pyro.sample("z", dist.Delta(z, log_density=math.log(2) + middle.log()))


def from_positive():
    with plate():
        drawn = pyro.sample("noise", dist.LogNormal(0.0, 1.0), infer=AUXILIARY)
        log = drawn.log()
        pyro.sample("z", dist.Delta(X / 2 + 0.1 + log / 2, log_density=math.log(2) + log))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    "guide", [shifted, by_factor, without_gradient, unmarked, in_two_steps, from_positive]
)
def test_a_change_of_variables_gives_the_evidence(guide, vectorize):
    torch.manual_seed(0)
    sampler = ImportanceSampler(model, guide, 4000, chunk_size=4000, vectorize_particles=vectorize)
    if not vectorize:
        sampler.num_particles = 100
    samples = sampler()
    error = (samples.log_weights - samples.log_marginal).exp().std(0) / math.sqrt(sampler.num_particles)
    assert ((samples.log_marginal - EXACT).abs() < 4 * error).all()
    IWAE_ELBO(K=3, vectorize_particles=vectorize).loss(model, guide)


def categorical():
    with plate():
        pyro.sample("k", dist.Categorical(torch.ones(2)), infer=AUXILIARY)
        posterior()


def categorical_shift():
    with plate():
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=AUXILIARY)
        pyro.sample("z", dist.Delta(X / 2 + k + noise() / 2, log_density=math.log(2)))


def continuous():
    with plate():
        pyro.sample("z", dist.Normal(X / 2 + 0.1 * noise("k"), 0.7))


def two_for_one():
    with plate():
        pyro.sample("z", dist.Delta(X / 2 + noise("k") + noise("j")))


def one_of_two():
    """As many Deltas as random numbers, of which one goes nowhere."""
    with plate():
        drawn = noise("j")
        noise("k")
        z = pyro.sample("z", dist.Delta(drawn))
        pyro.sample("w", dist.Delta(z + drawn))


def two_latents():
    model(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    ("guide", "of"),
    [
        (categorical, model),
        (categorical_shift, model),
        (continuous, model),
        (two_for_one, model),
        (one_of_two, two_latents),
    ],
)
def test_a_mixture_is_refused_by_the_sampler_and_named_in_training(guide, of, vectorize):
    run = {"vectorize_particles": vectorize}
    with pytest.raises(ValueError, match=r"'k'.* of the guide are no latents of the model.*mixture"):
        ImportanceSampler(of, guide, 10, **run).log_marginal()
    loss = IWAE_ELBO(K=3, **run)
    with pytest.warns(
        UserWarning, match=r"'k'.* of the guide are no latents of the model.*mixture"
    ) as caught:
        [loss.loss(of, guide) for _ in range(3)]
    assert len(caught) == 1


def mixture():
    return dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
    )


class TestWaysOutOfAMixture:
    def evidence(self, of, guide):
        torch.manual_seed(1)
        samples = ImportanceSampler(of, guide, 4000, chunk_size=4000)()
        error = (samples.log_weights - samples.log_marginal).exp().std(0) / math.sqrt(4000)
        assert ((samples.log_marginal - EXACT).abs() < 4 * error).all()

    def test_one_site(self):
        def guide():
            with plate():
                pyro.sample("z", mixture())

        self.evidence(model, guide)
        IWAE_ELBO(K=3, estimator="score").loss_and_grads(model, guide)

    def test_a_site_of_the_model(self):
        def guide():
            with plate():
                k = pyro.sample("k", dist.Categorical(torch.ones(2)))
                pyro.sample("z", dist.Normal(2.0 * k - 1, 1.0))

        def augmented():
            model(lambda: pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7]))))

        self.evidence(augmented, guide)


@pytest.mark.parametrize(("log_density", "off"), [(0.0, -3 * math.log(2)), (-math.log(2), -6 * math.log(2))])
def test_a_wrong_log_density(log_density, off):
    def guide():
        with plate():
            pyro.sample("z", dist.Delta(X / 2 + noise() / 2, log_density=log_density))

    with pytest.raises(ValueError, match=rf"'z' of the guide are Deltas of 'noise'.* off by {off:.3g} nats"):
        ImportanceSampler(model, guide, 10).log_marginal()
    with pytest.warns(UserWarning, match="'z' of the guide are Deltas of 'noise'"):
        IWAE_ELBO(K=3).loss(model, guide)


def test_fewer_random_numbers_than_coordinates():
    def guide():
        drawn = noise()
        with plate():
            pyro.sample("z", dist.Delta(X / 2 + drawn))

    with pytest.warns(UserWarning, match="'z' are Deltas with 3 free coordinates made of the 1 of 'noise'"):
        IWAE_ELBO(K=3, plates=()).loss(model, guide)


class TestPointEstimates:
    """Of the sampler, which claims the evidence."""

    def test_a_function_of_another_latent(self):
        def guide():
            with plate():
                z = posterior()
                pyro.sample("w", dist.Delta(2 * z))

        with pytest.warns(UserWarning, match="'w' is a point estimate"):
            ImportanceSampler(two_latents, guide, 10).log_marginal()
        IWAE_ELBO(K=3).loss(two_latents, guide)  # as good as AutoDelta

    def test_randomness_without_a_density(self):
        def guide():
            with plate():
                pyro.sample("z", dist.Delta(X / 2 + torch.randn(3)))

        with pytest.warns(UserWarning, match="'z' is a point estimate"):
            ImportanceSampler(model, guide, 10, vectorize_particles=False).log_marginal()

    def test_randomness_with_one(self):
        """A flow of the user's own, whose noise is no site."""

        def guide():
            with plate():
                drawn = torch.randn(3)
                density = dist.Normal(0.0, 1.0).log_prob(drawn) + math.log(2)
                pyro.sample("z", dist.Delta(X / 2 + drawn / 2, log_density=density))

        torch.manual_seed(0)
        sampler = ImportanceSampler(model, guide, 200, vectorize_particles=False)
        assert ((sampler.log_marginal() - EXACT).abs() < 0.1).all()


def test_a_factor_of_which_nothing_is_known():
    def guide():
        with plate():
            z = posterior()
            pyro.factor("tilt", 0.1 * z, has_rsample=True)

    with pytest.warns(UserWarning, match=r"pyro.factor\('tilt'\) of the guide counts as part of log q"):
        ImportanceSampler(model, guide, 10).log_marginal()


class TestObservedInTheModel:
    """p(x, w, z = 1): z ~ N(0, 1), w ~ N(z, 1), x_n ~ N(w, 1)."""

    def full(self):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        with plate():
            pyro.sample("x", dist.Normal(w, 1.0), obs=X)

    def guide(self):
        z = pyro.sample("z", dist.Normal(0.2, 0.5))
        pyro.sample("w", dist.Normal((z + X.sum()) / 4, 0.5))  # the posterior given z

    conditions = {"z": torch.tensor(1.0, dtype=torch.float64)}  # noqa: RUF012

    @property
    def exact(self):
        joint = dist.MultivariateNormal(torch.ones(3), torch.ones(3, 3) + torch.eye(3))
        return dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)) + joint.log_prob(X)

    @pytest.mark.parametrize("run", RUNS)
    def test_it_is_refused(self, run):
        conditioned = poutine.condition(self.full, data=self.conditions)
        with pytest.raises(ValueError, match="'z' is observed in the model, but the guide samples it"):
            IWAE_ELBO(K=3, **run).loss_and_grads(conditioned, self.guide)

    def test_the_sampler_refuses_it(self):
        conditioned = poutine.condition(self.full, data=self.conditions)
        with pytest.raises(ValueError, match="'z' is observed in the model, but the guide samples it"):
            ImportanceSampler(conditioned, self.guide, 10).log_marginal()

    @pytest.mark.parametrize("run", RUNS)
    def test_the_way_out(self, run):
        conditioned = poutine.condition(self.full, data=self.conditions)
        same = poutine.block(poutine.condition(self.guide, data=self.conditions), hide=["z"])
        loss = IWAE_ELBO(K=3, **run).loss(conditioned, same)
        assert loss == pytest.approx(-self.exact.item(), abs=1e-12)

    def test_an_autoguide_of_the_conditioned_model(self):
        conditioned = poutine.condition(self.full, data=self.conditions)
        with pytest.raises(ValueError, match="'z' is observed in the model"):
            IWAE_ELBO(K=3).loss(conditioned, AutoNormal(self.full))
        IWAE_ELBO(K=3).loss(conditioned, AutoNormal(conditioned))

    @pytest.mark.parametrize("run", [*RUNS, pytest.param({"compile": True}, marks=pytest.mark.slow)])
    def test_it_is_found_in_a_later_call(self, run):
        """Labels that are there in some calls only."""

        def labelled(y=None):
            with plate():
                y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
                z = pyro.sample("z", dist.Normal(y, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=X)

        def guide(y=None, always=False):
            with plate():
                if always or y is None:
                    y = pyro.sample("y", dist.Normal(X / 3, 0.8))
                pyro.sample("z", dist.Normal((X + y) / 2, 0.5**0.5))

        y = torch.tensor([0.1, 0.2, 0.3])
        exact = (dist.Normal(0.0, 1.0).log_prob(y) + dist.Normal(y, 2**0.5).log_prob(X)).sum()
        loss, always = IWAE_ELBO(K=3, **run), partial(guide, always=True)
        for _ in range(2):
            loss.loss_and_grads(labelled, guide)
            assert loss.loss_and_grads(labelled, guide, y) == pytest.approx(-exact.item(), abs=1e-12)
        loss.loss_and_grads(labelled, always)
        with pytest.raises(ValueError, match="'y' is observed in the model, but the guide samples it"):
            loss.loss_and_grads(labelled, always, y)


class TestObservedInTheGuide:
    def guide(self):
        a = pyro.param("a", torch.tensor(0.5))
        with plate():
            posterior()
            pyro.sample("label", dist.Normal(a, 0.1), obs=X)

    @pytest.mark.parametrize("run", RUNS)
    def test_its_density_does_not_count(self, run):
        loss = IWAE_ELBO(K=3, **run)
        with pytest.warns(UserWarning, match="'label' are observed in the guide.*does not count") as caught:
            values = [loss.loss_and_grads(model, self.guide) for _ in range(3)]
        assert len(caught) == 1
        assert values == pytest.approx([-EXACT.sum().item()] * 3, abs=1e-12)
        assert pyro.param("a").grad is None

    @pytest.mark.parametrize("vectorize", [True, False])
    def test_the_sampler_is_right(self, vectorize):
        values = ImportanceSampler(model, self.guide, 10, vectorize_particles=vectorize).log_marginal()
        assert torch.allclose(values, EXACT, atol=1e-12)

    def test_hidden(self):
        loss = IWAE_ELBO(K=3).loss(model, poutine.block(self.guide, hide=["label"]))
        assert loss == pytest.approx(-EXACT.sum().item(), abs=1e-12)

    def test_what_has_no_density_is_not_mentioned(self):
        def guide():
            with plate():
                z = posterior()
                pyro.deterministic("square", z**2)
                with poutine.mask(mask=False):
                    pyro.sample("label", dist.Normal(z, 0.1), obs=X)

        assert IWAE_ELBO(K=3).loss(model, guide) == pytest.approx(-EXACT.sum().item(), abs=1e-12)


@pytest.mark.parametrize("shape", ["plate", "batch"])
def test_more_values_than_the_model_has(shape):
    """A density that would count three times, with validation off too."""

    def single():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    def guide():
        if shape == "plate":
            with plate():
                pyro.sample("z", dist.Normal(0.2, 0.7))
        else:
            pyro.sample("z", dist.Normal(torch.full((3,), 0.2), 0.7))

    for validate in (True, False):
        with (
            pyro.validation_enabled(validate),
            pytest.raises(ValueError, match="shapes disagree at site 'z'"),
        ):
            IWAE_ELBO(K=3, vectorize_particles=False).loss(single, guide)


class TestGuidesOfPyro:
    """None of them may be taken for a mixture."""

    def model(self, x=X):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        pyro.sample("u", dist.Uniform(-1.0, 2.0))
        d = pyro.sample("d", dist.Dirichlet(torch.ones(3)))
        pyro.sample("v", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        pyro.sample("L", dist.LKJCholesky(3, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(p, s + 0.1))
            pyro.sample("x", dist.Normal(z + d[..., 0], 1.0), obs=x)

    def check(self, guide, of=None, exact=True):
        of = of or self.model
        guide(X)
        found = verdict(guide, of, X)
        assert found == ([], exact, None, None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            IWAE_ELBO(K=3, vectorize_particles=False, plates=()).loss_and_grads(of, guide, X)
            ImportanceSampler(of, guide, 3, vectorize_particles=False, plates=()).log_marginal(X)

    @pytest.mark.parametrize(
        "make",
        [
            AutoNormal,
            AutoDiagonalNormal,
            AutoMultivariateNormal,
            partial(AutoLowRankMultivariateNormal, rank=2),
            AutoIAFNormal,
            AutoGaussian,
            partial(AutoStructured, conditionals="mvn"),
            partial(AutoStructured, conditionals="normal", dependencies="linear"),
            partial(
                AutoNormalizingFlow,
                init_transform_fn=partial(dist.transforms.iterated, 2, dist.transforms.affine_autoregressive),
            ),
        ],
    )
    def test_autoguides(self, make):
        torch.manual_seed(0)
        self.check(make(self.model))

    @pytest.mark.parametrize("make", [AutoNormalMessenger, AutoHierarchicalNormalMessenger])
    def test_messengers(self, make):
        def of(x):
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, s))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        for guide in (make(of), AutoRegressiveMessenger(of)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                IWAE_ELBO(K=3, plates=()).loss_and_grads(of, guide, X)
                ImportanceSampler(of, guide, 3, plates=()).log_marginal(X)

    def test_a_list_with_points(self):
        guide = AutoGuideList(self.model)
        guide.append(AutoDelta(poutine.block(self.model, expose=["s", "p"])))
        guide.append(AutoNormal(poutine.block(self.model, hide=["s", "p"])))
        guide(X)
        assert verdict(guide, self.model, X) == (["s", "p"], True, None, None)
        IWAE_ELBO(K=3, vectorize_particles=False).loss(self.model, guide, X)

    def test_easyguide(self):
        class Guide(EasyGuide):
            def guide(self, x):
                group = self.group(match="s|p|u|d|v|L")
                loc = pyro.param("loc", torch.zeros(group.event_shape))
                group.sample("group", dist.Normal(loc, 0.3).to_event(1))
                with self.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(x, 0.3))

        def of(x):
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            p = pyro.sample("p", dist.Beta(2.0, 3.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(p, s))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        self.check(Guide(of), of)

    def test_reparameterised_models(self):
        def of(x):
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, s))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        of = poutine.reparam(of, config={"z": LocScaleReparam()})
        self.check(AutoNormal(of), of)

    def test_many_coordinates(self):
        """Of which the Jacobian is not looked at."""

        def of(x):
            with pyro.plate("data", 80):
                z = pyro.sample("z", dist.LogNormal(torch.zeros(80), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(80))

        self.check(AutoNormal(of), of, exact=False)

    def test_where_a_transform_saturates(self):
        def of(x):
            p = pyro.sample("p", dist.Beta(1.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Bernoulli(p), obs=torch.ones(3))

        guide = AutoNormal(of)
        guide(X)
        with torch.no_grad():
            guide.locs.p.fill_(60.0)
        assert verdict(guide, of, X).fault is None


class TestDiscrete:
    def model(self):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("x", dist.Normal(1.0 * k, 1.0), obs=X[0])

    def test_another_name_for_the_same_values(self):
        def guide():
            drawn = pyro.sample("j", dist.Categorical(torch.tensor([0.3, 0.3, 0.4])), infer=AUXILIARY)
            pyro.sample("k", dist.Delta(2 - drawn))

        torch.manual_seed(0)
        k = torch.arange(3.0)
        exact = (torch.tensor([0.2, 0.3, 0.5]).log() + dist.Normal(k, 1.0).log_prob(X[0])).logsumexp(0)
        value = ImportanceSampler(self.model, guide, 20_000, chunk_size=20_000).log_marginal()
        assert value.item() == pytest.approx(exact.item(), abs=0.02)

    def test_a_constant(self):
        def guide():
            pyro.sample("j", dist.Categorical(torch.tensor([0.3, 0.3, 0.4])), infer=AUXILIARY)
            pyro.sample("k", dist.Delta(torch.tensor(1)))

        with pytest.raises(ValueError, match="'j' of the guide are no latents"):
            ImportanceSampler(self.model, guide, 10).log_marginal()


def test_the_look_leaves_no_trace():
    """Random state and numbers are those of a pair that has been looked at before."""
    loss = IWAE_ELBO(K=3)
    torch.manual_seed(0)
    first, state = loss.loss(model, shifted), torch.get_rng_state()
    torch.manual_seed(0)
    assert loss.loss(model, shifted) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_losses_and_samplers_can_be_copied():
    loss = IWAE_ELBO(K=3)
    loss.loss(model, shifted)
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        with pytest.warns(UserWarning, match="'k'"):
            again.loss(model, categorical)
    copy.deepcopy(ImportanceSampler(model, shifted, 10)).log_marginal()

"""Model densities that end where the guide goes on: gradients that would miss it, numbers that are none."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints, transforms
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from torch.distributions import biject_to

from pyro_iw import IWAE_ELBO, MIWAE_ELBO, ImportanceSampler
from pyro_iw.tracing.supports import limits

X = torch.tensor(0.8, dtype=torch.float64)
K = 8
PATHS = ["reparam", "stl", "dreg"]
WAYS = [{}, {"chunk_size": 3}, {"backward_particles": 3}, {"vectorize_particles": False}, {"compile": True}]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def unvalidated():
    """With validation Pyro raises at the first particle outside."""
    with pyro.validation_enabled(False):
        yield


def param(name, value):
    return pyro.param(name, torch.as_tensor(value).clone())


def normal(path=True):
    return dist.Normal(param("m", 0.7), param("s", 0.2)).has_rsample_(path)


def site(fn, likelihood=lambda z: pyro.sample("x", dist.Normal(z, 0.3), obs=X)):
    """A model of one latent with the prior that ``fn`` makes."""

    def run():
        z = pyro.sample("z", fn())
        likelihood(z)

    return run


def proposal(fn):
    def run():
        pyro.sample("z", fn())

    return run


def transformed(base, *parts):
    return dist.TransformedDistribution(base, list(parts))


def unit():
    return dist.Uniform(0.0, 1.0)


def exact(log_prior, ends, n=4000):
    r"""Gradients of -E[log mean w] over cells with a living particle, by quadrature.

    :math:`\log x = \int_0^\infty (e^{-t} - e^{-tx})\, dt / t`, and :math:`E e^{-t\, \mathrm{mean} w}` is
    :math:`(E e^{-t w / K})^K`, which takes one integral over z.
    """
    m, s = (torch.tensor(value, requires_grad=True) for value in (0.7, 0.2))
    low, high = ends
    step = (high - low) / n
    z = low + step * (torch.arange(n) + 0.5)
    log_q = dist.Normal(m, s).log_prob(z)
    w = (log_prior(z) + dist.Normal(z, 0.3).log_prob(X) - log_q).exp()
    q = step * log_q.exp()
    dead = 1 - q.sum()
    t = torch.logspace(-9, 9, 600)
    laplace = (dead + torch.exp(-t[:, None] * w / K) @ q) ** K - dead**K
    value = torch.trapezoid((1 - dead**K) * torch.exp(-t) - laplace, t.log())
    return torch.stack(torch.autograd.grad(-value, (m, s)))


def gradients(estimator, model, guide, runs=30):
    loss = MIWAE_ELBO(M=4000, K=K, estimator=estimator)
    rows = []
    for seed in range(runs):
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        loss.loss_and_grads(model, guide)
        rows.append(torch.stack([pyro.param(name).grad for name in ("m", "s")]))
    table = torch.stack(rows)
    return table.mean(0), table.std(0) / runs**0.5


@pytest.mark.slow
@pytest.mark.usefixtures("unvalidated")
@pytest.mark.parametrize("estimator", ["score", "vimco"])
def test_without_a_path_the_gradient_is_right(estimator):
    truth = exact(unit().log_prob, (0.0, 1.0))
    mean, error = gradients(estimator, site(unit), proposal(lambda: normal(path=False)))
    assert (error < 0.01).all()
    assert ((mean - truth).abs() < 4 * error).all(), (mean, truth, error)


@pytest.mark.usefixtures("unvalidated")
@pytest.mark.parametrize("estimator", [*PATHS, "score"])
def test_along_a_path_it_is_not_and_there_is_a_warning(estimator):
    """reparam has (-1.35, -2.56) for (.07, -.25)."""
    truth = exact(unit().log_prob, (0.0, 1.0))
    with pytest.warns(
        UserWarning, match=r"'z' \(Uniform\) is confined to \[0, 1\], but the guide \(Normal\)"
    ):
        mean, error = gradients(estimator, site(unit), proposal(normal), runs=5)
    assert ((mean - truth).abs() > 20 * error).any()


@pytest.mark.usefixtures("unvalidated")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_it_is_given_once_whatever_the_way_of_running(way):
    model, guide = site(unit), proposal(normal)
    loss = IWAE_ELBO(K=K, **way)
    loss.loss(model, guide)  # no gradient, no warning
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            loss.loss_and_grads(model, guide)
    assert sum("is confined to" in str(warning.message) for warning in caught) == 1


def learnt():
    return param("theta", 1.0)


JUMPS = {
    "Uniform": unit,
    "HalfNormal": lambda: dist.HalfNormal(1.0),
    "HalfCauchy": lambda: dist.HalfCauchy(1.0),
    "rows": lambda: dist.Uniform(torch.zeros(2), torch.tensor([1.0, 9.0])).to_event(1).mask(True),
    "scaled": lambda: transformed(unit(), transforms.AffineTransform(1.0, -2.0)),
    "Kumaraswamy(1, 1)": lambda: dist.Kumaraswamy(1.0, 1.0),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Uniform(torch.tensor([0.0, 0.5]), torch.tensor([0.7, 1.0]))
    ),
}


@pytest.mark.usefixtures("unvalidated")
@pytest.mark.parametrize("case", JUMPS)
def test_priors_that_jump(case):
    def event():
        event_shape = JUMPS[case]().event_shape
        return normal().expand(event_shape).to_event(len(event_shape))

    model = site(JUMPS[case], lambda z: None)
    pyro.set_rng_seed(0)
    with pytest.warns(UserWarning, match=r"'z' \(.*jumps to 0 at the end.*estimator='rws'"):
        IWAE_ELBO(K=K).loss_and_grads(model, proposal(event))
    IWAE_ELBO(K=K, estimator="rws").loss_and_grads(model, proposal(event))
    IWAE_ELBO(K=K).loss(model, proposal(event))


@pytest.mark.usefixtures("unvalidated")
@pytest.mark.parametrize("estimator", ["reparam", "vimco", "rws"])
def test_an_end_that_moves_is_missed_by_all_estimators(estimator):
    model = site(lambda: dist.Uniform(0.0, learnt()))
    guide = proposal(lambda: normal(path=estimator == "reparam"))
    with pytest.warns(UserWarning, match=r"what the ends move with.*sample u where the ends stay"):
        IWAE_ELBO(K=K, estimator=estimator).loss_and_grads(model, guide)


class Triangle(dist.TorchDistribution):
    """Falls to 0 at its ends."""

    support = constraints.interval(0.0, 1.0)
    arg_constraints = {}  # noqa: RUF012

    def log_prob(self, value):
        return torch.minimum(value, 1 - value).clamp(min=0.0).log() + math.log(4)


SOUND = {
    "falls": (Triangle, normal),
    "Normal": (lambda: dist.Normal(0.0, 1.0), normal),
    "wider": (lambda: dist.Uniform(-1.0, 2.0), unit),
    "Beta": (unit, lambda: dist.Beta(2.0, 2.0)),
    "scaled Beta": (
        lambda: dist.Uniform(0.1, 0.3),
        lambda: transformed(dist.Beta(2.0, 2.0), transforms.AffineTransform(0.1, 0.2)),
    ),
    "bijection": (
        lambda: dist.Uniform(0.1, 0.3),
        lambda: transformed(normal(), biject_to(constraints.interval(0.1, 0.3))),
    ),
    "bijection to a half-line": (
        lambda: dist.Exponential(1.0),
        lambda: transformed(normal(), biject_to(constraints.positive)),
    ),
    "LogNormal": (lambda: dist.HalfNormal(1.0), lambda: dist.LogNormal(param("m", 0.1), 0.3)),
    "same end that moves": (lambda: dist.Uniform(0.0, learnt()), lambda: dist.Uniform(0.0, learnt())),
    "point": (unit, lambda: dist.Delta(param("m", 0.4))),
    "flat": (lambda: dist.HalfNormal(1.0).mask(False), normal),
    "counts": (lambda: dist.Binomial(3, 0.5), lambda: dist.Poisson(param("rate", 0.01))),
}


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("case", SOUND)
def test_what_is_sound_is_let_pass(case, validate):
    prior, guide = SOUND[case]
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(validate):
        loss = IWAE_ELBO(K=K, estimator="score" if case == "counts" else "auto")
        assert math.isfinite(loss.loss_and_grads(site(prior), proposal(guide)))


@pytest.mark.parametrize("auto", [AutoNormal, AutoDelta, AutoDiagonalNormal])
@pytest.mark.parametrize(
    "prior", [*JUMPS.values(), lambda: dist.Exponential(1.0), lambda: dist.Pareto(1.0, 2.0)]
)
@pytest.mark.usefixtures("unvalidated")
def test_guides_of_pyro_have_the_priors_support(auto, prior):
    if type(prior()) in (dist.TransformedDistribution, dist.MixtureSameFamily):
        pytest.skip("Pyro takes their support for another one")
    model = site(prior, lambda z: None)
    IWAE_ELBO(K=K).loss_and_grads(model, auto(model))


HARD = {
    "Uniform": lambda z: pyro.sample("x", dist.Uniform(z - 0.3, z + 0.3), obs=X),
    "factor": lambda z: pyro.factor("x", torch.where(z > 0.7, 0.0, -math.inf)),
}


@pytest.mark.usefixtures("unvalidated")
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("case", HARD)
def test_likelihoods_that_jump(case, vectorize):
    model = site(lambda: dist.Normal(0.5, 1.0), HARD[case])
    pyro.set_rng_seed(0)
    with pytest.warns(UserWarning, match=r"Site\(s\) 'x' of the model give zero density to some particles"):
        IWAE_ELBO(K=K, vectorize_particles=vectorize).loss_and_grads(model, proposal(normal))
    guide = proposal(lambda: normal(path=False))
    IWAE_ELBO(K=K, estimator="vimco", vectorize_particles=vectorize).loss_and_grads(model, guide)
    IWAE_ELBO(K=K, estimator="rws", vectorize_particles=vectorize).loss_and_grads(model, proposal(normal))


def test_particles_that_a_discrete_draw_kills_are_no_jump():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("x", torch.where(k > 0, 0.0, -math.inf))

    def guide():
        pyro.sample("k", dist.Bernoulli(param("p", 0.6)))
        pyro.sample("z", normal())

    pyro.set_rng_seed(0)
    IWAE_ELBO(K=K, estimator="vimco").loss_and_grads(model, guide)


# Densities that are none.

WRONG = {
    "Exponential": lambda: dist.Exponential(2.0),
    "Pareto": lambda: dist.Pareto(0.7, 2.0),
    "ContinuousBernoulli": lambda: dist.ContinuousBernoulli(0.3),
    "flat Beta": lambda: dist.Beta(1.0, 1.0),
    "Gamma(1)": lambda: dist.Gamma(1.0, 1.0),
    "Kumaraswamy": lambda: dist.Kumaraswamy(2.0, 2.0),
}


@pytest.mark.usefixtures("unvalidated")
@pytest.mark.parametrize("case", WRONG)
def test_a_number_outside_the_support_is_no_density(case):
    """The sampler had -.88 for Exponential(2)'s log evidence of -.93 under this guide."""
    model = site(WRONG[case])
    match = r"'z' \(.*is confined to .*gives a number that is no density"
    for loss in (IWAE_ELBO(K=1), IWAE_ELBO(K=K), IWAE_ELBO(K=K, estimator="rws")):
        with pytest.warns(UserWarning, match=match):
            loss.loss_and_grads(model, proposal(normal))
    with pytest.warns(UserWarning, match=match):
        ImportanceSampler(model, proposal(normal), 100, progress=False).log_marginal()


@pytest.mark.parametrize("prior", [unit, *WRONG.values()])
def test_with_validation_the_error_says_what_to_do(prior):
    guide = proposal(lambda: dist.Normal(0.7, 1.0))
    pyro.set_rng_seed(0)
    with pytest.raises(
        ValueError, match=r"(?s)'z'.*The guide proposes values that the prior excludes\. Give 'z'"
    ):
        IWAE_ELBO(K=200).loss_and_grads(site(prior), guide)


# Limits.

LIMITS = {
    "real": (lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), (-math.inf, math.inf)),
    "half": (lambda: dist.HalfNormal(1.0), (0.0, math.inf)),
    "scaled": (lambda: transformed(unit(), transforms.AffineTransform(1.0, -2.0)), (-1.0, 1.0)),
    "negative half": (
        lambda: transformed(dist.HalfNormal(1.0), transforms.AffineTransform(1.0, -2.0)),
        (-math.inf, 1.0),
    ),
    "exp of an interval": (lambda: transformed(unit(), transforms.ExpTransform()), (1.0, math.e)),
    "exp of a number": (lambda: dist.LogNormal(0.0, 1.0), (0.0, math.inf)),
    "logit": (lambda: transformed(unit(), transforms.SigmoidTransform().inv), (-math.inf, math.inf)),
    "sigmoid, scaled": (
        lambda: transformed(
            dist.Normal(0.0, 1.0), transforms.SigmoidTransform(), transforms.AffineTransform(0.0, 2.0)
        ),
        (0.0, 2.0),
    ),
    "mixture": (JUMPS["mixture"], (0.0, 1.0)),
    "counts": (lambda: dist.Binomial(3, 0.5), (0, 3)),
}


@pytest.mark.parametrize("case", LIMITS)
def test_limits(case):
    make, wanted = LIMITS[case]
    found = [float(end) for end in limits(make())]
    assert found == pytest.approx(list(wanted))


@pytest.mark.parametrize(
    "fn", [dist.Dirichlet(torch.ones(3)), transformed(unit(), transforms.AbsTransform())], ids=str
)
def test_limits_that_are_not_known(fn):
    assert limits(fn) is None


def test_the_sampler_knows_where_a_transformed_prior_ends():
    """It said that the prior reaches over [-inf, inf]."""
    scaled = lambda low, high: transformed(unit(), transforms.AffineTransform(low, high - low))  # noqa: E731
    model = site(lambda: scaled(0.1, 2.1))
    for guide in (lambda: dist.Uniform(0.1, 2.1), lambda: scaled(0.1, 2.1), lambda: scaled(0.1, 2.3)):
        pyro.set_rng_seed(0)
        with pyro.validation_enabled(False):
            ImportanceSampler(model, proposal(guide), 50, progress=False).log_marginal()
    with pytest.raises(ValueError, match=r"from \[0.1, 2\], but the model's prior reaches over \[0.1, 2.1\]"):
        ImportanceSampler(model, proposal(lambda: scaled(0.1, 2.0)), 50, progress=False).log_marginal()


def test_a_guide_that_goes_beyond_an_angle_is_named() -> None:
    """VonMises.log_prob goes on beyond pi, though nothing is drawn there: the bound would count it again."""

    def model():
        pyro.sample("z", dist.VonMises(torch.tensor(0.0), 0.05))

    def guide():
        pyro.sample("z", dist.Normal(0.0, pyro.param("s", torch.tensor(3.0))))

    with pytest.warns(UserWarning, match=r"'z' \(VonMises\) is confined to \[-3.14159, 3.14159\]"):
        IWAE_ELBO(8).loss_and_grads(model, guide)

    def angle():
        pyro.sample("z", dist.VonMises(0.0, pyro.param("k", torch.tensor(0.5))))

    assert abs(-IWAE_ELBO(8000, estimator="score").loss(model, angle)) < 0.03


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal])
def test_a_guide_that_makes_an_angle_of_a_real_number_is_named(auto) -> None:
    """AutoNormal takes a VonMises for what it says of itself: its support are all real numbers."""

    def model():
        pyro.sample("z", dist.VonMises(torch.tensor(0.0), 0.05))

    with pytest.warns(UserWarning, match=r"'z' is a Delta that goes beyond -pi and pi, but .* \(VonMises\)"):
        IWAE_ELBO(8).loss(model, auto(model))
    with pytest.warns(UserWarning, match=r"Give 'z' a guide with the prior's support: dist.VonMises, or"):
        ImportanceSampler(model, auto(model), 8).log_marginal()


def test_a_guide_that_makes_an_angle_of_a_bounded_one_is_right() -> None:
    """What the warning advises, as a Delta: p = 1, and nobody warns."""
    to_circle = biject_to(constraints.interval(-math.pi, math.pi))

    def model():
        pyro.sample("z", dist.VonMises(torch.tensor(0.0), 0.05))

    def guide():
        u = pyro.sample("u", dist.Normal(0.0, 1.7), infer={"is_auxiliary": True})
        z = to_circle(u)
        pyro.sample("z", dist.Delta(z, log_density=-to_circle.log_abs_det_jacobian(u, z)))

    pyro.set_rng_seed(0)
    assert abs(ImportanceSampler(model, guide, 8000).log_marginal()) < 0.03

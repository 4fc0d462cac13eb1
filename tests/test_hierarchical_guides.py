"""Two levels of particles with guides as users write them; plates side by side, nested, and around."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.contrib.easyguide import easy_guide
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.optim import ClippedAdam

import pyro_iw
from pyro_iw import CIWAE_ELBO, IWAE_ELBO, LocallyEnhancedELBO
from pyro_iw.bounds import CIWAE, IWAE, MIWAE

N = 12


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def x():
    return 1 + 1.5 * torch.randn(N, generator=torch.Generator().manual_seed(3))


def model(x, size=None):
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, size) as i:
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def log_evidence(x):
    """All is normal: x has the covariance 2 on the diagonal and 1 everywhere."""
    covariance = 2 * torch.eye(N) + torch.ones(N, N)
    return torch.distributions.MultivariateNormal(torch.zeros(N), covariance).log_prob(x).item()


def positive(name, value):
    return pyro.param(name, value, constraint=dist.constraints.positive)


def guide_list():
    guide = AutoGuideList(model, create_plates=lambda x, size=None: pyro.plate("data", N, size))
    guide.append(AutoDiagonalNormal(poutine.block(model, expose=["g"])))
    guide.append(AutoNormal(poutine.block(model, hide=["g"])))
    return guide


def guide_by_easyguide():
    @easy_guide(model)
    def guide(self, x, size=None):
        top = self.group(match="g")
        loc, scale = pyro.param("loc", torch.zeros(1)), positive("scale", torch.ones(1) / 10)
        top.sample("top", dist.Normal(loc, scale).to_event(1))
        with self.plate("data", N, size, dim=-1):
            local = self.group(match="z")
            loc = pyro.param("locs", torch.zeros(N, 1), event_dim=1)
            scale = pyro.param(
                "scales", torch.ones(N, 1) / 10, event_dim=1, constraint=dist.constraints.positive
            )
            local.sample("local", dist.Normal(loc, scale).to_event(1))

    return guide


def amortised():
    torch.manual_seed(0)
    network = torch.nn.Linear(2, 2).double()

    def guide(x, size=None):
        pyro.module("network", network)
        loc, scale = pyro.param("loc", torch.tensor(0.0)), positive("scale", torch.tensor(0.1))
        g = pyro.sample("g", dist.Normal(loc, scale))
        with pyro.plate("data", N, size) as i:
            loc, log_scale = network(torch.stack(torch.broadcast_tensors(g, x[i]), -1)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return guide


def plates_of(x, size=None):
    return pyro.plate("data", N, size)


GUIDES = {
    "AutoNormal": lambda: AutoNormal(model, create_plates=plates_of),
    "AutoGuideList": guide_list,
    "EasyGuide": guide_by_easyguide,
    "AutoNormalMessenger": lambda: AutoNormalMessenger(model),
    "AutoHierarchicalNormalMessenger": lambda: AutoHierarchicalNormalMessenger(model),
    "amortised": amortised,
}
guides = pytest.mark.parametrize("name", list(GUIDES))
sizes = pytest.mark.parametrize("size", [None, 5])


@sizes
@guides
def test_one_particle_of_each_is_trace_elbo(name, size, x):
    guide = GUIDES[name]()
    loss = LocallyEnhancedELBO(local=IWAE(1), over="data")
    loss.loss(model, guide, x, size)  # a first look at the pair draws numbers, too

    def evaluated(elbo):
        pyro.set_rng_seed(1)
        value = elbo.loss_and_grads(model, guide, x, size)
        grads = {}
        for key, parameter in pyro.get_param_store().named_parameters():
            grads[key], parameter.grad = parameter.grad.clone(), None
        return value, grads

    (value, grads), (wanted, their) = evaluated(loss), evaluated(Trace_ELBO())
    assert value == pytest.approx(wanted, rel=1e-10)
    assert grads.keys() == their.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, their[key], msg=key)


@pytest.mark.slow
@guides
def test_minibatches_agree_with_all_data(name, x):
    guide = GUIDES[name]()
    loss = LocallyEnhancedELBO(local=IWAE(4), over="data", outer=MIWAE(3, 1))
    with torch.no_grad():
        values = {
            size: torch.tensor([loss.loss(model, guide, x, size) for _ in range(100)]) for size in (5, None)
        }
    assert values[None].std() > 0
    error = sum(found.var() / len(found) for found in values.values()).sqrt().item()
    assert values[5].mean().item() == pytest.approx(values[None].mean().item(), abs=4 * error)


@pytest.mark.parametrize("estimator", ["reparam", "stl", "dreg"])
@sizes
@guides
def test_every_parameter_learns(name, size, estimator, x):
    guide = GUIDES[name]()
    loss = LocallyEnhancedELBO(local=CIWAE(4, 0.3), over="data", outer=MIWAE(2, 1), estimator=estimator)
    loss.loss(model, guide, x, size)
    loss.loss_and_grads(model, guide, x, size)
    parameters = dict(pyro.get_param_store().named_parameters())
    assert parameters
    parameters.pop("weights.g", None)  # of the prior's location, which is 0
    for key, parameter in parameters.items():
        assert parameter.grad.isfinite().all(), key
        # Of what belongs to an index of the plate, those of the minibatch alone.
        assert (
            parameter.grad.count_nonzero() == (size or N)
            if len(parameter.shape) and parameter.shape[0] == N
            else parameter.grad.any()
        ), key


@pytest.mark.slow
@sizes
@guides
def test_training_climbs_to_the_evidence(name, size, x):
    guide = GUIDES[name]()
    loss = LocallyEnhancedELBO(local=IWAE(16), over="data", outer=MIWAE(2, 1), estimator="dreg")
    svi = SVI(model, guide, ClippedAdam({"lr": 0.05, "lrd": 0.02 ** (1 / 400)}), loss=loss)
    first = svi.step(x, size)
    for _ in range(400):
        svi.step(x, size)
    with torch.no_grad():
        bounds = -torch.tensor([loss.loss(model, guide, x) for _ in range(200)])
    error = bounds.std().item() / len(bounds) ** 0.5
    truth = log_evidence(x)
    assert bounds.mean() < truth + 4 * error
    assert bounds.mean() > truth - (0.5 if size is None else 1.3)  # from 12 rows of 5, noise is left
    assert -first < truth - 2


@pytest.mark.parametrize(
    "auto",
    [
        AutoDiagonalNormal,
        AutoMultivariateNormal,
        AutoLowRankMultivariateNormal,
        AutoDelta,
        lambda model: AutoStructured(model, conditionals={"g": "normal", "z": "normal"}),
    ],
)
def test_joint_latents_are_refused_by_name(auto, x):
    loss = LocallyEnhancedELBO(local=IWAE(4), over="data")
    with pytest.raises(ValueError, match=r"draws nothing inside plate 'data' .*\['z'\].*AutoNormal"):
        loss.loss(model, auto(model), x)


# Values against loops over the particles that were drawn.


def normal(value, loc, scale):
    return -0.5 * ((value - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


def lme(values):
    return torch.stack(values).logsumexp(0) - math.log(len(values))


def values_of(levels):
    """The guide's draws by site."""
    return {site.name: site.message["value"] for site in levels.sites if site.role == "guide"}


def bound_and_draws(loss, *pair):
    """The value that the loss gives, and the draws that gave it."""
    pyro.set_rng_seed(2)
    loss.loss(*pair)
    pyro.set_rng_seed(3)
    value = -loss.loss(*pair)
    pyro.set_rng_seed(3)
    return value, values_of(loss.particles(*pair))


@pytest.mark.parametrize("outer", [MIWAE(3, 1), IWAE(3)])
@pytest.mark.parametrize("rows_of", [None, 2])
def test_two_plates_side_by_side(rows_of, outer):
    y = torch.linspace(-1, 2, 4)
    t = torch.linspace(-2, 1, 3)

    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4, rows_of, dim=-1) as i:
            r = pyro.sample("r", dist.Normal(g, 1.0))
            pyro.sample("y", dist.Normal(r, 0.5), obs=y[i])
        with pyro.plate("columns", 3, dim=-2):
            c = pyro.sample("c", dist.Normal(0.5 * g, 2.0))
            pyro.sample("t", dist.Normal(c, 0.7), obs=t[:, None])

    def guide():
        g = pyro.sample("g", dist.Normal(0.2, 0.8))
        with pyro.plate("rows", 4, rows_of, dim=-1) as i:
            pyro.sample("r", dist.Normal(0.6 * y[i] + 0.3 * g, 0.9))
        with pyro.plate("columns", 3, dim=-2):
            pyro.sample("c", dist.Normal(0.8 * t[:, None], 1.1))

    loss = LocallyEnhancedELBO(local={"rows": IWAE(5), "columns": CIWAE(2, 0.3)}, outer=outer)
    if rows_of is not None and outer.K > 1:
        with pytest.raises(ValueError, match=r"'rows' .*subsampled \(2 of 4\).*outer=MIWAE"):
            loss.loss(model, guide)
        return
    value, draws = bound_and_draws(loss, model, guide)
    size = rows_of or 4
    g, r, c = draws["g"].reshape(3), draws["r"].reshape(3, 5, size), draws["c"].reshape(3, 2, 3)
    minibatches = itertools.permutations(range(4), size)

    def by_hand(index):
        totals = []
        for s in range(3):
            total = normal(g[s], 0.0, 1.0) - normal(g[s], 0.2, 0.8)
            for b, n in enumerate(index):
                log_w = [
                    normal(r[s, j, b], g[s], 1.0)
                    + normal(y[n], r[s, j, b], 0.5)
                    - normal(r[s, j, b], 0.6 * y[n] + 0.3 * g[s], 0.9)
                    for j in range(5)
                ]
                total = total + 4 / size * lme(log_w)
            for m in range(3):
                log_w = [
                    normal(c[s, j, m], 0.5 * g[s], 2.0)
                    + normal(t[m], c[s, j, m], 0.7)
                    - normal(c[s, j, m], 0.8 * t[m], 1.1)
                    for j in range(2)
                ]
                total = total + 0.3 * sum(log_w) / 2 + 0.7 * lme(log_w)
            totals.append(total)
        return (sum(totals) / 3 if outer.K == 1 else lme(totals)).item()

    assert any(value == pytest.approx(by_hand(index), rel=1e-9) for index in minibatches)


CLASSES, PUPILS = 3, 2


def nested_model(y):
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("classes", CLASSES, dim=-2):
        z = pyro.sample("z", dist.Normal(g, 1.0))
        with pyro.plate("pupils", PUPILS, dim=-1):
            w = pyro.sample("w", dist.Normal(z, 0.6))
            pyro.sample("y", dist.Normal(w, 0.8), obs=y)


def nested_guide(y):
    g = pyro.sample("g", dist.Normal(0.3, 0.7))
    with pyro.plate("classes", CLASSES, dim=-2):
        z = pyro.sample("z", dist.Normal(0.5 * g + 0.2 * y.mean(-1, keepdim=True), 0.9))
        with pyro.plate("pupils", PUPILS, dim=-1):
            pyro.sample("w", dist.Normal(0.5 * y + 0.4 * z, 0.7))


@pytest.mark.parametrize("over", ["classes", "pupils"])
def test_nested_plates(over):
    """The outer one: what lies deeper is in its cell. The inner one: the outer's latents are above."""
    y = torch.linspace(-1.0, 2.0, CLASSES * PUPILS).reshape(CLASSES, PUPILS)
    S, L = 2, 4
    loss = LocallyEnhancedELBO(local=IWAE(L), over=over, outer=IWAE(S))
    value, draws = bound_and_draws(loss, nested_model, nested_guide, y)
    g = draws["g"].reshape(S)
    z = draws["z"].reshape(S, -1, CLASSES)  # of one, or of every local particle
    w = draws["w"].reshape(S, L, CLASSES, PUPILS)

    def of_class(s, j, c):
        loc = 0.5 * g[s] + 0.2 * y[c].mean()
        return normal(z[s, j, c], g[s], 1.0) - normal(z[s, j, c], loc, 0.9)

    def of_pupil(s, j, c, p, above):
        own = w[s, j, c, p]
        log_p = normal(own, above, 0.6) + normal(y[c, p], own, 0.8)
        return log_p - normal(own, 0.5 * y[c, p] + 0.4 * above, 0.7)

    totals = []
    for s in range(S):
        total = normal(g[s], 0.0, 1.0) - normal(g[s], 0.3, 0.7)
        for c in range(CLASSES):
            if over == "classes":
                cell = [
                    of_class(s, j, c) + sum(of_pupil(s, j, c, p, z[s, j, c]) for p in range(PUPILS))
                    for j in range(L)
                ]
                total = total + lme(cell)
            else:
                total = total + of_class(s, 0, c)
                for p in range(PUPILS):
                    total = total + lme([of_pupil(s, j, c, p, z[s, 0, c]) for j in range(L)])
        totals.append(total)
    assert value == pytest.approx(lme(totals).item(), rel=1e-9)


@pytest.mark.parametrize("size", [None, 2])
def test_a_plate_around_both_levels_has_an_outer_bound_for_each_index(size):
    """Schools with a latent each, and pupils in them: nothing is shared, and schools may be a minibatch."""
    schools, pupils, S, L = 3, 2, 2, 4
    y = torch.linspace(-1.0, 2.0, schools * pupils).reshape(pupils, schools)

    def model():
        with pyro.plate("schools", schools, size, dim=-1) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pupils", pupils, dim=-2):
                w = pyro.sample("w", dist.Normal(z, 0.6))
                pyro.sample("y", dist.Normal(w, 0.8), obs=y[:, i])

    def guide():
        with pyro.plate("schools", schools, size, dim=-1) as i:
            z = pyro.sample("z", dist.Normal(0.5 * y[:, i].mean(0), 0.9))
            with pyro.plate("pupils", pupils, dim=-2):
                pyro.sample("w", dist.Normal(0.5 * y[:, i] + 0.4 * z, 0.7))

    loss = LocallyEnhancedELBO(local=IWAE(L), over="pupils", outer=IWAE(S))
    value, draws = bound_and_draws(loss, model, guide)
    kept = size or schools
    z, w = draws["z"].reshape(S, kept), draws["w"].reshape(S, L, pupils, kept)

    def by_hand(index):
        total = 0.0
        for b, n in enumerate(index):
            rows = []
            for s in range(S):
                row = normal(z[s, b], 0.0, 1.0) - normal(z[s, b], 0.5 * y[:, n].mean(), 0.9)
                for p in range(pupils):
                    own = w[s, :, p, b]
                    log_w = normal(own, z[s, b], 0.6) + normal(y[p, n], own, 0.8)
                    log_w = log_w - normal(own, 0.5 * y[p, n] + 0.4 * z[s, b], 0.7)
                    row = row + lme(list(log_w))
                rows.append(row)
            total = total + schools / kept * lme(rows)
        return total.item()

    minibatches = itertools.permutations(range(schools), kept)
    assert any(value == pytest.approx(by_hand(index), rel=1e-9) for index in minibatches)


# What errors and warnings of joint weights advise.


def pasted(message):
    """The loss that a message names."""
    start = message.index("LocallyEnhancedELBO(")
    text = message[start : message.index("')", start) + 2]
    return eval(text, {"LocallyEnhancedELBO": LocallyEnhancedELBO, "pyro_iw": pyro_iw})


def test_the_way_out_of_minibatches_is_named_first_and_works(x):
    guide = AutoNormal(model, create_plates=plates_of)
    with pytest.raises(
        ValueError, match=r"is subsampled \(5 of 12\).* K > 1\. Take LocallyEnhanced"
    ) as caught:
        IWAE_ELBO(K=4).loss(model, guide, x, 5)
    loss = pasted(str(caught.value))
    assert repr(loss) == "LocallyEnhancedELBO(local=IWAE(K=16), over='data', outer=MIWAE(M=1, K=1))"
    assert math.isfinite(loss.loss(model, guide, x, 5))


def test_with_a_joint_guide_another_is_named_too(x):
    with pytest.raises(ValueError, match=r"with a guide that draws .* \(AutoNormal\)") as caught:
        CIWAE_ELBO(K=4, beta=0.3).loss(model, AutoDiagonalNormal(model), x, 5)
    loss = pasted(str(caught.value))
    pyro.clear_param_store()
    assert math.isfinite(loss.loss(model, AutoNormal(model), x, 5))


def test_no_such_way_without_latents_in_the_plate():
    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 9, 3):
            pyro.sample("x", dist.Normal(g, 1.0), obs=torch.ones(3))

    with pytest.raises(ValueError, match=r"K > 1\. Run the plate") as caught:
        IWAE_ELBO(K=4).loss(model, AutoNormal(model))
    assert "LocallyEnhanced" not in str(caught.value)


def test_a_plate_that_is_not_kept_for_a_global_latent(x):
    guide = AutoNormal(model)
    with pytest.raises(ValueError, match=r"'data' cannot be kept: .*'g' \(model\)") as caught:
        IWAE_ELBO(K=4, plates="data").loss(model, guide, x)
    assert math.isfinite(pasted(str(caught.value)).loss(model, guide, x))


def test_a_factor_outside_of_the_plate():
    x = torch.linspace(-1, 1, 3)

    def model():
        loc = pyro.param("loc", torch.tensor(0.3))
        pyro.factor("regulariser", -(loc**2))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.5 * x, 0.8))

    with pytest.warns(UserWarning, match="Take LocallyEnhancedELBO") as caught:
        IWAE_ELBO(K=4).loss(model, guide)
    value, draws = bound_and_draws(pasted(str(caught[0].message)), model, guide)
    z = draws["z"].reshape(16, 3)
    log_w = normal(z, 0.3, 1.0) + normal(x, z, 1.0) - normal(z, 0.5 * x, 0.8)
    assert value == pytest.approx(lme(list(log_w)).sum().item() - 0.09, rel=1e-9)


def test_a_minibatch_within_a_local_cell_goes_one_level_down():
    """Pupils are a minibatch, and each class has one weight for all of its pupils."""
    y = torch.linspace(-1.0, 2.0, 12).reshape(3, 4)

    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("classes", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            with pyro.plate("pupils", 4, 2, dim=-1) as i:
                w = pyro.sample("w", dist.Normal(z, 0.6))
                pyro.sample("y", dist.Normal(w, 0.8), obs=y[:, i])

    loss = LocallyEnhancedELBO(local=IWAE(4), over="classes")
    with pytest.raises(ValueError, match=r"'pupils' is subsampled \(2 of 4\).*over='pupils'") as caught:
        loss.loss(model, AutoNormal(model))
    assert math.isfinite(pasted(str(caught.value)).loss(model, AutoNormal(model)))

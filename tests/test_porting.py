"""Ordinary Pyro pairs under the package's losses: one changed line, a finite and falling loss."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam, ClippedAdam
from pyro.poutine.guide import GuideMessenger
from torch import nn

from pyro_iw import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO
from pyro_iw.tracing.particles import collect
from pyro_iw.tracing.runner import Runner
from pyro_iw.tracing.traces import Pair, Rescored, Route

LOSSES = {
    "IWAE": lambda **kw: IWAE_ELBO(K=4, **kw),
    "MIWAE": lambda **kw: MIWAE_ELBO(M=2, K=2, **kw),
    "CIWAE": lambda **kw: CIWAE_ELBO(K=4, beta=0.5, **kw),
    "PIWAE": lambda **kw: PIWAE_ELBO(M=2, K=2, **kw),
}


class HierarchicalRegression:
    """Slopes of three groups around a common mean, 24 observations: all latents global or of a group."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(24, generator=generator)
        self.group = torch.arange(24) % 3
        slopes = torch.tensor([2.0, 3.0, 4.0])
        self.y = slopes[self.group] * self.x + 0.3 * torch.randn(24, generator=generator)

    def model(self):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", 3):
            slope = pyro.sample("slope", dist.Normal(mean, spread))
        with pyro.plate("data", 24):
            loc = slope[..., self.group] * self.x
            pyro.sample("y", dist.Normal(loc, noise), obs=self.y)


class HandWrittenVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.x = torch.rand(16, 6).round()

    def model(self):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", 16):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=self.x)

    def guide(self):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", 16):
            loc, log_scale = self.encoder(self.x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class RegressionModule(PyroModule):
    """A Bayesian linear layer: PyroSample weights, PyroParam noise."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        self.noise = PyroParam(torch.tensor(1.0), dist.constraints.positive)
        self.register_buffer("x", torch.randn(20, 3))
        self.register_buffer("y", self.x.sum(-1) + 0.1 * torch.randn(20))

    def forward(self):
        # The particle dim of the weights must come before the data's.
        weight, bias = self.linear.weight, self.linear.bias
        loc = (self.x * weight).sum(-1) + bias if weight.dim() == 2 else self.batched(weight, bias)
        with pyro.plate("data", 20):
            return pyro.sample("y", dist.Normal(loc, self.noise), obs=self.y)

    def batched(self, weight, bias):
        return (self.x * weight.reshape(-1, 1, 3)).sum(-1) + bias.reshape(-1, 1)


class RegressionGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, 3))
        self.scale = PyroParam(torch.full((1, 3), 0.1), dist.constraints.positive)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self):
        pyro.sample("linear.weight", dist.Normal(self.loc, self.scale).to_event(2))
        pyro.sample("linear.bias", dist.Normal(self.bias, 0.1).to_event(1))


def vae_pair():
    vae = HandWrittenVAE()
    return vae.model, vae.guide


def pyro_module_pair():
    return RegressionModule(), RegressionGuide()


def auto(kind, **kw):
    def make():
        model = HierarchicalRegression().model
        return model, kind(model, **kw)

    return make


def auto_guide_list_pair():
    model = HierarchicalRegression().model
    guide = AutoGuideList(model)
    guide.append(AutoDiagonalNormal(poutine.block(model, hide=["slope"])))
    guide.append(AutoNormal(poutine.block(model, expose=["slope"])))
    return model, guide


class GroupGuide(EasyGuide):
    def guide(self):
        for name, size in (("mean", 1), ("noise", 1), ("spread", 1)):
            group = self.group(match=f"^{name}$")
            loc = pyro.param(f"{name}_loc", torch.zeros(size))
            scale = pyro.param(f"{name}_scale", torch.full((size,), 0.1), dist.constraints.positive)
            group.sample(f"{name}_aux", dist.Normal(loc, scale).to_event(1))
        with self.plate("groups", 3):
            loc = pyro.param("slope_loc", torch.zeros(3), event_dim=0)
            pyro.sample("slope", dist.Normal(loc, 0.1))


def easy_guide_pair():
    model = HierarchicalRegression().model
    return model, GroupGuide(model)


def reparam_pair():
    model = poutine.reparam(HierarchicalRegression().model, config={"slope": LocScaleReparam(0.0)})
    return model, AutoNormal(model)


def lazy_guide_pair():
    """A guide that learns its sizes from its first call."""
    data = 2 + torch.randn(10, 3)

    def model():
        with pyro.plate("data", 10):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data)

    def guide():
        weight = pyro.param("weight", lambda: 0.1 * torch.randn(3))
        log_scale = pyro.param("log_scale", lambda: torch.zeros(data.shape[-1]))
        with pyro.plate("data", 10):
            pyro.sample("z", dist.Normal(weight * data, log_scale.exp()).to_event(1))

    return model, guide


def auxiliary_site_pair():
    """The guide makes two latents from one joint draw, as AutoContinuous guides do."""
    data = torch.tensor([1.5, -0.5])

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.stack([a + b, a - b], -1), 0.5).to_event(1), obs=data)

    def guide():
        loc = pyro.param("loc", torch.zeros(2))
        tril = pyro.param("tril", torch.eye(2), constraint=dist.constraints.lower_cholesky)
        joint = dist.MultivariateNormal(loc, scale_tril=tril)
        z = pyro.sample("joint", joint, infer={"is_auxiliary": True})
        pyro.sample("a", dist.Delta(z[..., 0]))
        pyro.sample("b", dist.Delta(z[..., 1]))

    return model, guide


def sequence_pair():
    """A chain over time inside a data plate (pyro.markov)."""
    data = torch.cumsum(torch.randn(5, 8), 0)

    def model():
        drift = pyro.param("drift", torch.tensor(0.5))
        with pyro.plate("sequences", 8):
            h = torch.zeros(8)
            for t in pyro.markov(range(5)):
                h = pyro.sample(f"h_{t}", dist.Normal(drift * h, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(h, 0.5), obs=data[t])

    def guide():
        gain = pyro.param("gain", torch.tensor(0.2))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("sequences", 8):
            h = torch.zeros(8)
            for t in pyro.markov(range(5)):
                h = pyro.sample(f"h_{t}", dist.Normal(h + gain * (data[t] - h), scale))

    return model, guide


def sequential_plate_pair():
    data = torch.tensor([1.0, 2.0, 3.0])

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        for i in pyro.plate("loop", 3):
            z = pyro.sample(f"z_{i}", dist.Normal(mean, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 0.5), obs=data[i])

    def guide():
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.5))
        for i in pyro.plate("loop", 3):
            pyro.sample(f"z_{i}", dist.Normal(pyro.param(f"loc_{i}", torch.tensor(0.0)), 0.5))

    return model, guide


def subsampled_vae_pair():
    """A plate that draws its own minibatches, indexed by pyro.subsample and by hand."""
    data = (torch.rand(40, 1) < 0.8).float().expand(40, 6)
    encoder, decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def model():
        pyro.module("decoder", decoder)
        with pyro.plate("data", 40, subsample_size=8):
            x = pyro.subsample(data, event_dim=1)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide():
        pyro.module("encoder", encoder)
        with pyro.plate("data", 40, subsample_size=8) as index:
            loc, log_scale = encoder(data[index]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def missing_data_pair():
    """obs_mask: a partly observed site becomes an observed and a latent one."""
    data = torch.randn(12, 2) + 2
    seen = torch.rand(12) < 0.6

    def model():
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", 12):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data, obs_mask=seen)

    def guide():
        gain = pyro.param("gain", torch.tensor(0.1))
        with pyro.plate("data", 12):
            pyro.sample("z", dist.Normal(gain * data, 1.0).to_event(1))
            with poutine.mask(mask=~seen):
                pyro.sample("x_unobserved", dist.Normal(gain * data, 1.5).to_event(1))

    return model, guide


PAIRS = {
    "hand_written_vae": vae_pair,
    "pyro_module": pyro_module_pair,
    "AutoNormal": auto(AutoNormal),
    "AutoDiagonalNormal": auto(AutoDiagonalNormal),
    "AutoMultivariateNormal": auto(AutoMultivariateNormal),
    "AutoLowRankMultivariateNormal": auto(AutoLowRankMultivariateNormal),
    "AutoStructured": auto(AutoStructured, conditionals="mvn", dependencies="linear"),
    "AutoGuideList": auto_guide_list_pair,
    "EasyGuide": easy_guide_pair,
    "AutoNormalMessenger": auto(AutoNormalMessenger),
    "AutoHierarchicalNormalMessenger": auto(AutoHierarchicalNormalMessenger),
    "reparam": reparam_pair,
    "lazy_guide": lazy_guide_pair,
    "auxiliary_site": auxiliary_site_pair,
    "markov": sequence_pair,
    "sequential_plate": sequential_plate_pair,
    "subsampled_vae": subsampled_vae_pair,
    "obs_mask": missing_data_pair,
}


# One by one the bounds differ in nothing but the boundary that PIWAE alone has.
MODES = [(name, True) for name in LOSSES] + [("PIWAE", False)]


@pytest.mark.parametrize(("name", "vectorize"), MODES)
@pytest.mark.parametrize("pair", PAIRS)
def test_one_changed_line_trains(pair, name, vectorize):
    model, guide = PAIRS[pair]()
    loss = LOSSES[name](vectorize_particles=vectorize)
    svi = SVI(model, guide, Adam({"lr": 0.05}), loss=loss)
    losses = [svi.step() for _ in range(30)]
    assert all(math.isfinite(value) for value in losses)
    assert sum(losses[-8:]) < sum(losses[:8])


@pytest.mark.parametrize("pair", PAIRS)
def test_one_particle_gives_pyros_own_elbo(pair):
    """Loss and every parameter's gradient, on the same draws."""
    model, guide = PAIRS[pair]()
    guide()  # lazily made parameters exist from here on
    runs = []
    for loss in (Trace_ELBO(), IWAE_ELBO(K=1)):
        pyro.set_rng_seed(1)
        with poutine.trace(param_only=True) as capture:
            value = loss.loss_and_grads(model, guide)
        params = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
        runs.append((value, {name: p.grad.clone() for name, p in params.items() if p.grad is not None}))
        for parameter in params.values():
            parameter.grad = None
    (value, grads), (ours, our_grads) = runs
    assert ours == pytest.approx(value, rel=1e-5)
    assert grads.keys() == our_grads.keys()
    assert grads
    for name in grads:
        torch.testing.assert_close(our_grads[name], grads[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_vectorized_and_one_by_one_estimate_the_same_bound(pair):
    """The means of 40 losses agree within 5 standard errors."""
    model, guide = PAIRS[pair]()
    guide()
    means, variances = [], []
    for vectorize in (True, False):
        loss = IWAE_ELBO(K=4, vectorize_particles=vectorize)
        values = torch.tensor([loss.loss(model, guide) for _ in range(40)])
        means.append(values.mean())
        variances.append(values.var() / 40)
    assert abs(means[0] - means[1]) < 5 * (variances[0] + variances[1]).sqrt() + 1e-3


def train_module(elbo):
    """Losses of a Pyro loss as a module under a plain torch optimiser."""
    elbo()  # any data-dependent initialisation
    optimiser = torch.optim.Adam(elbo.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        value = elbo()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("name", LOSSES)
def test_elbo_module_with_local_parameters_under_a_torch_optimiser(name):
    with pyro.settings.context(module_local_params=True):
        losses = train_module(LOSSES[name]()(RegressionModule(), RegressionGuide()))
        assert len(pyro.get_param_store()) == 0
    assert sum(losses[-8:]) < sum(losses[:8])


def test_elbo_module_with_an_autoguide():
    model = HierarchicalRegression().model
    losses = train_module(PIWAE_ELBO(M=2, K=4)(model, AutoNormal(model)))
    assert sum(losses[-8:]) < sum(losses[:8])


def test_a_flow_guide():
    model = HierarchicalRegression().model
    guide = AutoIAFNormal(model, hidden_dim=[8], num_transforms=1)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.02}), loss=IWAE_ELBO(K=4))
    losses = [svi.step() for _ in range(40)]
    assert sum(losses[-8:]) < sum(losses[:8])


def test_kept_plates_of_the_ports():
    kept = {
        name: [frame.name for frame in IWAE_ELBO(K=2).particles(*PAIRS[name]()).plates]
        for name in ("hand_written_vae", "markov", "subsampled_vae", "obs_mask", "AutoNormal")
    }
    assert kept == {
        "hand_written_vae": ["data"],
        "markov": ["sequences"],
        "subsampled_vae": ["data"],
        "obs_mask": ["data"],
        "AutoNormal": [],
    }


@pytest.mark.filterwarnings("ignore:.*tempered density")
@pytest.mark.parametrize("guide_class", [AutoNormalMessenger, AutoHierarchicalNormalMessenger])
def test_a_guide_messenger_under_a_wrapped_model(guide_class):
    """The model that is passed counts, not the one that the guide remembers."""
    model = HierarchicalRegression().model
    guide = guide_class(model)
    guide()
    values = []
    for wrapped in (model, poutine.scale(model, 0.5)):
        pyro.set_rng_seed(0)
        values.append(IWAE_ELBO(K=3).particles(wrapped, guide).log_p)
    torch.testing.assert_close(values[1], 0.5 * values[0])


@pytest.mark.filterwarnings("ignore:.*tempered density")
@pytest.mark.parametrize("loss", [make() for make in LOSSES.values()], ids=repr)
def test_a_wrapped_guide_messenger_gives_one_loss_with_and_without_gradients(loss):
    model = HierarchicalRegression().model
    guide = AutoNormalMessenger(model)
    guide()
    values = []
    for evaluate in (loss.loss, loss.loss_and_grads):
        pyro.set_rng_seed(0)
        values.append(evaluate(model, poutine.scale(guide, 0.1)))
    assert values[0] == values[1]


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_guides_density_at_stopped_values_is_its_density(pair, vectorize):
    """What stl and dreg subtract: the same numbers, by a second run of the guide, without the path."""
    model, guide = PAIRS[pair]()
    guide()
    runner = Runner(vectorize=vectorize)
    plates = () if pair != "subsampled_vae" else None
    particles = collect(runner.run(Pair(model, guide), 3, Route(rescored=(Rescored(),))), plates)
    torch.testing.assert_close(particles.log_q_stopped, particles.log_q)


@pytest.mark.parametrize("estimator", ["stl", "dreg", "rws", "score"])
@pytest.mark.parametrize("pair", [name for name in PAIRS if name != "AutoStructured"])
def test_every_estimator_takes_a_step_on_every_pair(pair, estimator):
    model, guide = PAIRS[pair]()
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss=MIWAE_ELBO(M=2, K=3, estimator=estimator))
    before = None
    for _ in range(3):
        assert math.isfinite(svi.step())
        parameters = [value.detach().clone() for value in pyro.get_param_store().values()]
        parameters += [p.detach().clone() for p in guide.parameters()] if isinstance(guide, nn.Module) else []
        assert all(torch.isfinite(p).all() for p in parameters)
        moved = before is None or any(
            not torch.equal(now, then) for now, then in zip(parameters, before, strict=True)
        )
        assert moved
        before = parameters


@pytest.mark.parametrize("estimator", ["reparam", "dreg", "score"])
@pytest.mark.parametrize("option", ["chunk_size", "backward_particles"])
@pytest.mark.parametrize("pair", [name for name in PAIRS if name != "AutoStructured"])
def test_chunks_and_resampled_particles_on_every_pair(pair, option, estimator):
    """From the very first call on: the same loss, and gradients for the same parameters."""
    model, guide = PAIRS[pair]()
    if option == "backward_particles" and isinstance(guide, GuideMessenger):
        return
    losses = [
        PIWAE_ELBO(M=2, K=3, estimator=estimator, **{option: 2}),
        PIWAE_ELBO(M=2, K=3, estimator=estimator),
    ]
    values, with_gradient = [], []
    for loss in (losses[0], *losses):
        pyro.set_rng_seed(0)
        with poutine.trace(param_only=True) as params:
            values.append(loss.loss_and_grads(model, guide))
        parameters = {name: site["value"].unconstrained() for name, site in params.trace.nodes.items()}
        with_gradient.append({name for name, p in parameters.items() if p.grad is not None})
        assert all(p.grad is None or p.grad.isfinite().all() for p in parameters.values())
        for p in parameters.values():
            p.grad = None
    assert values[0] == values[1]
    assert option == "chunk_size" or values[1] == values[2]
    assert with_gradient[0] == with_gradient[1] == with_gradient[2]
    assert with_gradient[0]


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
def test_a_flow_without_an_inverse(vectorize):
    flow = dist.transforms.Planar(2)

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide():
        pyro.module("flow", flow)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    IWAE_ELBO(K=3, vectorize_particles=vectorize).loss_and_grads(model, guide)
    with pytest.raises(ValueError, match=r"site 'z' \(guide\).*without an inverse.*'reparam'"):
        IWAE_ELBO(K=3, estimator="dreg", vectorize_particles=vectorize).loss_and_grads(model, guide)

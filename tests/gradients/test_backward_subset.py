"""Gradients from resampled particles: unbiased for the full gradient on the same draws.

The guide's draws are held fixed, every parameter is a vector with one equal entry for each of N independent
copies of the problem, and the copies are cells: one backward pass gives N independent draws of the resampling
on the same particles. Means are compared with the gradient of all particles within 5 standard errors.
"""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from pyro.optim import Adam
from torch import nn

from helpers.chains import Chain, Network
from helpers.recorded import Coin, Draws, Uniformly
from pyro_iw import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, TVO_ELBO, VR_ELBO
from pyro_iw.gradients.estimator import Estimator

N = 20_000
LOSSES = {
    "IWAE": lambda **kw: IWAE_ELBO(K=6, **kw),
    "MIWAE": lambda **kw: MIWAE_ELBO(M=2, K=3, **kw),
    "CIWAE": lambda **kw: CIWAE_ELBO(K=6, beta=0.3, **kw),
    "PIWAE": lambda **kw: PIWAE_ELBO(M=2, K=3, **kw),
    "VR<0": lambda **kw: VR_ELBO(alpha=-0.5, K=6, **kw),
    "TVO": lambda **kw: TVO_ELBO(K=6, partitions=(0.0, 0.3, 1.0), **kw),
}
PLACES = {
    "one latent": {},
    "sub-plate": {"sub_plate": True},
    "enumerated": {"enumerated": True},
    "discrete": {"discrete": True},
    "scaled": {"temper": 0.4},
}


class Copies:
    """Cells that are copies of one problem, with the same draws for each.

    z1 and z2 given z1 (in a sub-plate of 2 if asked), and x given both.
    """

    start = {"w": 0.6, "s": 0.8, "a": 0.4, "c": 0.9, "d": 0.7, "e": 0.3}  # noqa: RUF012

    def __init__(self, count=N, sub_plate=False, enumerated=False, discrete=False, temper=1.0):
        self.count, self.sub_plate, self.enumerated = count, sub_plate, enumerated
        self.discrete, self.temper = discrete, temper
        self.p = {
            name: torch.full((count,), value, dtype=torch.float64, requires_grad=True)
            for name, value in self.start.items()
        }
        self.x = torch.full((count,), 1.2, dtype=torch.float64)

    def __hash__(self):
        return id(self)

    def below(self):
        return pyro.plate("below", 2, dim=-2) if self.sub_plate else poutine.mask(mask=True)

    def model(self):
        p = self.p
        with pyro.plate("copies", self.count, dim=-1):
            z = pyro.sample("z", dist.Normal(p["w"], 1.0))
            b = pyro.sample("b", dist.Bernoulli(p["e"])) if self.discrete else 0.0
            shift = 0.0
            if self.enumerated:
                shift = 1.5 * pyro.sample("k", dist.Bernoulli(p["e"]), infer={"enumerate": "parallel"})
            with self.below(), poutine.scale(scale=self.temper):
                y = pyro.sample("y", dist.Normal(p["w"] * z + b + shift, 1.0))
                pyro.sample("x", dist.Normal(y, p["s"]), obs=self.x)

    def guide(self):
        p = self.p
        with pyro.plate("copies", self.count, dim=-1):
            z = pyro.sample("z", Uniformly(p["a"], p["c"]))
            b = pyro.sample("b", Coin((p["e"] * z).sigmoid())) if self.discrete else 0.0
            with self.below():
                pyro.sample("y", Uniformly(p["a"] * z + b, p["d"] * torch.exp(0.3 * z)))

    def draws(self, num_particles=6):
        """Draws of all particles, equal for all copies."""
        generator = torch.Generator().manual_seed(2)
        shapes = [(num_particles, 1, 1) if self.sub_plate else (num_particles, 1)] * (
            3 if self.discrete else 2
        )
        if self.sub_plate:
            shapes[-1] = (num_particles, 2, 1)
        draws = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [draw.expand(*draw.shape[:-1], self.count) for draw in draws]

    def gradients(self, loss):
        for parameter in self.p.values():
            parameter.grad = None
        loss.loss(self.model, self.guide)  # probes the pair
        Draws.give(self.draws())
        value = loss.loss_and_grads(self.model, self.guide)
        return value, {name: p.grad for name, p in self.p.items() if p.grad is not None}


def deviations(pair, make, count):
    """How far the means are off, in standard errors, parameter by parameter; and the relative errors."""
    value, full = pair.gradients(make())
    resampled_value, grads = pair.gradients(make(backward_particles=count))
    assert resampled_value == value
    assert full.keys() == grads.keys()
    off, relative = {}, {}
    for name, grad in grads.items():
        error = grad.std().item() / math.sqrt(len(grad))
        difference = abs(grad.mean() - full[name].mean()).item()
        scale = full[name].mean().abs().item()
        off[name] = 0.0 if difference < 1e-9 * scale else difference / error
        relative[name] = error / scale
    return off, relative


class TestUnbiased:
    @pytest.mark.parametrize("count", [1, 2, 4])
    @pytest.mark.parametrize("estimator", ["reparam", "stl", "dreg", "rws"])
    @pytest.mark.parametrize("name", LOSSES)
    def test_every_bound(self, name, estimator, count):
        off, relative = deviations(Copies(), lambda **kw: LOSSES[name](estimator=estimator, **kw), count)
        assert max(off.values()) < 5, off
        assert sorted(relative.values())[2] < 0.05, relative  # else the test would see nothing

    @pytest.mark.filterwarnings("ignore:.*tempered density")
    @pytest.mark.parametrize("estimator", ["reparam", "dreg"])
    @pytest.mark.parametrize("place", [place for place in PLACES if place != "discrete"])
    def test_every_kind_of_site(self, place, estimator):
        make = lambda **kw: PIWAE_ELBO(M=2, K=3, estimator=estimator, **kw)  # noqa: E731
        off, _ = deviations(Copies(**PLACES[place]), make, 2)
        assert max(off.values()) < 5, off

    @pytest.mark.parametrize("estimator", ["score", "vimco", "ovis", "rws"])
    @pytest.mark.parametrize("place", ["discrete", "enumerated"])
    def test_scores(self, estimator, place):
        make = lambda **kw: MIWAE_ELBO(M=2, K=3, estimator=estimator, **kw)  # noqa: E731
        off, _ = deviations(Copies(**PLACES[place]), make, 2)
        assert max(off.values()) < 5, off

    def test_a_kl_weight(self):
        make = lambda **kw: PIWAE_ELBO(M=2, K=3, estimator="dreg", kl_weight=0.3, **kw)  # noqa: E731
        off, _ = deviations(Copies(), make, 2)
        assert max(off.values()) < 5, off


def mutated_choice(mutation):
    """The choice of particles with a mistake in it."""
    original = Estimator.choose

    def choose(self, weights, crosses, count):
        chosen, indices = original(self, weights, crosses, count)
        model, path = chosen.model, chosen.path
        if mutation == "a and b swapped":
            model, path = path, model
        elif mutation == "without 1 / pi":
            model, path = (w.gather(0, indices) / count for w in (weights.model, weights.path))
        else:  # without 1 / k'
            model, path = model * count, path * count
        return chosen._replace(model=model, path=path), indices

    return choose


@pytest.mark.parametrize("mutation", ["without 1 / pi", "a and b swapped", "without 1 / k'"])
def test_the_tests_see_mistakes(mutation, monkeypatch):
    monkeypatch.setattr(Estimator, "choose", mutated_choice(mutation))
    off, _ = deviations(Copies(), lambda **kw: PIWAE_ELBO(M=2, K=3, estimator="dreg", **kw), 2)
    assert max(off.values()) > 20, off


class TestAgainstAllParticles:
    @pytest.mark.parametrize("count", [6, 7, 1000])
    def test_as_many_as_there_are_is_the_plain_path(self, count):
        pair = Copies(3)
        value, full = pair.gradients(PIWAE_ELBO(M=2, K=3))
        again, grads = pair.gradients(PIWAE_ELBO(M=2, K=3, backward_particles=count))
        assert value == again
        assert all(torch.equal(grads[name], full[name]) for name in full)

    @pytest.mark.filterwarnings("ignore:.*give zero density to some particles")
    @pytest.mark.parametrize("estimator", ["reparam", "stl", "dreg"])
    def test_particles_of_weight_zero_are_not_needed(self, estimator):
        """Where all weight rests on one particle, any number of draws gives the full gradient."""
        a = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)
        w = torch.tensor([0.5, 0.6], dtype=torch.float64, requires_grad=True)
        only = torch.tensor([[2, 4]])

        def model():
            with pyro.plate("data", 2):
                z = pyro.sample("z", dist.Normal(w, 1.0))
                chosen = (z == (a + noise.gather(0, only)).detach()).double()
                pyro.factor("alive", torch.where(chosen > 0, 0.0, -math.inf))

        def guide():
            with pyro.plate("data", 2):
                pyro.sample("z", Uniformly(a, 1.0))

        noise = torch.zeros(6, 2, dtype=torch.float64)
        uniform = torch.rand(6, 2, dtype=torch.float64)
        noise = 2**0.5 * torch.erfinv(2 * uniform - 1)
        grads = []
        for count in (None, 1, 3):
            loss = IWAE_ELBO(K=6, backward_particles=count, estimator=estimator)
            Draws.give()
            with pytest.warns(RuntimeWarning, match="zero density"):
                loss.loss(model, guide)
            Draws.give([uniform])
            loss.loss_and_grads(model, guide)
            grads.append([a.grad, w.grad])
            a.grad = w.grad = None
        for found in grads[1:]:
            torch.testing.assert_close(found, grads[0])

    def test_a_cell_without_density_gives_zero(self):
        a = torch.tensor([0.3, 0.4, 0.5], requires_grad=True)
        w = torch.tensor([0.5, 0.6, 0.7], requires_grad=True)

        def model():
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(w, 1.0))
                pyro.factor("alive", torch.tensor([0.0, -math.inf, 0.0]))

        def guide():
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(a, 1.0))

        for make in (IWAE_ELBO, lambda **kw: PIWAE_ELBO(M=2, K=kw.pop("K") // 2, estimator="dreg", **kw)):
            a.grad = w.grad = None
            with pytest.warns(RuntimeWarning, match=r"-inf in 1 of 3 cell\(s\)"):
                make(K=8, backward_particles=3).loss_and_grads(model, guide)
            assert w.grad[1] == 0
            assert w.grad.isfinite().all()
            assert a.grad.isfinite().all()
            assert (w.grad[[0, 2]] != 0).all()


def test_weights_of_the_model_that_vanish_beside_those_of_the_path():
    """PIWAE with a hopeless group: a is 0 in float32 where b is not, and phi's gradient needs b."""
    x = torch.tensor(0.3)
    shift = torch.tensor([0.0, 0.0, 0.0, 30.0, 30.5, 31.0])
    w = torch.tensor(1.2, requires_grad=True)
    a = torch.full((4000,), 0.4, requires_grad=True)
    group = torch.tensor([0.1, -0.4, 0.6, 0.2, -0.3, 0.5])

    def model():
        with pyro.plate("copies", 4000):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w * z, 0.8), obs=x)

    def guide():
        with pyro.plate("copies", 4000):
            noise = (shift + group).unsqueeze(-1).expand(6, 4000)
            pyro.sample("z", Fixed(a, 1.0, noise))

    class Fixed(dist.Normal):
        def __init__(self, loc, scale, noise=None, **kw):
            super().__init__(loc, scale, **kw)
            self.noise = noise

        def expand(self, batch_shape, _instance=None):
            result = super().expand(batch_shape, self._get_checked_instance(Fixed, _instance))
            result.noise = self.noise
            return result

        def rsample(self, sample_shape=()):
            shape = self._extended_shape(torch.Size(sample_shape))
            return self.loc + (self.noise if len(shape) > 1 else self.noise[0])

    grads = []
    for count in (None, 2):
        loss = PIWAE_ELBO(M=2, K=3, backward_particles=count, max_plate_nesting=1)
        a.grad = w.grad = None
        loss.loss_and_grads(model, guide)
        grads.append((a.grad.clone(), w.grad.clone()))
    (full_a, full_w), (some_a, some_w) = grads
    error = some_a.std() / math.sqrt(4000)
    assert abs(some_a.mean() - full_a.mean()) < 5 * error
    assert error < 0.1 * full_a.mean().abs()
    assert torch.isfinite(some_a).all()
    torch.testing.assert_close(some_w, full_w, rtol=0.1, atol=0.0)


class TestRefused:
    @pytest.mark.parametrize("count", [0, -1, 2.5, True, "3"])
    def test_bad_numbers(self, count):
        with pytest.raises(ValueError, match="backward_particles must be an integer >= 1"):
            IWAE_ELBO(K=4, backward_particles=count)

    def test_together_with_others(self):
        with pytest.raises(ValueError, match="chunk_size asks for several"):
            IWAE_ELBO(K=4, backward_particles=2, chunk_size=2)
        with pytest.raises(ValueError, match="vectorize_particles=False asks for several"):
            IWAE_ELBO(K=4, backward_particles=2, vectorize_particles=False)

    def test_guides_that_run_the_model(self):
        pair = Chain()
        guide = AutoNormalMessenger(pair.model)
        loss = IWAE_ELBO(K=4, backward_particles=2)
        with pytest.raises(ValueError, match=r"AutoNormalMessenger.*runs the model itself"):
            loss.loss_and_grads(pair.model, guide)
        assert math.isfinite(loss.loss(pair.model, guide))

    def test_dropout_in_the_model(self):
        layer = nn.Dropout(0.5)
        w = torch.ones(10, requires_grad=True)

        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = (layer(torch.ones(10)) * w).sum()
            pyro.sample("x", dist.Normal(z + loc, 0.1), obs=torch.tensor(0.3))

        def guide():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        loss = IWAE_ELBO(K=6, backward_particles=2)
        with pytest.raises(ValueError, match=r"dropout.*eval mode"):
            loss.loss_and_grads(model, guide)
        assert w.grad is None
        layer.eval()
        loss.loss_and_grads(model, guide)
        assert w.grad is not None

    def test_what_the_estimator_does_not_cover(self):
        pair = Chain(discrete=True)
        with pytest.raises(ValueError, match="'b' cannot be reparameterised"):
            IWAE_ELBO(K=4, backward_particles=2).loss_and_grads(pair.model, pair.guide)


@pytest.mark.parametrize("declared", [{"subsample_size": 5}, {}])
def test_both_runs_of_the_model_see_one_minibatch(declared):
    """That of the guide, where the model declares none."""
    data, drawn = torch.randn(50), []
    w = torch.tensor(0.5, requires_grad=True)

    def model():
        with pyro.plate("data", 50, **declared) as index:
            drawn.append(index)
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    def guide():
        with pyro.plate("data", 50, subsample_size=5):
            pyro.sample("z", dist.Normal(w, 1.0))

    loss = IWAE_ELBO(K=6, backward_particles=2)
    loss.loss(model, guide)
    for _ in range(2):
        drawn.clear()
        loss.loss_and_grads(model, guide)
        assert len(drawn) == 2
        assert len(drawn[0]) == 5
        assert torch.equal(*drawn)


def test_the_model_runs_with_gradients_on_those_particles_alone():
    w = torch.tensor(0.5, requires_grad=True)
    runs = []

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            runs.append((z.shape[0], torch.is_grad_enabled()))
            pyro.sample("x", dist.Normal(w * z, 1.0), obs=torch.zeros(3))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(w, 1.0))

    loss = IWAE_ELBO(K=64, backward_particles=8)
    loss.loss(model, guide)
    runs.clear()
    loss.loss_and_grads(model, guide)
    assert runs == [(64, False), (8, True)]


@pytest.mark.filterwarnings("ignore:BatchNorm1d")
def test_running_statistics_are_updated_once():
    net, x = Network(), torch.randn(5, 3)
    guide, norm = AutoNormal(net.model), net.layers[1]
    loss = IWAE_ELBO(K=6, backward_particles=2)
    loss.loss(net.model, guide, x)
    results = []
    for evaluate in (loss.loss, loss.loss_and_grads):
        norm.reset_running_stats()
        pyro.set_rng_seed(0)
        evaluate(net.model, guide, x)
        assert norm.num_batches_tracked == 1
        results.append(norm.running_mean.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_with_global_latents_take_steps(guide_class):
    data = torch.randn(20)

    def model():
        shift = pyro.param("shift", torch.tensor(0.0))
        b = pyro.sample("b", dist.Normal(shift, torch.ones(2)).to_event(1))
        with pyro.plate("data", 20):
            z = pyro.sample("z", dist.Normal(b[..., 0], 1.0))
            pyro.sample("x", dist.Normal(z + b[..., 1], 1.0), obs=data)

    guide = guide_class(model)
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss=IWAE_ELBO(K=16, backward_particles=4))
    assert all(math.isfinite(svi.step()) for _ in range(3))
    assert pyro.param("shift") != 0


def test_three_ways_to_the_loss_agree_to_the_last_bit():
    pair = Chain()
    loss = MIWAE_ELBO(M=2, K=3, backward_particles=2)
    loss.loss(pair.model, pair.guide)
    values, grads = [], []
    for evaluate in (loss.loss, loss.loss_and_grads, loss.differentiable_loss):
        Draws.give()
        pyro.set_rng_seed(3)
        value = torch.as_tensor(evaluate(pair.model, pair.guide), dtype=torch.float64)
        if value.requires_grad:
            value.backward()
        values.append(value.item())
        grads.append(pair.p["w"].grad)
        pair.p["w"].grad = None
    assert len(set(values)) == 1
    assert torch.equal(grads[1], grads[2])


def test_the_repr_shows_it():
    assert repr(IWAE_ELBO(K=4, backward_particles=2)) == "IWAE_ELBO(K=4, backward_particles=2)"

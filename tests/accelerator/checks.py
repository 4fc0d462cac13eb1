"""On another device: the numbers of the CPU, and no waiting in a step. ``test_on_a_device.py`` runs it.

On a real one, to rounding::

    PYRO_IW_DEVICE=cuda python -m pytest tests/accelerator/checks.py
"""

import math

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn
from torch.utils._pytree import tree_leaves

from helpers import accelerator
from helpers.accelerator import counting
from helpers.by_hand import LOSSES, K, M
from helpers.on_devices import Hierarchy, Pair, Steered, Walk, X, step
from pyro_iw import (
    FIVO_ELBO,
    IWAE_ELBO,
    VR_ELBO,
    AdversarialSVI,
    AnnealedImportanceSampler,
    FusedOptim,
    ImportanceSampler,
    LocallyEnhancedELBO,
    ParticleFilter,
    gradient_snr,
)
from pyro_iw._support import devices
from pyro_iw.bounds import IWAE, MIWAE, TVO

S = M * K
THERE = accelerator.NAME
ESTIMATORS = ["reparam", "stl", "dreg", "score", "vimco", "ovis", "rws"]
WAYS = {
    "one pass": {},
    "one by one": {"vectorize_particles": False},
    "chunks": {"chunk_size": 4},
    "subset": {"backward_particles": 2},
}
OPTIMISERS = {
    "Pyro's": lambda: pyro.optim.Adam({"lr": 0.01}),
    "Adam": lambda: FusedOptim(torch.optim.Adam, {"lr": 0.01}),
    "clipped": lambda: FusedOptim(torch.optim.Adam, {"lr": 0.01}, {"clip_norm": 1.0}),
    "SGD": lambda: FusedOptim(torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    "Adagrad": lambda: FusedOptim(torch.optim.Adagrad, {"lr": 0.01}),
    "ClippedAdam": lambda: FusedOptim(pyro.optim.clipped_adam.ClippedAdam, {"lr": 0.01}),
}
simulated = pytest.mark.skipif(accelerator.IS_REAL, reason="a matter of the simulated device alone")


@pytest.fixture(scope="module", autouse=True)
def device():
    with accelerator.in_use(), pyro.validation_enabled(False):  # which looks at values
        yield


@pytest.fixture
def without_float64():
    accelerator.module.has_float64 = False
    devices.wide_dtype.cache_clear()
    yield
    accelerator.module.has_float64 = True
    devices.wide_dtype.cache_clear()


def training(device, pair, loss, optim=lambda: FusedOptim(torch.optim.Adam, {"lr": 0.01})):
    """Three steps of SVI; the losses, the parameters, and what the last one counted."""
    pyro.set_rng_seed(0)
    svi = SVI(pair.model, pair.guide, optim(), loss=loss)
    losses = [svi.step(pair.x) for _ in range(2)]
    with counting() as counts:
        losses.append(svi.step(pair.x))
    return [losses, dict(sorted(pyro.get_param_store().named_parameters()))], counts


def same(one, other):
    """Whether two results are equal to the last bit, or on a real device to rounding, wherever they lie."""
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    assert pairs

    def plain(part):
        return torch.as_tensor(part).detach().cpu().nan_to_num(7.0)

    equal = close if accelerator.IS_REAL else torch.equal
    return all(equal(plain(a), plain(b)) for a, b in pairs)


def close(one, other):
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-4)


def on_both(run):
    """What a function of a device counts there, once its results are those of the CPU."""
    expected, _ = run("cpu")
    found, counts = run(THERE)
    assert same(expected, found)
    return counts


def combinations():
    """Every loss with every estimator, by one of the ways; each way meets all losses and all estimators."""
    found = []
    for i, name in enumerate(LOSSES):
        for j, estimator in enumerate(ESTIMATORS):
            if estimator == "ovis" and name in ("CIWAE", "TVO"):
                continue  # which it refuses
            way = list(WAYS)[(i + j) % len(WAYS)]
            options = {"estimator": estimator, **WAYS[way]}
            found.append(pytest.param(name, options, id=f"{name}-{estimator}-{way}"))
    return found


@pytest.mark.parametrize(("name", "options"), combinations())
def test_losses(name, options):
    """The CPU's losses and gradients, and after the first step no waiting and no copy."""

    def run(device):
        loss, pair = (
            LOSSES[name](**options),
            Pair(device, path=options["estimator"] not in ("score", "vimco")),
        )
        found = [step(loss, pair, seed=0)]
        with counting() as counts:
            found.append(step(loss, pair, seed=1))
        return found, counts

    counts = on_both(run)
    assert not counts.reads
    assert not counts.to_device
    assert not counts.to_host


class TestThatTheChecksBite:
    def test_the_device_refuses_the_other(self):
        there = torch.ones(2, device=THERE)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2)
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([there.sum(), torch.ones(())])
        assert (there * torch.tensor(3.0)).sum().item() == 6

    @simulated
    def test_it_counts(self):
        with counting() as counts:
            there = torch.tensor([1.0, 2.0], device=THERE)
            bool((there > 1).any())
            there[there > 1]
            there.cpu()
        assert len(counts.reads) == 2
        assert len(counts.to_device) == len(counts.to_host) == 1

    @simulated
    def test_it_draws_from_a_generator_of_its_own(self):
        torch.manual_seed(3)
        here, there = torch.rand(4), torch.rand(4, device=THERE)
        assert same(here, there)
        assert not same(torch.rand(4), there)

    @simulated
    def test_another_random_state_is_seen(self, monkeypatch):
        """Chunks drawn again on the device need its own generator put back."""
        monkeypatch.setattr("pyro_iw._support.random_state.rng_states", list)
        pair, loss = Pair(THERE), IWAE_ELBO(K=S, chunk_size=4)
        expected = step(IWAE_ELBO(K=S, chunk_size=4), Pair("cpu"), seed=1)
        assert not same(expected, step(loss, pair, seed=1))


class TestTraining:
    @pytest.mark.parametrize("optimiser", OPTIMISERS)
    def test_optimisers(self, optimiser):
        """A step reads one number, the loss that it returns."""
        loss = lambda: IWAE_ELBO(K=4, kl_weight=lambda step: step / 4)  # noqa: E731
        counts = on_both(lambda device: training(device, Pair(device), loss(), OPTIMISERS[optimiser]))
        assert len(counts.reads) == 1
        assert not counts.to_device
        assert not counts.to_host

    def test_a_step_is_fused_where_there_is_a_kernel(self):
        optim = FusedOptim(torch.optim.Adam, {"lr": 0.01})
        training(THERE, Pair(THERE), IWAE_ELBO(K=2), lambda: optim)
        assert optim.optimizer.param_groups[0]["fused"]

    @pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
    def test_autoguides(self, guide):
        def run(device):
            pair = Hierarchy(device, size=len(X))
            pair.guide = guide(pair.model)
            return training(device, pair, IWAE_ELBO(K=4))

        counts = on_both(run)
        assert len(counts.reads) == 1
        assert not counts.to_device

    @pytest.mark.parametrize(
        "options",
        [{}, {"chunk_size": 1}, {"estimator": "dreg"}, {"vectorize_particles": False}],
        ids=["one pass", "chunks", "dreg", "one by one"],
    )
    def test_two_levels(self, options):
        loss = lambda: LocallyEnhancedELBO(IWAE(3), "data", MIWAE(2, 1), **options)  # noqa: E731
        counts = on_both(lambda device: training(device, Hierarchy(device), loss()))
        assert len(counts.reads) == 1
        assert not counts.to_device

    @pytest.mark.parametrize(
        "options",
        [
            {"ess_threshold": 0},
            {"ess_threshold": 1.0},
            {"ess_threshold": 1.0, "estimator": "dreg"},
            {"ess_threshold": 1.0, "resampling": "multinomial", "resampling_gradient": True},
        ],
        ids=["never", "always", "dreg", "its gradient"],
    )
    def test_filters(self, options):
        def run(device):
            pair = Walk(device)
            pair.model, pair.guide, pair.x = pair, Steered(device), X.T.contiguous().to(device)
            return training(device, pair, FIVO_ELBO(K=4, **options))

        counts = on_both(run)
        assert len(counts.reads) == 1
        assert not counts.to_device

    def test_a_filter_that_resamples_at_times_does_not_wait_to_see(self):
        pair = Walk(THERE)
        pair.model, pair.guide, pair.x = (
            pair,
            Steered(THERE),
            X.T.contiguous().to(THERE),
        )
        (losses, _), counts = training(THERE, pair, FIVO_ELBO(K=4))
        assert all(map(math.isfinite, losses))
        assert len(counts.reads) == 1

    def test_adversarial(self):
        def run(device):
            pair = Pair(device, size=len(X))
            torch.manual_seed(1)
            critic = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1)).to(
                device
            )
            svi = AdversarialSVI(pair.model, pair.guide, critic, FusedOptim(torch.optim.Adam, {"lr": 0.01}))
            pyro.set_rng_seed(0)
            losses = [svi.step(pair.x) for _ in range(2)]
            with counting() as counts:
                losses.append(svi.step(pair.x))
            parameters = dict(sorted(pyro.get_param_store().named_parameters()))
            return [
                [(one.reconstruction, one.discriminator, one.guide) for one in losses],
                parameters,
            ], counts

        counts = on_both(run)
        assert len(counts.reads) + len(counts.to_host) == 1  # all losses at once
        assert not counts.to_device

    def test_a_tensor_of_scales_is_looked_at_once(self):
        """Whether model and guide share it has to be seen."""

        def run(device):
            pair = Pair(device)
            scale = torch.linspace(0.5, 1.5, len(X)).to(device)
            pair.model, pair.guide = (poutine.scale(fn, scale) for fn in (pair.model, pair.guide))
            return training(device, pair, IWAE_ELBO(K=4))

        counts = on_both(run)
        assert len(counts.reads) == 2
        assert not counts.to_device

    def test_signal_to_noise(self):
        def run(device):
            pair = Pair(device)
            pyro.set_rng_seed(0)
            found = gradient_snr(IWAE_ELBO(K=3), pair.model, pair.guide, pair.x, num_draws=4)
            return [found.mean], None

        on_both(run)


class TestPosterior:
    @pytest.mark.parametrize("options", [{}, {"jackknife": True}, {"vectorize_particles": False}])
    def test_sampler(self, options):
        """The device is waited for at the first chunk and at the end."""

        def run(device):
            pair = Pair(device, size=len(X))
            pyro.set_rng_seed(0)
            sampler = ImportanceSampler(pair.model, pair.guide, 20, chunk_size=5, progress=False, **options)
            sampler.log_marginal(pair.x)
            with counting() as counts:
                value = sampler.log_marginal(pair.x)
            return [value, *sampler.evidence(pair.x)], counts

        counts = on_both(run)
        assert len(counts.reads) == 2
        assert not counts.to_device
        assert not counts.to_host

    def test_data_set(self):
        def run(device):
            pair = Pair(device, size=len(X))
            pyro.set_rng_seed(0)
            sampler = ImportanceSampler(pair.model, pair.guide, 20, chunk_size=10, progress=False)
            sampler.log_marginal(pair.x)
            with counting() as counts:
                found = sampler.log_marginal_dataset([pair.x, pair.x], bound=TVO(2, 3))
            parts = [found.values, found.monte_carlo_errors, found.ess, found.bounds, found.minus_kl_errors]
            return [*parts, found.mean, found.minus_kl, found.minus_kl_error], counts

        counts = on_both(run)
        assert len(counts.reads) == 4
        assert len(counts.to_device) <= 1  # the partitions

    @pytest.mark.filterwarnings("ignore:k̂|In . of", "ignore:.*effective particles")
    def test_samples_and_arviz(self):
        def run(device):
            pair = Pair(device, size=len(X))
            pyro.set_rng_seed(0)
            samples = ImportanceSampler(pair.model, pair.guide, 60, chunk_size=30, progress=False)(pair.x)
            arviz = samples.to_arviz(num_samples=10, prior=True)
            groups = {
                f"{group.strip('/')}/{name}": torch.as_tensor(values.values)
                for group in ("posterior", "log_likelihood", "prior", "observed_data")
                for name, values in arviz[group].data_vars.items()
            }
            assert len(groups) >= 4
            parts = [
                samples.log_weights,
                samples.log_marginal,
                samples.ess,
                samples.khat,
                samples.posterior(10),
            ]
            return [*parts, samples.smoothed().log_weights, groups], None

        on_both(run)

    @pytest.mark.filterwarnings("ignore:.*k̂|.*effective particles")
    def test_two_levels(self):
        def run(device):
            pair = Hierarchy(device, size=len(X))
            pyro.set_rng_seed(0)
            options = {"local": "data", "num_local": 8, "chunk_size": 40, "progress": False}
            sampler = ImportanceSampler(pair.model, pair.guide, 80, **options)
            samples = sampler(pair.x)
            with counting() as counts:
                samples = sampler(pair.x)
            return [samples.log_marginal, samples.ess, samples.khat, samples.posterior(5)], counts

        assert len(on_both(run).reads) == 2

    def test_particle_filter(self):
        def run(device):
            x = X.T.contiguous().to(device)
            pyro.set_rng_seed(0)
            sampler = ParticleFilter(Walk(device), Steered(device), 16, num_filters=2, ess_threshold=1.0)
            filtered = sampler(x)
            return [
                sampler.log_marginal(x),
                filtered.log_marginal,
                filtered.mean("z"),
                filtered.smooth(5),
            ], None

        on_both(run)

    @pytest.mark.filterwarnings("ignore:.*accepted|.*effective particles")
    def test_annealing(self):
        """No transition is waited for, however many there are."""

        def run(device, num_temperatures=4):
            pair = Pair(device, size=len(X))
            pyro.set_rng_seed(0)
            sampler = AnnealedImportanceSampler(
                pair.model, pair.guide, 4, num_temperatures, num_adaptation=2, num_leapfrog=1, progress=False
            )
            sampler.log_marginal(pair.x)
            with counting() as counts:
                value = sampler.log_marginal(pair.x)
            return [value], counts

        counts = on_both(run)
        assert not counts.to_device
        assert len(run(THERE, 8)[1].reads) == len(counts.reads)


@simulated
class TestWithoutFloat64:
    """As on Apple's devices: numbers that want it come in float32."""

    def test_the_dtype(self, without_float64):
        assert devices.wide_dtype(torch.device(THERE, 0)) == torch.float32
        assert devices.wide_dtype(torch.device("cpu")) == torch.float64

    @pytest.mark.parametrize(
        "loss",
        [
            lambda: IWAE_ELBO(K=S, estimator="score"),
            lambda: VR_ELBO(alpha=1 - 1e-6, K=S),
            lambda: IWAE_ELBO(K=S, chunk_size=4),
            lambda: LocallyEnhancedELBO(IWAE(3), "data", MIWAE(2, 1)),
        ],
        ids=["score", "VR", "chunks", "two levels"],
    )
    def test_losses(self, without_float64, loss):
        kind = Hierarchy if isinstance(loss(), LocallyEnhancedELBO) else Pair
        on_both(lambda device: training(device, kind(device), loss()))

    def test_subset(self, without_float64):
        """Its positions are other random numbers in float32."""
        losses, _ = training(THERE, Pair(THERE), IWAE_ELBO(K=S, backward_particles=2))[0]
        (expected, _), _ = training("cpu", Pair("cpu"), IWAE_ELBO(K=S, backward_particles=2))
        assert losses[0] == expected[0]
        assert all(map(math.isfinite, losses))

    @pytest.mark.filterwarnings("ignore:.*k̂|.*effective particles|.*accepted")
    def test_posterior(self, without_float64):
        def run(device):
            pair = Pair(device, size=len(X))
            pyro.set_rng_seed(0)
            sampler = ImportanceSampler(pair.model, pair.guide, 60, chunk_size=30, progress=False)
            samples = sampler(pair.x)
            samples.posterior(5), samples.smoothed().khat, samples.to_arviz(num_samples=5)  # in float32
            pyro.set_rng_seed(0)
            found = sampler.log_marginal_dataset([pair.x], bound=MIWAE(2, 3))
            errors = [found.monte_carlo_errors, found.minus_kl_errors]
            return [samples.log_weights, found.values, found.ess, found.bounds, *errors]

        for one, other in zip(run("cpu"), run(THERE), strict=True):
            torch.testing.assert_close(one.float(), other.cpu(), rtol=1e-3, atol=1e-4)
        walk = Walk(THERE), Steered(THERE)
        filtered = ParticleFilter(*walk, 16, num_filters=2)(X.T.contiguous().to(THERE))
        assert bool(filtered.log_marginal.isfinite().all())
        pair = Pair(THERE, size=len(X))
        options = {"num_adaptation": 2, "num_leapfrog": 1, "progress": False}
        annealed = AnnealedImportanceSampler(pair.model, pair.guide, 4, 4, **options)(pair.x)
        assert annealed.log_marginal.dtype == torch.float32


class TestAutocast:
    """Networks in bfloat16 there, densities and weights in float32."""

    @pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"backward_particles": 2}], ids=str)
    def test_of_the_device(self, options):
        def values(autocast):
            pair, loss = Pair(THERE), IWAE_ELBO(K=4, **options)
            with torch.autocast(THERE, torch.bfloat16, enabled=autocast):
                assert pair.encoder(pair.x).dtype == (torch.bfloat16 if autocast else torch.float32)
                return step(loss, pair, seed=1)

        (value, grads), (exact, exact_grads) = values(True), values(False)
        assert not same(value, exact)  # of the networks' digits
        torch.testing.assert_close(value.cpu(), exact.cpu(), rtol=1e-2, atol=0.0)
        if options.get("backward_particles"):
            return  # which other weights make others
        for name, grad in grads.items():
            torch.testing.assert_close(grad.cpu(), exact_grads[name].cpu(), rtol=0.05, atol=0.5)

    def test_densities(self):
        pair = Pair(THERE)
        with torch.autocast(THERE, torch.bfloat16):
            particles = IWAE_ELBO(K=4).particles(pair.model, pair.guide, pair.x)
        assert particles.log_weights.dtype == torch.float32
        assert not same(particles.log_q, particles.log_q.bfloat16().float())

    def test_float16_is_refused_as_itself(self):
        pair = Pair(THERE)
        for options in ({}, {"chunk_size": 2}, {"vectorize_particles": False}):
            with (
                torch.autocast(THERE, torch.float16),
                pytest.raises(ValueError, match=r"^Particle weights that differ"),
            ):
                step(IWAE_ELBO(K=4, estimator="dreg", **options), pair, seed=0)

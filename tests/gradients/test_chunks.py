"""Chunks: gradients equal to those of one pass on the same draws, in the memory of one chunk."""

import gc
import math
import random
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.optim import Adam
from pyro.poutine.messenger import Messenger
from torch import nn

from helpers.by_hand import LOSSES, gradients, hand_written
from helpers.cases import CASES, DataPlate
from helpers.chains import Chain, Network
from helpers.recorded import Draws, Uniformly, joined
from helpers.truth import RecordedNormal
from pyro_iw import IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, Bound, ImportanceWeightedELBO

S = 6
SIZES = {1: [1] * 6, 2: [2, 2, 2], 4: [4, 2], 5: [5, 1]}


def sizes(chunk_size):
    return SIZES[chunk_size]


def compare(pair, make, chunk_size, differentiable=False, vectorize=True):
    """Chunks against one pass on the same draws."""
    chunked = make(chunk_size=chunk_size, vectorize_particles=vectorize)
    chunked.loss(pair.model, pair.guide)  # probes the pair
    Draws.give()
    pair.indices.clear()
    pyro.set_rng_seed(4)
    value, grads = pair.gradients(chunked, differentiable)
    first, second = Draws.made[: len(Draws.made) // 2], Draws.made[len(Draws.made) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(index, pair.indices[0]) for index in pair.indices)
    minibatch = pair.indices[0]
    whole = make(vectorize_particles=vectorize)
    whole.loss(pair.model, pair.guide)
    Draws.give(joined(first, sizes(chunk_size), pair.num_sites, vectorize))
    pair.plate = lambda: pyro.plate("data", 9, subsample=minibatch, dim=-1)
    expected, expected_grads = pair.gradients(whole)
    assert not Draws.given
    assert value == pytest.approx(expected, rel=1e-12)
    for name, grad in expected_grads.items():
        assert (grads[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-12, msg=f"{name}")
    return grads


class TestAgainstOnePass:
    @pytest.mark.parametrize("chunk_size", SIZES)
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("estimator", ["reparam", "stl", "dreg", "score", "vimco", "rws"])
    def test_every_bound_and_estimator(self, name, estimator, chunk_size):
        pair = Chain(discrete=estimator in ("score", "vimco", "rws"))
        compare(pair, lambda **kw: LOSSES[name](estimator=estimator, **kw), chunk_size)

    @pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
    @pytest.mark.parametrize("estimator", ["reparam", "dreg", "vimco", "ovis"])
    def test_the_differentiable_loss(self, estimator, vectorize):
        pair = Chain(discrete=estimator in ("vimco", "ovis"))
        compare(pair, lambda **kw: LOSSES["PIWAE"](estimator=estimator, **kw), 4, True, vectorize)

    @pytest.mark.parametrize("name", ["IWAE", "PIWAE"])
    @pytest.mark.parametrize("estimator", ["reparam", "stl", "dreg", "score", "rws"])
    def test_one_by_one(self, name, estimator):
        pair = Chain(discrete=estimator in ("score", "rws"))
        compare(pair, lambda **kw: LOSSES[name](estimator=estimator, **kw), 4, vectorize=False)

    @pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
    @pytest.mark.parametrize("estimator", ["reparam", "dreg"])
    def test_enumerated_sites(self, estimator, vectorize):
        pair = Chain(enumerate_kind=True)
        compare(pair, lambda **kw: PIWAE_ELBO(M=2, K=3, estimator=estimator, **kw), 4, vectorize=vectorize)

    @pytest.mark.parametrize("estimator", ["reparam", "dreg"])
    def test_a_kl_weight(self, estimator):
        pair = Chain()
        make = lambda **kw: MIWAE_ELBO(M=2, K=3, kl_weight=0.3, estimator=estimator, **kw)  # noqa: E731
        compare(pair, make, 4)

    @pytest.mark.filterwarnings("ignore:.*tempered density")
    @pytest.mark.parametrize("name", ["IWAE", "PIWAE"])
    @pytest.mark.parametrize("chunk_size", [4, 5])
    @pytest.mark.parametrize("case_class", CASES, ids=lambda case: case.__name__)
    def test_against_hand_written_loops(self, case_class, name, chunk_size):
        case = case_class(torch.float64)
        value, grads, draws = gradients(LOSSES[name](chunk_size=chunk_size), case)
        num_sites = len(draws) // 2 // len(sizes(chunk_size))
        noise = joined(draws[: len(draws) // 2], sizes(chunk_size), num_sites)
        expected, theta_grads, phi_grads = hand_written(name, case, noise)
        assert value == pytest.approx(expected, rel=1e-9)
        for key, grad in grads.items():
            truth = sum(side[key] for side in (theta_grads, phi_grads) if key in side)
            torch.testing.assert_close(grad, truth, rtol=1e-9, atol=1e-9)


def case_with_parameters():
    case = DataPlate(torch.float64)
    for name in {**case.theta, **case.phi}:
        case.param(name)
    return case


def test_chunks_of_all_particles_are_the_plain_path():
    case = case_with_parameters()
    values = []
    for chunk_size in (None, 6, 100):
        pyro.set_rng_seed(0)
        loss = IWAE_ELBO(K=6, chunk_size=chunk_size)
        values.append((loss.loss_and_grads(case.model, case.guide), pyro.param("w").unconstrained().grad))
        RecordedNormal.draws.clear()
        loss.loss_and_grads(case.model, case.guide)
        assert len(RecordedNormal.draws) == 1
        pyro.param("w").unconstrained().grad = None
    assert len(set(values)) == 1 or all(torch.equal(v[1], values[0][1]) for v in values)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, True, "3"])
def test_bad_chunk_sizes_are_refused(chunk_size):
    with pytest.raises(ValueError, match="chunk_size must be an integer >= 1"):
        IWAE_ELBO(K=4, chunk_size=chunk_size)


def test_the_repr_shows_it():
    assert repr(IWAE_ELBO(K=4, chunk_size=2)) == "IWAE_ELBO(K=4, chunk_size=2)"


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
def test_all_ways_to_the_loss_agree_to_the_last_bit_and_leave_one_random_state(vectorize):
    case = case_with_parameters()
    loss = MIWAE_ELBO(M=2, K=3, chunk_size=4, vectorize_particles=vectorize)
    loss.loss(case.model, case.guide)
    values, states = [], []

    def differentiable(model, guide):
        value = loss.differentiable_loss(model, guide)
        states.append(torch.rand(()))
        torch.manual_seed(12345)  # the backward pass has states of its own, and puts this one back
        value.backward()
        state = torch.get_rng_state()
        torch.manual_seed(12345)
        assert torch.equal(state, torch.get_rng_state())
        return value.item()

    for evaluate in (loss.loss, loss.loss_and_grads, differentiable):
        pyro.set_rng_seed(3)
        values.append(evaluate(case.model, case.guide))
        if evaluate is not differentiable:
            states.append(torch.rand(()))
    assert len(set(values)) == 1
    assert len({float(state) for state in states}) == 1


def test_numpys_and_pythons_generators_are_replayed_too():
    w = torch.tensor(0.5, requires_grad=True)
    seen = []

    def model():
        noise = np.random.normal() + random.random()  # noqa: NPY002
        seen.append(noise)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w * z + noise, 1.0), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    loss = IWAE_ELBO(K=6, chunk_size=2)
    loss.loss_and_grads(model, guide)  # the first also runs single particles
    seen.clear()
    loss.loss_and_grads(model, guide)
    assert len(set(seen)) == 3
    assert seen[:3] == seen[3:]
    after = np.random.normal(), random.random()  # noqa: NPY002
    assert after[0] not in seen
    assert after[0] + after[1] not in seen


def test_gradients_can_be_taken_of_some_parameters_scaled_and_accumulated():
    case = case_with_parameters()
    loss = IWAE_ELBO(K=6, chunk_size=2)
    params = [value.unconstrained() for value in pyro.get_param_store().values()]

    def value():
        pyro.set_rng_seed(0)
        return loss.differentiable_loss(case.model, case.guide)

    expected = torch.autograd.grad(value(), params)
    assert all(p.grad is None for p in params)
    (only,) = torch.autograd.grad(3 * value(), params[1])
    torch.testing.assert_close(only, 3 * expected[1])
    total = value()
    total.backward(retain_graph=True)
    total.backward()
    for p, grad in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)
    with pytest.raises(RuntimeError, match="a second time"):
        total.backward()


def test_a_second_derivative_is_refused():
    case = case_with_parameters()
    loss = IWAE_ELBO(K=3, chunk_size=2).differentiable_loss(case.model, case.guide)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        loss.backward(create_graph=True)


def test_a_parameter_changed_before_the_backward_pass_is_refused():
    case = case_with_parameters()
    loss = IWAE_ELBO(K=3, chunk_size=2).differentiable_loss(case.model, case.guide)
    with torch.no_grad():
        pyro.param("w").unconstrained().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_exchanged_before_the_backward_pass_is_refused():
    case = case_with_parameters()
    loss = IWAE_ELBO(K=3, chunk_size=2).differentiable_loss(case.model, case.guide)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="Do not exchange parameters"):
        loss.backward()


def test_hooks_of_parameters_see_the_whole_gradient_once():
    case = case_with_parameters()
    seen = []
    weight = pyro.param("w").unconstrained()
    weight.register_hook(lambda grad: seen.append(grad.clone()))
    weight.register_hook(lambda grad: 2 * grad)
    IWAE_ELBO(K=6, chunk_size=2).loss_and_grads(case.model, case.guide)
    assert len(seen) == 1
    torch.testing.assert_close(weight.grad, 2 * seen[0])


def test_leaves_that_are_no_parameters_and_those_of_one_particle_alone():
    """Which tensors a gradient leads to may differ from particle to particle."""
    tensors = [torch.tensor(0.1 * (i + 1), dtype=torch.float64, requires_grad=True) for i in range(6)]
    runs = []

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        shift = tensors[len(runs) % 6]
        runs.append(None)
        pyro.sample("x", dist.Normal(z + shift, 1.0), obs=torch.tensor(0.3, dtype=torch.float64))

    def guide():
        pyro.sample("z", Uniformly(torch.zeros((), dtype=torch.float64), 1.0))

    grads = []
    for chunk_size in (2, None):
        loss = MIWAE_ELBO(M=6, K=1, chunk_size=chunk_size, vectorize_particles=False)
        loss.loss(model, guide)
        Draws.give(Draws.made[:6] if chunk_size is None else ())
        runs.clear()
        value = loss.differentiable_loss(model, guide)
        grads.append(torch.autograd.grad(value, tensors))
    torch.testing.assert_close(grads[0], grads[1])
    assert all(grad != 0 for grad in grads[0])


class TestTensorsFromOutside:
    def pair(self):
        w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

        def model(shift, scales):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(shift), 1.0))
            pyro.sample("x", dist.Normal(w * z + shift, scales["x"]), obs=torch.ones_like(shift))

        def guide(shift, scales):
            pyro.sample("z", Uniformly(0.1 + shift, scales["z"]))

        return w, model, guide

    @pytest.mark.parametrize("step", ["loss_and_grads", "differentiable_loss"])
    def test_arguments_with_a_graph_of_their_own(self, step):
        w, model, guide = self.pair()
        net = nn.Linear(1, 3).double()
        grads = []
        for chunk_size in (4, None):
            loss = IWAE_ELBO(K=6, chunk_size=chunk_size)
            w.grad = None
            net.zero_grad()
            shift, scale, other = net(torch.ones(1, dtype=torch.float64)).unbind()
            arguments = shift, {"x": scale.exp(), "z": other.exp()}
            loss.loss(model, guide, *arguments)
            given = joined(Draws.made[: len(Draws.made) // 2], [4, 2], 1) if chunk_size is None else ()
            Draws.give(given)
            value = getattr(loss, step)(model, guide, *arguments)
            if step == "differentiable_loss":
                value.backward()
            grads.append([w.grad, net.weight.grad, net.bias.grad])
        torch.testing.assert_close(grads[0], grads[1])
        assert all(grad.abs().min() > 0 for grad in grads[0])

    def test_those_that_come_in_otherwise_are_refused(self):
        _, model, guide = self.pair()
        net = nn.Linear(1, 3).double()
        shift, scale, other = net(torch.ones(1, dtype=torch.float64)).unbind()
        arguments = shift, {"x": scale.exp(), "z": other.exp()}
        loss = IWAE_ELBO(K=6, chunk_size=4)
        with pytest.raises(ValueError, match="an argument of model and guide, or compute it inside"):
            loss.loss_and_grads(lambda: model(*arguments), lambda: guide(*arguments))
        assert net.weight.grad is None

    def test_an_argument_that_is_a_leaf(self):
        _, model, guide = self.pair()
        shift = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        one = torch.ones((), dtype=torch.float64)
        IWAE_ELBO(K=6, chunk_size=4).loss_and_grads(model, guide, shift, {"x": one, "z": one})
        assert shift.grad is not None


class TestErrors:
    """Nothing is left in ``.grad``."""

    def test_nan_in_a_late_chunk(self):
        calls = []
        w = torch.tensor(0.7, requires_grad=True)

        def model():
            z = pyro.sample("z", dist.Normal(w, 1.0))
            calls.append(None)
            bad = torch.tensor(math.nan if len(calls) % 3 == 0 else 0.0)
            pyro.sample("x", dist.Normal(w * z, 1.0, validate_args=False), obs=bad)

        def guide():
            pyro.sample("z", dist.Normal(w, 1.0))

        loss = IWAE_ELBO(K=6, chunk_size=2, vectorize_particles=True)
        for evaluate in (loss.loss, loss.loss_and_grads, loss.differentiable_loss):
            loss.particles(model, guide)
            calls.clear()
            with pytest.raises(ValueError, match=r"2 of 6 log-weights are NaN \(first at site 'x' \(model\)"):
                evaluate(model, guide)
            assert len(calls) >= 6  # found by a chunk drawn again
        assert w.grad is None

    def test_an_estimator_that_does_not_cover_the_guide(self):
        pair = Chain(discrete=True)
        loss = IWAE_ELBO(K=6, chunk_size=2)
        for evaluate in (loss.loss_and_grads, loss.differentiable_loss):
            with pytest.raises(ValueError, match=r"'b' cannot be reparameterised"):
                evaluate(pair.model, pair.guide)
        assert all(p.grad is None for p in pair.p.values())

    def test_a_model_that_does_not_repeat_itself(self):
        generator = torch.Generator().manual_seed(0)
        w = torch.tensor(0.5, requires_grad=True)

        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            noise = torch.randn((), generator=generator)
            pyro.sample("x", dist.Normal(w * z + noise, 0.1), obs=torch.tensor(0.3))

        def guide():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        with pytest.raises(ValueError, match="other log-weights when it is drawn again"):
            IWAE_ELBO(K=6, chunk_size=2).loss_and_grads(model, guide)
        assert w.grad is None


@pytest.mark.filterwarnings("ignore:.*give zero density to some particles")
def test_particles_and_cells_without_density():
    """-inf in some particles, and in all of one cell."""
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    dead = torch.tensor([False, False, True])

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.factor("alive", torch.where((z < 0.3) | dead, -math.inf, 0.0))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", Uniformly(a, 1.0))

    grads = []
    for chunk_size in (4, None):
        loss = PIWAE_ELBO(M=2, K=3, chunk_size=chunk_size)
        with pytest.warns(RuntimeWarning, match=r"first at site 'alive'"):
            loss.loss(model, guide)
        Draws.give([torch.cat(Draws.made[:2])] if chunk_size is None else ())
        pyro.set_rng_seed(2)
        a.grad = w.grad = None
        with pytest.warns(RuntimeWarning, match=r"-inf in 1 of 3 cell\(s\).*'alive'"):
            loss.loss_and_grads(model, guide)
        grads.append([a.grad, w.grad])
    torch.testing.assert_close(grads[0], grads[1])
    assert all(torch.isfinite(grad) for grad in grads[0])


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
@pytest.mark.filterwarnings("ignore:BatchNorm1d")
def test_running_statistics_are_updated_once_a_chunk(vectorize):
    net, x = Network(), torch.randn(5, 3)
    guide = AutoNormal(net.model)
    norm = net.layers[1]
    loss = IWAE_ELBO(K=6, chunk_size=3, vectorize_particles=vectorize)
    loss.loss(net.model, guide, x)
    runs = 2 if vectorize else 6
    results = []
    for evaluate in (loss.loss, loss.loss_and_grads, loss.differentiable_loss):
        norm.reset_running_stats()
        pyro.set_rng_seed(0)
        value = evaluate(net.model, guide, x)
        if evaluate == loss.differentiable_loss:
            value.backward()
        assert norm.num_batches_tracked == runs
        results.append(norm.running_mean.clone())
    assert all(torch.equal(result, results[0]) for result in results)


def test_guide_messengers_and_modules_take_steps():
    data = torch.randn(20, 3)

    def model(x):
        w = pyro.param("w", torch.zeros(3))
        with pyro.plate("data", 20, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) + w, 1.0).to_event(1), obs=x[index])

    plates = lambda: pyro.plate("data", 20, subsample_size=5)  # noqa: E731
    for guide in (
        AutoNormalMessenger(model, amortized_plates=()),
        AutoNormal(model, create_plates=lambda x: plates()),
    ):
        pyro.clear_param_store()
        svi = SVI(model, guide, Adam({"lr": 0.01}), loss=IWAE_ELBO(K=6, chunk_size=4))
        assert all(math.isfinite(svi.step(data)) for _ in range(3))
        assert pyro.param("w").abs().max() > 0


def test_the_backward_pass_runs_under_the_autocast_and_the_handlers_of_the_loss():
    x, dtypes, handled = torch.randn(5, 3), [], []
    net = Network().eval()
    guide = AutoNormal(net.model)

    class Record(Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] == "x":
                handled.append(msg["fn"])

    module = MIWAE_ELBO(M=1, K=6, chunk_size=3)(net.model, guide)
    module(x)
    net.layers[0].register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16), Record():
        value = module(x)
    value.backward()
    assert dtypes == 4 * [torch.bfloat16]
    assert len(handled) == 4
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert net.layers[0].weight.grad.abs().max() > 0


def test_a_plate_that_takes_all_of_its_indices_may_differ_in_size_from_chunk_to_chunk():
    w = torch.tensor(0.5, requires_grad=True)
    counts = []

    def model():
        b = pyro.sample("b", dist.Normal(w, 1.0))
        counts.append(random.choice([2, 3, 4, 5]))
        with pyro.plate("rows", counts[-1]):
            pyro.sample("x", dist.Normal(b, 1.0), obs=torch.zeros(counts[-1]))

    def guide():
        pyro.sample("b", dist.Normal(w, 1.0))

    loss = IWAE_ELBO(K=10, chunk_size=2, plates=())
    loss.loss(model, guide)
    counts.clear()
    loss.loss_and_grads(model, guide)
    assert counts[:5] == counts[5:]
    assert len(set(counts)) > 1


class Halves(Bound):
    """A user's own bound."""

    def value(self, log_w):
        return 2 * ((log_w / 2).logsumexp((0, 1)) - math.log(self.num_particles))


def test_a_bound_of_ones_own():
    for estimator in ("reparam", "dreg"):
        make = lambda e=estimator, **kw: ImportanceWeightedELBO(Halves(K=6), estimator=e, **kw)  # noqa: E731
        compare(Chain(), make, 4)


def test_no_chunks_graph_outlives_it():
    """Whatever the model computes is gone when the next chunk runs."""
    alive, peak = weakref.WeakSet(), [0]
    w = torch.tensor(0.5, requires_grad=True)

    class Watched(dist.Normal):
        def log_prob(self, value):
            result = super().log_prob(value)
            alive.add(self)
            peak[0] = max(peak[0], len(alive))
            return result

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", Watched(w * z, 1.0), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("z", dist.Normal(w, 1.0))

    loss = IWAE_ELBO(K=20, chunk_size=2)
    loss.loss(model, guide)
    gc.collect()
    gc.disable()
    try:
        peak[0] = 0
        loss.loss_and_grads(model, guide)
        assert peak[0] == 1
    finally:
        gc.enable()


@pytest.mark.slow
def test_peak_memory_is_that_of_one_chunk():
    """The VAE of the examples at K=2048 in chunks of 64, against K=64 at once: peak memory of a process."""
    program = """
        import resource, sys, torch, pyro
        sys.path[:0] = ["examples"]
        from shared.networks import VAE
        from pyro_iw import IWAE_ELBO
        K, chunk_size = int(sys.argv[1]), int(sys.argv[2]) or None
        torch.manual_seed(0)
        images = torch.rand(20, 784).bernoulli()
        vae = VAE(784, mean_image=images.mean(0))
        loss = IWAE_ELBO(K=K, chunk_size=chunk_size)
        loss.loss(vae.model, vae.guide, images[:1])
        for _ in range(20 if K == 64 else 1):
            loss.loss_and_grads(vae.model, vae.guide, images)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """

    def peak(*args):
        command = [sys.executable, "-c", textwrap.dedent(program), *map(str, args)]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    whole, chunked = peak(64, 0), peak(2048, 64)
    assert chunked <= 1.15 * whole, (chunked, whole)

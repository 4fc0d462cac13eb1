"""Compiled chunks against eager ones on the same noise, which the tests of chunks hold against one pass."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from helpers.by_hand import LOSSES
from helpers.cases import DataPlate, GlobalLatent, Masked, PlateInsideKeptPlate, SharedScale
from helpers.chains import Network
from helpers.compiled import (
    Configured,
    SmallVAE,
    binary,
    check_same,
    compiled_programs,
    model_of,
    pair,
    refused,
)
from pyro_iw import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    ImportanceWeightedELBO,
    LocallyEnhancedELBO,
    bounds,
)
from pyro_iw.compiling.chunked import ChunkedStep


def gradients(loss, model, guide, args, differentiable):
    """One step's loss and gradients, from one seed, and where that leaves the random state."""
    store = pyro.get_param_store()
    for leaf in dict(store.named_parameters()).values():
        leaf.grad = None
    pyro.set_rng_seed(5)
    if differentiable:
        value = loss.differentiable_loss(model, guide, *args)
        value.backward()
        value = value.item()
    else:
        value = loss.loss_and_grads(model, guide, *args)
    return value, {name: leaf.grad for name, leaf in store.named_parameters()}, torch.rand(())


def agree(make, make_pair, args=(), differentiable=False, chunk_size=4):
    """A compiled step in chunks has the eager one's loss and gradients; returns the program."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = make_pair()
    eager, loss = make(chunk_size=chunk_size), make(chunk_size=chunk_size, compile=True)
    for each in (eager, loss, loss):
        each.loss_and_grads(model, guide, *args)
    (program,) = compiled_programs(loss)
    assert isinstance(program, ChunkedStep)
    expected, expected_grads, after = gradients(eager, model, guide, args, differentiable)
    value, grads, after_again = gradients(loss, model, guide, args, differentiable)
    assert compiled_programs(loss) == [program]
    assert value == pytest.approx(expected, rel=1e-9)
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-6, atol=1e-9, msg=name)
    assert torch.equal(after, after_again)
    return program


@pytest.fixture(autouse=True)
def _in_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def case(kind=DataPlate):
    return pair(kind(torch.float64))


@pytest.mark.parametrize(
    ("name", "estimator", "kind"),
    [
        ("PIWAE", "dreg", Masked),
        ("TVO", "reparam", DataPlate),
        ("CIWAE", "stl", DataPlate),
        ("MIWAE", "score", SharedScale),
        ("PIWAE", "vimco", DataPlate),
        ("VR", "ovis", PlateInsideKeptPlate),
        ("IWAE", "rws", DataPlate),
    ],
)
def test_bounds_and_estimators(name, estimator, kind):
    """Each of either once; what they do to weights is no part of a program."""
    agree(lambda **kw: LOSSES[name](estimator=estimator, **kw), case(kind), differentiable=name == "PIWAE")


@pytest.mark.parametrize("chunk_size", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_sizes_of_chunks(chunk_size):
    program = agree(lambda **kw: MIWAE_ELBO(M=2, K=3, **kw), case(), chunk_size=chunk_size)
    assert len(program._second) == (2 if chunk_size == 5 else 1)


def test_one_by_one():
    agree(lambda **kw: IWAE_ELBO(K=5, vectorize_particles=False, **kw), case(), chunk_size=2)


def test_a_weight_of_the_kl_term_that_varies():
    """It is an input of both programs, and of dreg's weights in between."""
    weights = []
    make = lambda **kw: CIWAE_ELBO(  # noqa: E731
        K=6, beta=0.3, estimator="dreg", kl_weight=lambda step: weights[0] + 0.01 * step, **kw
    )
    weights[:] = [0.3]
    pyro.set_rng_seed(0)
    model, guide = case()()
    eager, loss = make(chunk_size=4), make(chunk_size=4, compile=True)
    for each in (eager, loss):
        for _ in range(2):
            each.loss_and_grads(model, guide)
    for weights[0] in (0.5, 0.9):
        results = [gradients(each, model, guide, (), False) for each in (eager, loss)]
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-9)
    assert len(compiled_programs(loss)) == 1


X = torch.linspace(-2.0, 2.0, 12, dtype=torch.float64)


def subsampled():
    def plate():
        return pyro.plate("data", 12, subsample_size=3)

    def model():
        with plate() as index:
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[index])

    def guide():
        noise = torch.rand(())  # a draw before that of the minibatch, on which nothing depends
        with plate() as index:
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.1)) * X[index], 1.0 + 0.0 * noise))

    return model, guide


@pytest.mark.parametrize("chunk_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_plate_that_subsamples_does_so_once_a_step(chunk_size):
    """The first chunk draws the minibatch, and draws it again in the second pass; others are given it."""
    make = lambda **kw: IWAE_ELBO(K=5, **kw)  # noqa: E731
    program = agree(make, subsampled, chunk_size=chunk_size)
    assert len(program._first) == len(program._second) == (3 if chunk_size == 2 else 2)


@pytest.mark.parametrize("estimator", ["reparam", "dreg"])
def test_dropout_and_batch_norm_in_train_mode(estimator):
    """Dropout falls on the same units in both passes, and statistics move once a chunk."""
    nets = []

    def make_pair():
        nets.append(SmallVAE())
        nets[-1].encoder.train(estimator == "reparam")  # dreg runs the guide twice
        return nets[-1].model, nets[-1].guide

    def make(**kw):
        return PIWAE_ELBO(M=2, K=3, estimator=estimator, **kw)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "BatchNorm1d")
        program = agree(make, make_pair, (binary().double(),))
        norm = nets[0].encoder[1]
        before, tracked = norm.running_mean.clone(), int(norm.num_batches_tracked)
        program.run([binary().double()], 1.0)
    moved = 2 if estimator == "reparam" else 0
    assert norm.num_batches_tracked == tracked + moved
    assert torch.equal(before, norm.running_mean) == (moved == 0)


@pytest.mark.filterwarnings("ignore:BatchNorm1d")
def test_steps_in_float32_stay_together():
    """Parameters and running statistics after steps of an optimiser, not one step alone."""
    torch.set_default_dtype(torch.float32)
    nets = []

    def make():
        nets.append(SmallVAE())
        return nets[-1].model, nets[-1].guide

    check_same(lambda **kw: IWAE_ELBO(K=5, chunk_size=2, **kw), make, (binary(),))
    eager, ours = nets
    torch.testing.assert_close(ours.encoder[1].running_mean, eager.encoder[1].running_mean)
    assert ours.encoder[1].num_batches_tracked == eager.encoder[1].num_batches_tracked


def test_autocast():
    torch.set_default_dtype(torch.float32)
    net = Network().eval()
    guide = AutoNormal(net.model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [IWAE_ELBO(K=4, chunk_size=2, compile=compile) for compile in (False, True)]
        results = []
        for loss in losses:
            for _ in range(3):
                result = gradients(loss, net.model, guide, (torch.ones(5, 3),), False)
            results.append(result)
    assert compiled_programs(losses[1])
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)


def test_enumerated_in_the_guide():
    """Both passes have log-weights for each value; the weight of the KL term goes into those in between."""

    def model():
        loc = pyro.param("loc", torch.tensor([-1.0, 0.5]))
        with pyro.plate("data", 4):
            y = pyro.sample("y", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(loc[y.long()], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[:4])

    def guide():
        logits = pyro.param("logits", torch.tensor([0.3, -0.2, 0.1, 0.4]))
        a = pyro.param("a", torch.tensor([0.1, 0.6]))
        with pyro.plate("data", 4):
            y = pyro.sample("y", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(a[y.long()] * X[:4], 0.9))

    agree(lambda **kw: IWAE_ELBO(K=6, estimator="dreg", kl_weight=0.7, **kw), lambda: (model, guide))


def test_two_levels():
    def model():
        g = pyro.sample("g", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[:4])

    def guide():
        g = pyro.sample("g", dist.Normal(pyro.param("a", torch.tensor(0.2)), 0.5))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(g + pyro.param("b", torch.tensor(0.3)) * X[:4], 0.9))

    make = lambda **kw: LocallyEnhancedELBO(  # noqa: E731
        bounds.IWAE(3), "data", outer=bounds.IWAE(5), estimator="dreg", **kw
    )
    agree(make, lambda: (model, guide), chunk_size=2)


@pytest.mark.slow
def test_an_autoguide():
    def make_pair():
        net = Network().eval()
        return net.model, AutoNormal(net.model, create_plates=lambda x: pyro.plate("data", 5))

    program = agree(lambda **kw: IWAE_ELBO(K=6, **kw), make_pair, (torch.randn(5, 3),))
    assert all(message["name"] for message, _ in program.messages)


def test_arguments_with_gradients():
    """Leaves, and tensors with a graph of their own."""

    def model(shift, scale):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(shift), 1.0))
        pyro.sample("x", dist.Normal(z + shift, scale), obs=torch.ones_like(shift))

    def guide(shift, scale):
        pyro.sample("z", dist.Normal(0.1 + shift, scale))

    results = []
    for compile in (False, True):
        loss = IWAE_ELBO(K=6, chunk_size=4, compile=compile)
        raw, shift = torch.tensor(0.3, requires_grad=True), torch.tensor(0.2, requires_grad=True)
        for _ in range(3):
            raw.grad = shift.grad = None
            pyro.set_rng_seed(1)
            loss.loss_and_grads(model, guide, shift, raw.exp())
        results.append([raw.grad, shift.grad])
    assert compiled_programs(loss)
    torch.testing.assert_close(results[0], results[1])


def test_a_random_generator_of_ones_own_is_refused():
    """By the eager step that comes first, which cannot put it back."""
    generator = torch.Generator()

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        noise = torch.randn((), generator=generator)
        pyro.sample("x", dist.Normal(pyro.param("w", torch.tensor(0.5)) * z + noise, 0.1), obs=X[0])

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="other log-weights when it is drawn again"):
        IWAE_ELBO(K=6, chunk_size=2, compile=True).loss_and_grads(model, guide)


def test_draws_that_only_one_of_the_programs_needs():
    """Noise without a bearing on the gradient, and noise on which nothing depends, move later draws alike."""

    def model():
        with pyro.plate("data", 4):
            torch.nn.functional.dropout(X[:4], 0.5, True)
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 1.0))
            pyro.factor("noise", torch.poisson(X[:4].abs()))
            pyro.sample("x", dist.Normal(z + torch.rand(4), 1.0), obs=X[:4])

    def guide():
        torch.bernoulli(torch.full((3,), 0.5))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.1)), 1.0))

    agree(lambda **kw: IWAE_ELBO(K=6, **kw), lambda: (model, guide))


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_through_inductor():
    """Draws that only one of the programs needs, dropout and batch normalisation."""

    class Noisy(SmallVAE):
        def guide(self, x):
            torch.nn.functional.dropout(x, 0.5, True)
            torch.rand(3)
            super().guide(x)

        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                pyro.factor("noise", torch.bernoulli(torch.full((len(x),), 0.5)))
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def make_pair():
        vae = Noisy()
        return vae.model, vae.guide

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "BatchNorm1d")
        make = lambda **kw: PIWAE_ELBO(M=2, K=3, **kw)  # noqa: E731
        agree(make, make_pair, (binary().double(),), chunk_size=3)


def test_a_chunk_that_is_another_one_when_drawn_again_is_refused(monkeypatch):
    model, guide = case()()
    monkeypatch.setattr(ChunkedStep, "set_random_state", lambda self, states: torch.manual_seed(7))
    refused(IWAE_ELBO(K=6, chunk_size=4, compile=True), "is drawn again from the same", model, guide)


def test_reading_a_value_is_refused():
    def loc(z):
        return z if z.mean() > 0 else -z

    model = model_of(loc)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.3)), 1.0))

    loss = IWAE_ELBO(K=6, chunk_size=4, plates=(), compile=True)
    refused(loss, "reads a tensor's value", model, guide)


def test_settings_are_guarded():
    net = Configured().double()
    make = lambda **kw: IWAE_ELBO(K=6, chunk_size=4, **kw)  # noqa: E731
    eager, loss = make(), make(compile=True)
    for _ in range(2):
        loss.loss_and_grads(net.model, net.guide)
    (program,) = compiled_programs(loss)
    net.options["shift"] = 0.4
    net.eval()
    for _ in range(3):
        results = [gradients(each, net.model, net.guide, (), False) for each in (eager, loss)]
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    assert compiled_programs(loss) not in ([], [program])


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_loss_that_is_not_finite_is_taken_back(bad):
    """The eager step on the same noise says where it comes from."""
    flag = torch.tensor(0.0)

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 1.0))
            x = torch.where(flag > 0, bad, torch.zeros(4))
            pyro.sample("sick", dist.Normal(z, 1.0, validate_args=False), obs=x)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.1)), 1.0))

    loss = IWAE_ELBO(K=6, chunk_size=4, compile=True)
    for _ in range(3):
        loss.loss_and_grads(model, guide)
    assert compiled_programs(loss)
    flag.fill_(1.0)
    if math.isnan(bad):
        with pytest.raises(ValueError, match=r"NaN.*'sick'"):
            loss.loss_and_grads(model, guide)
    else:
        with pytest.warns(RuntimeWarning, match=r"-inf in 4 of 4.*'sick'"):
            loss.loss_and_grads(model, guide)


def test_a_bound_that_reads_values():
    """One of the user's own may, for it is no part of a program."""

    class Careful(bounds.Bound):
        def value(self, log_w):
            assert float(log_w.detach().max()) < 1e6
            return log_w.logsumexp((0, 1)) - math.log(self.num_particles)

    agree(lambda **kw: ImportanceWeightedELBO(Careful(K=6), **kw), case(GlobalLatent))

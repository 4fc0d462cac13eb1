"""Compiled evaluation against eager evaluation on the same noise."""

import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from helpers.cases import CASES, DataPlate, ScaledPerCell
from helpers.compiled import DATA, Configured, SmallVAE, binary, guide_of, model_of
from pyro_iw import IWAE_ELBO, AnnealedImportanceSampler, ImportanceSampler
from pyro_iw.compiling.evaluation import Evaluation
from pyro_iw.posterior.sandwich import sandwich


def evaluations(sampler):
    return [program for program in sampler._compiler._programs.values() if isinstance(program, Evaluation)]


def on_one_seed(sampler, *args, calls=3):
    """What a sampler gives, call by call."""
    values = []
    for seed in range(calls):
        pyro.set_rng_seed(seed)
        values.append(sampler.log_marginal(*args))
    return values


def check_same(model, guide, *args, calls=3, sampler=ImportanceSampler, **options):
    """Eager and compiled calls from the same seeds agree; returns the compiled sampler."""
    eager = on_one_seed(sampler(model, guide, **options), *args, calls=calls)
    compiled = sampler(model, guide, compile=True, **options)
    values = on_one_seed(compiled, *args, calls=calls)
    assert evaluations(compiled), "nothing was compiled"
    torch.testing.assert_close(values, eager, rtol=1e-5, atol=1e-5)
    return compiled


@pytest.mark.filterwarnings("ignore:.*tempered density")
@pytest.mark.parametrize("case", [case for case in CASES if case is not ScaledPerCell])
def test_every_case_agrees_with_eager(case):
    """Chunks of 3, 3 and 1: two programs, and new arguments are none."""
    case = case()
    check_same(case.model_callable, case.guide_callable, num_particles=7, chunk_size=3)


def test_one_minibatch_for_all_chunks():
    """The chunk that draws it is eager in every call; with another one, the compiled chunks would differ."""
    x = 10.0 * torch.arange(6)

    def model():
        with pyro.plate("data", 6, subsample_size=2) as indices:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[indices])

    def guide():
        with pyro.plate("data", 6, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    sampler = check_same(model, guide, num_particles=12, chunk_size=4, calls=5)
    assert len(evaluations(sampler)) == 1
    assert len({tuple(value.tolist()) for value in on_one_seed(sampler, calls=5)}) > 1


@pytest.mark.parametrize("options", [{"jackknife": True}, {"plates": ()}, {"vectorize_particles": False}])
def test_options(options):
    case = DataPlate()
    check_same(case.model_callable, case.guide_callable, num_particles=6, chunk_size=2, **options)


def test_local_particles():
    x = torch.linspace(-1.0, 2.0, 4)

    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        g = pyro.sample("g", dist.Normal(0.4, 0.5))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal((g + x) / 2, 0.7))

    check_same(model, guide, num_particles=6, chunk_size=3, local="data", num_local=5)


def test_sites_enumerated_in_model_and_guide():
    x = torch.tensor([-1.0, 0.3, 2.0])

    def model():
        with pyro.plate("data", 3):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            d = pyro.sample("d", dist.Bernoulli(0.6), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z + 2 * d, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 3):
            c = pyro.sample("c", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(x / 2 + c, 1.0))

    check_same(model, guide, num_particles=6, chunk_size=3)


def test_a_data_set_with_a_smaller_last_batch():
    vae = SmallVAE().eval()
    batches = [binary(4), binary(4) * 0, binary(4), binary(3), binary(3)]
    results = []
    for compile in (False, True):
        pyro.set_rng_seed(1)
        sampler = ImportanceSampler(vae.model, vae.guide, 8, chunk_size=4, compile=compile)
        results.append(sampler.log_marginal_dataset(batches))
    assert len(evaluations(sampler)) == 2  # one for each size of a batch
    for name in ("values", "monte_carlo_errors", "ess"):
        torch.testing.assert_close(getattr(results[1], name), getattr(results[0], name))
    assert len(sampler.compile_seconds) == 2
    assert all(seconds > 0 for seconds in sampler.compile_seconds.values())


@pytest.mark.usefixtures("inductor")
def test_through_inductor():
    vae = SmallVAE().eval()
    pyro.enable_validation(False)
    try:
        check_same(vae.model, vae.guide, binary(4), num_particles=9, chunk_size=3)
    finally:
        pyro.enable_validation(True)


# The guide's networks


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products by their number of rows."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.rows.append(args[-2].shape[0])
        return func(*args, **(kwargs or {}))


def test_the_encoder_runs_once_a_call_and_follows_its_parameters():
    vae = SmallVAE().eval()
    x = binary(4)
    sampler = check_same(vae.model, vae.guide, x, num_particles=15, chunk_size=3)
    with Counting() as counting:
        sampler.log_marginal(x)
    encoder, decoder = 2, 2 * 5  # layers, of 4 rows, and of 3 particles times 4 rows
    assert counting.rows == [4] * encoder + [12] * decoder
    with torch.no_grad():
        vae.encoder[0].weight.mul_(-1.5)
    after = on_one_seed(sampler, x)
    torch.testing.assert_close(
        after, on_one_seed(ImportanceSampler(vae.model, vae.guide, 15, chunk_size=3), x)
    )
    other = binary(4).flip(0)
    torch.testing.assert_close(
        on_one_seed(sampler, other),
        on_one_seed(ImportanceSampler(vae.model, vae.guide, 15, chunk_size=3), other),
    )


def test_dropout_in_the_encoder_is_drawn_for_every_chunk():
    net = nn.Sequential(nn.Linear(1, 5), nn.Dropout(0.5), nn.Linear(5, 1))

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(net(DATA.unsqueeze(-1)).squeeze(-1), 1.0))

    sampler = check_same(model_of(lambda z: z), guide, num_particles=9, chunk_size=3)
    (program,) = evaluations(sampler)
    assert program.once is not None  # its first layer, and no more


def test_batch_norm_in_train_mode_keeps_its_statistics():
    """Each chunk normalises over the batch and updates them, as an eager one does; nothing is read aside."""

    def run(**options):
        pyro.set_rng_seed(0)
        net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))

        def guide(x):
            loc = net(x[:, None])[:, 0]
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(loc, 1.0))

        def model(x):
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        sampler = ImportanceSampler(model, guide, num_particles=8, chunk_size=2, **options)
        values = torch.stack(on_one_seed(sampler, torch.tensor([-1.0, 0.3, 2.0])))
        return sampler, [values, *net[1].buffers()]

    (_, eager), (sampler, compiled) = run(), run(compile=True)
    assert evaluations(sampler)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_settings_are_followed():
    """``settings.beta`` is read in Python."""
    pair = Configured().eval()
    sampler = ImportanceSampler(pair.model, pair.guide, 6, chunk_size=3, compile=True)
    on_one_seed(sampler)
    pair.gamma = 2.0
    after = on_one_seed(sampler)
    torch.testing.assert_close(after, on_one_seed(ImportanceSampler(pair.model, pair.guide, 6, chunk_size=3)))
    assert evaluations(sampler)


# What goes wrong


def test_what_cannot_be_compiled_runs_eagerly_after_one_warning():
    def loc(z):
        return z if z.mean() > 0 else 2 * z

    model, guide = model_of(loc), guide_of(DATA)
    sampler = ImportanceSampler(model, guide, 12, chunk_size=3, compile=True)
    pyro.set_rng_seed(0)
    with pytest.warns(RuntimeWarning, match="the chunk runs eagerly: it reads a tensor's value") as caught:
        value = sampler.log_marginal()
    assert len(caught) == 1
    pyro.set_rng_seed(0)
    assert torch.equal(value, ImportanceSampler(model, guide, 12, chunk_size=3).log_marginal())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.log_marginal()


def test_a_handler_around_the_call_is_heeded():
    case = DataPlate()
    sampler = check_same(case.model_callable, case.guide_callable, num_particles=6, chunk_size=3)
    eager = ImportanceSampler(case.model_callable, case.guide_callable, 6, chunk_size=3)
    with pyro.poutine.mask(mask=torch.tensor([True, False, True, True])):
        values = on_one_seed(sampler)
        expected = on_one_seed(eager)
    torch.testing.assert_close(values, expected)
    assert all(value[1] == 0 for value in values)


@pytest.mark.parametrize("compile", [False, True])
def test_a_nan_in_a_later_call_names_its_site(compile):
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    sampler = ImportanceSampler(model, guide, 6, chunk_size=2, compile=compile)
    sampler.log_marginal(torch.zeros(3))
    sampler.log_marginal(torch.zeros(3))
    with pytest.raises(ValueError, match=r"2 of 6 log-weights are NaN or \+inf \(first at site 'x'"):
        sampler.log_marginal(torch.tensor([0.0, torch.nan, 0.0]))


@pytest.mark.parametrize("compile", [False, True])
def test_a_dead_cell_names_its_site_and_leaves_the_random_state(compile):
    def model(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z - 50.0, z + 50.0, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    sampler = ImportanceSampler(model, guide, 6, chunk_size=2, compile=compile)
    for _ in range(2):
        sampler.log_marginal(torch.zeros(2))
    pyro.set_rng_seed(3)
    with pytest.warns(RuntimeWarning, match=r"In 1 of 2 cell\(s\) none of the 6 .* \(first at site 'x'"):
        value = sampler.log_marginal(torch.tensor([0.0, 1000.0]))
    after = torch.rand(3)
    assert value[1] == -torch.inf
    assert value[0].isfinite()
    pyro.set_rng_seed(3)
    torch.randn(6, 2)
    assert torch.equal(after, torch.rand(3))


def test_copies_and_pickles_begin_afresh():
    case = DataPlate()
    sampler = check_same(case.model_callable, case.guide_callable, num_particles=6, chunk_size=3)
    other = pickle.loads(pickle.dumps(sampler._compiler))
    assert other.what == sampler._compiler.what
    assert not other._programs
    assert not evaluations(copy.deepcopy(sampler))


def test_seconds_of_a_loss():
    loss = IWAE_ELBO(K=3, compile=True)
    case = DataPlate()
    assert loss.compile_seconds == {}
    for _ in range(2):
        loss.loss_and_grads(case.model_callable, case.guide_callable)
    ((title, seconds),) = loss.compile_seconds.items()
    assert title.startswith("a step of ")
    assert seconds > 0


# Chains


def annealed(model, guide, **options):
    return AnnealedImportanceSampler(model, guide, 4, 5, num_adaptation=4, num_leapfrog=2, **options)


def funnel(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(p[..., 0] * z, 0.5), obs=x)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("from_prior", [False, True])
def test_annealed_chains(batches, from_prior):
    vae = SmallVAE().eval()
    model, guide, x = (funnel, None, torch.ones(3)) if from_prior else (vae.model, vae.guide, binary(4))
    compiled = check_same(model, guide, x, calls=batches, sampler=annealed)
    assert len(compiled.compile_seconds) == 1
    assert next(iter(compiled.compile_seconds)).startswith("a leapfrog step of ")


def test_annealed_chains_run_the_encoder_once():
    vae = SmallVAE().eval()
    x = binary(4)
    sampler = annealed(vae.model, vae.guide, compile=True)
    sampler.log_marginal(x)
    (program,) = evaluations(sampler)
    coordinates = torch.randn(4, 4, 3)
    with Counting() as counting:
        evaluate = program.start([x, coordinates])
        for _ in range(3):
            evaluate([coordinates])
    # The decoder's two layers forwards and backwards.
    assert counting.rows == [4] * 2 + [16] * 4 * 3


def test_sandwich():
    vae = SmallVAE().eval()
    results = []
    for compile in (False, True):
        pyro.set_rng_seed(0)
        found = sandwich(
            vae.model, vae.guide, binary(4), num_chains=3, num_temperatures=4, num_leapfrog=2, compile=compile
        )
        results.append(torch.stack([found.lower, found.upper]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)

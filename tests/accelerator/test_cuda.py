"""On CUDA, where there is one: its own noise, CUDA graphs, NCCL, and no waiting within a step.

``checks.py`` compares its numbers with the CPU's: ``PYRO_IW_DEVICE=cuda python -m pytest
tests/accelerator/checks.py``.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from helpers.by_hand import LOSSES
from helpers.on_devices import Hierarchy, Pair, step
from pyro_iw import (
    IWAE_ELBO,
    MIWAE_ELBO,
    AnnealedImportanceSampler,
    FusedOptim,
    ImportanceSampler,
    LocallyEnhancedELBO,
)
from pyro_iw.bounds import IWAE, MIWAE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def unvalidated():
    with pyro.validation_enabled(False):
        yield


def in_float64(pair):
    """Whose numbers do not hang on rounding: of a leapfrog that takes too large steps they do."""
    for name, value in vars(pair).items():
        if isinstance(value, torch.nn.Module) or (torch.is_tensor(value) and value.is_floating_point()):
            setattr(pair, name, value.double())
    return pair


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


COMPILED = [
    *((name, {}) for name in LOSSES),
    *(("IWAE", {"estimator": estimator}) for estimator in ("stl", "dreg", "score", "vimco", "ovis", "rws")),
    ("MIWAE", {"estimator": "dreg", "backward_particles": 2}),
    ("IWAE", {"chunk_size": 2}),
    ("IWAE", {"chunk_size": 3, "estimator": "dreg"}),
]


@pytest.mark.parametrize(("name", "options"), COMPILED, ids=str)
def test_compiled_steps_replay_eagers(name, options):
    """The same noise from the same generator, step after step, as a CUDA graph draws it anew."""
    path = options.get("estimator") not in ("score", "vimco")
    found = {}
    for compiled in (False, True):
        loss, pair = LOSSES[name](compile=compiled, **options), Pair(DEVICE, path=path)
        found[compiled] = [step(loss, pair, seed=seed) for seed in (0, 0, 1, 2, 2)]
        if compiled:
            assert loss.compile_seconds  # it did not fall back
    for one, other in zip(*found.values(), strict=True):
        close(one, other)
    values = [value for value, _ in found[True]]
    assert values[3] == values[4]
    assert values[2] != values[3]


class Mixture:
    """A discrete latent a datapoint; without a path, its draws and a normal's look at values on a GPU."""

    def __init__(self):
        pyro.clear_param_store()
        torch.manual_seed(0)
        self.x = torch.randn(6, device=DEVICE)
        self.loc, self.one = torch.tensor([-1.0, 0.0, 1.0], device=DEVICE), torch.ones((), device=DEVICE)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=0 * self.loc))
            pyro.sample("x", dist.Normal(self.loc[z], self.one), obs=x)

    def guide(self, x):
        logits = pyro.param("logits", lambda: torch.zeros(6, 3, device=DEVICE))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits))


class Correlated:
    """A covariance, whose decomposition is looked at: no CUDA graph can hold it."""

    def __init__(self):
        pyro.clear_param_store()
        self.x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        self.zeros = torch.zeros(2, device=DEVICE)
        self.covariance = torch.tensor([[1.0, 0.5], [0.5, 1.0]], device=DEVICE)

    def model(self, x):
        z = pyro.sample("z", dist.MultivariateNormal(self.zeros, self.covariance))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(z, self.covariance), obs=x)

    def guide(self, x):
        loc = pyro.param("loc", lambda: self.zeros.clone())
        size = pyro.param("size", lambda: self.zeros.clone())
        covariance = torch.diag_embed(size.exp()) + 0.1 * self.covariance
        pyro.sample("z", dist.MultivariateNormal(loc, covariance))


@pytest.mark.parametrize(("pair", "estimator"), [(Mixture, "vimco"), (Mixture, "rws"), (Correlated, "dreg")])
def test_what_a_cuda_graph_cannot_hold(pair, estimator):
    """Draws that look at values are made in another way; other looks do without a CUDA graph."""
    found = {}
    for compiled in (False, True):
        loss, made = IWAE_ELBO(K=4, estimator=estimator, compile=compiled), pair()
        found[compiled] = [step(loss, made, seed=seed) for seed in (0, 1, 1)]
        if compiled:
            assert loss.compile_seconds
    for one, other in zip(*found.values(), strict=True):
        close(one, other)
    assert torch.randn(3, device=DEVICE).isfinite().all()  # the generator is none the worse


def test_compiled_training():
    """Parameters that change in place are read anew by every replay."""
    found = []
    for compiled in (False, True):
        pair = Pair(DEVICE)
        optim = FusedOptim(torch.optim.Adam, {"lr": 0.05})
        svi = SVI(pair.model, pair.guide, optim, loss=IWAE_ELBO(K=4, compile=compiled))
        pyro.set_rng_seed(0)
        found.append([svi.step(pair.x) for _ in range(20)])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][-1] != found[0][0]


@pytest.mark.parametrize("options", [{}, {"estimator": "stl"}], ids=str)
def test_chunks_draw_again_what_they_drew(options):
    """The gradient of chunks, whose second pass needs the first one's noise, is that of their loss."""
    pair, loss = in_float64(Pair(DEVICE)), IWAE_ELBO(K=6, chunk_size=2, **options)
    _, grads = step(loss, pair, seed=3)
    _, grads = step(loss, pair, seed=3)

    def value():
        pyro.set_rng_seed(3)
        return loss.loss(pair.model, pair.guide, pair.x)

    weight, width = pair.decoder.weight, 1e-4  # of the model, whose gradient all estimators share
    with torch.no_grad():
        weight[0, 0] += width
        above = value()
        weight[0, 0] -= 2 * width
        below = value()
    (found,) = (grad[0, 0].item() for name, grad in grads.items() if name.endswith("decoder$$$weight"))
    assert found == pytest.approx((above - below) / (2 * width), rel=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        *LOSSES.values(),
        lambda **kw: IWAE_ELBO(K=6, estimator="dreg", **kw),
        lambda **kw: IWAE_ELBO(K=6, chunk_size=2, **kw),
        lambda **kw: MIWAE_ELBO(M=2, K=3, backward_particles=2, **kw),
        lambda **kw: LocallyEnhancedELBO(IWAE(3), "data", MIWAE(2, 1), **kw),
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_no_step_waits(loss, compiled):
    """PyTorch's own look-out sees no synchronisation."""
    loss = loss(compile=compiled)
    pair = (Hierarchy if isinstance(loss, LocallyEnhancedELBO) else Pair)(DEVICE)
    for seed in (0, 1):
        step(loss, pair, seed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.differentiable_loss(pair.model, pair.guide, pair.x).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:.*k̂|.*effective particles|.*accepted")
def test_compiled_evaluation():
    found = []
    for compiled in (False, True):
        pair = in_float64(Pair(DEVICE, size=6))
        options = {"progress": False, "compile": compiled}
        pyro.set_rng_seed(0)
        sampler = ImportanceSampler(pair.model, pair.guide, 40, chunk_size=20, **options)
        parts = [sampler.log_marginal(pair.x), sampler(pair.x).ess]
        parts.append(ImportanceSampler(pair.model, pair.guide, 40, chunk_size="auto", **options)(pair.x).ess)
        options |= {"num_adaptation": 2, "num_leapfrog": 2}
        pyro.set_rng_seed(0)
        parts.append(AnnealedImportanceSampler(pair.model, pair.guide, 4, 6, **options).log_marginal(pair.x))
        found.append(parts)
    close(*found)


def test_a_group_over_nccl():
    """One rank alone: the exchange on the device, eager and compiled, leaves the loss as it is."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_nccl_available():
        pytest.skip("no NCCL")
    store = distributed.HashStore()
    distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        group = distributed.group.WORLD
        for options in ({}, {"compile": True}, {"backward_particles": 2}):
            loss = IWAE_ELBO(K=6, particle_group=group, **options)
            pair = Pair(DEVICE)
            for seed in (0, 1):
                pyro.set_rng_seed(seed)
                particles = loss.particles(pair.model, pair.guide, pair.x)
                by_hand = -(particles.log_weights.logsumexp(0) - torch.tensor(6.0).log()).sum() * 10
                pyro.set_rng_seed(seed)
                value = loss.differentiable_loss(pair.model, pair.guide, pair.x).detach()
                close(value.cpu(), by_hand.cpu())
    finally:
        distributed.destroy_process_group()

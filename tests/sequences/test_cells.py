"""Every sequence has a filter of its own: lengths, order, and what goes wrong in one of them."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from helpers.linear_gaussian import S0, A, B, Q, R, simulate
from pyro_iw import FIVO_ELBO
from pyro_iw.resampling import _invert
from pyro_iw.sequences import filtering
from pyro_iw.sequences.protocol import Protocol, read_sequences

K, T, N = 6, 8, 5


class Padded:
    """A walk of which each sequence has its length; the state in nested containers, with data among it."""

    def init(self, state, lengths):
        state["memory"] = OrderedDict(z=(torch.zeros((), dtype=torch.float64), [0, "any"]))
        state["lengths"] = lengths  # of as many sequences as there are particles, in some tests
        state["t"] = 0

    def step(self, state, x):
        t, lengths = state["t"], state["lengths"]
        with pyro.plate("data", len(x)), poutine.mask(mask=t < lengths):
            prior = dist.Normal(A * state["memory"]["z"][0], Q if t else S0)
            z = pyro.sample("z", prior)
            state["memory"] = OrderedDict(z=(z, [t, "any"]))
            pyro.sample("x", dist.Normal(B * z, R), obs=x)
            self.more(t, x)
        state["t"] = t + 1

    def more(self, t, x):
        pass


class PaddedGuide:
    def init(self, state, lengths):
        pass

    def step(self, state, x):
        with pyro.plate("data", len(x)), poutine.mask(mask=state["t"] < state["lengths"]):
            z = state["memory"]["z"][0]
            fn = dist.Normal(0.5 * z + 0.4 * x, 0.6)
            pyro.sample("z", fn, infer={"t": state["t"]})


class Noise(Messenger):
    """Gives the guide's draws their noise, by step and sequence."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z" and msg["value"] is None and "t" in msg["infer"]:
            fn = msg["fn"]
            noise = self.table[msg["infer"]["t"]]
            if fn.batch_shape == noise.shape:
                msg["value"] = fn.loc + fn.scale * noise
                msg["done"] = True


@pytest.fixture
def _fixed_offsets(monkeypatch):
    """Systematic resampling from the middle of each stratum."""

    def middle(weights: Tensor, size: int) -> Tensor:
        offsets = (0.5 + torch.arange(size, dtype=torch.float64)) / size
        return _invert(
            weights, offsets.reshape(-1, *[1] * (weights.dim() - 1)).expand(size, *weights.shape[1:])
        )

    monkeypatch.setitem(filtering.SCHEMES, "systematic", middle)


def run(x: Tensor, lengths: Tensor, table: Tensor, threshold: float = 0.7, size: int = K) -> Tensor:
    loss = FIVO_ELBO(size, threshold)
    with torch.no_grad(), Noise(table):
        return loss._estimate(
            Protocol(Padded(), PaddedGuide()), read_sequences((x,), {"lengths": lengths}), 1.0
        )[1].bound


@pytest.fixture
def table() -> Tensor:
    return torch.randn(T, K, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


LENGTHS = torch.tensor([8, 3, 1, 6, 8])


@pytest.mark.usefixtures("_fixed_offsets")
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0])
def test_each_gets_the_number_it_gets_alone(threshold, table) -> None:
    x = simulate(T, N)
    garbage = torch.where(torch.arange(T).unsqueeze(-1) < LENGTHS, x, 100.0)
    together = run(garbage, LENGTHS, table, threshold)
    for n, length in enumerate(LENGTHS.tolist()):
        alone = run(x[:length, n : n + 1], LENGTHS[n : n + 1], table[:length, :, n : n + 1], threshold)
        torch.testing.assert_close(together[n], alone[0], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_fixed_offsets")
def test_the_order_of_sequences_does_not_matter(table) -> None:
    x, order = simulate(T, N), torch.tensor([3, 0, 4, 2, 1])
    before = run(x, LENGTHS, table)
    after = run(x[:, order], LENGTHS[order], table[:, :, order])
    assert before.unique().numel() == N
    torch.testing.assert_close(after, before[order], rtol=1e-12, atol=0)


@pytest.mark.usefixtures("_fixed_offsets")
@pytest.mark.parametrize("size", [2, K])
def test_data_of_as_many_sequences_as_particles_stay_where_they_are(size) -> None:
    """A tensor [N] with N = K looks like one over particles, and is not."""
    torch.manual_seed(0)
    x, lengths = simulate(T, size), torch.tensor([8, 3, 1, 6, 8, 2])[:size]
    table = torch.randn(T, size, size, dtype=torch.float64)
    together = run(x, lengths, table, size=size)
    for n, length in enumerate(lengths.tolist()):
        alone = run(x[:length, [n]], lengths[[n]], table[:length, :, [n]], size=size)
        torch.testing.assert_close(together[n], alone[0], rtol=1e-12, atol=1e-12)


def draws(x: Tensor, lengths: Tensor, threshold: float) -> list:
    pair = Protocol(Padded(), PaddedGuide())
    filtered, _ = FIVO_ELBO(K, threshold)._estimate(pair, read_sequences((x,), {"lengths": lengths}), 1.0)
    return [moment.draw for moment in filtered.moments]


def test_a_sequence_that_has_ended_is_not_resampled() -> None:
    """Once after its last step, before it is known to be the last; never again."""
    for t, draw in enumerate(draws(simulate(T, N), LENGTHS, 1.0)):
        if t:
            assert draw.chosen[0].tolist() == (t <= LENGTHS).tolist()
            still = draw.ancestors[:, t > LENGTHS]
            assert torch.equal(still, torch.arange(K).unsqueeze(-1).expand_as(still))


@pytest.mark.usefixtures("_fixed_offsets")
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0])
def test_minus_infinity_in_one_leaves_the_others_and_is_named(threshold, table) -> None:
    x, full = simulate(T, N), torch.full((N,), T)
    before = run(x, full, table, threshold)

    class Excluded(Padded):
        def more(self, t, x):
            wall = torch.where(torch.arange(len(x)) == 3, -math.inf if t == 2 else 0.0, 0.0)
            pyro.factor("wall", wall)

    loss = FIVO_ELBO(K, threshold)
    with (
        Noise(table),
        pytest.warns(RuntimeWarning, match=r"-inf in 1 of 5 .* 3, since step 2 \(first at site 'wall'"),
    ):
        assert loss.loss(Excluded(), PaddedGuide(), x, lengths=full) == math.inf
    p = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    class Guide(PaddedGuide):
        def step(self, state, x):
            with pyro.plate("data", len(x)):
                fn = dist.Normal(0.5 * state["memory"]["z"][0] + p * x, 0.6)
                pyro.sample("z", fn, infer={"t": state["t"]})

    with Noise(table):
        _, estimate = loss._estimate(
            Protocol(Excluded(), Guide()), read_sequences((x,), {"lengths": full}), 1.0
        )
    others = torch.tensor([0, 1, 2, 4])
    assert torch.equal(estimate.bound[others], before[others])
    assert estimate.bound[3] == -math.inf
    estimate.loss.backward()
    assert p.grad.isfinite()


@pytest.mark.usefixtures("_fixed_offsets")
def test_nan_in_one_leaves_the_others_and_is_named(table) -> None:
    x, full = simulate(T, N), torch.full((N,), T)
    before = run(x, full, table)
    x[4, 1] = math.nan
    pyro.enable_validation(False)
    try:
        after = run(x, full, table)
        others = torch.tensor([0, 2, 3, 4])
        assert torch.equal(after[others], before[others])
        assert after[1].isnan()
        message = (
            r"NaN in 1 of 5 sequence\(s\), the first of them 1, since step 4 \(first at site 'z' \(guide\)\)"
        )
        with pytest.raises(ValueError, match=message):
            FIVO_ELBO(K).loss(Padded(), PaddedGuide(), x, lengths=full)
    finally:
        pyro.enable_validation(True)


def test_two_plates_are_cells_both() -> None:
    """A filter for every index of two plates; the joint one of both is another number."""

    class Model:
        def __init__(self, guide=False):
            self.guide = guide

        def init(self, state):
            if not self.guide:
                state["z"] = torch.zeros((), dtype=torch.float64)

        def step(self, state, x):
            with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(A * state["z"], Q))
                if not self.guide:
                    state["z"] = z
                    pyro.sample("x", dist.Normal(B * z, R), obs=x)

    x = simulate(4, 6)
    pair = Protocol(Model(), Model(True)), read_sequences((x.reshape(4, 3, 2),), {}), 1.0
    bounds = {}
    for plates in (None, ("rows", "columns"), "rows", ()):
        loss = FIVO_ELBO(4, 0.0, plates=plates)
        loss.loss(*pair[0], x.reshape(4, 3, 2))
        pyro.set_rng_seed(0)
        filtered, estimate = loss._estimate(*pair)
        bounds[plates] = estimate.bound
        if plates is None:
            log_w = filtered.log_weights(filtered.moments[-1])[0]
    assert torch.equal(bounds[None], bounds["rows", "columns"])
    for plates, joint in ((None, log_w), ("rows", log_w.sum(-1)), ((), log_w.sum((-1, -2)))):
        torch.testing.assert_close(bounds[plates], joint.logsumexp(0) - math.log(4))

"""What filters say of sequences: against Kalman's filter and smoother, and by following the genealogy by
hand."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SMCFilter
from torch import Tensor

from helpers.linear_gaussian import A, B, Proposal, Q, Walk, kalman, near_optimal, simulate
from pyro_iw import ParticleFilter
from sequences.test_cells import LENGTHS, Padded, PaddedGuide
from sequences.test_filtering import Hidden, HiddenGuide


def smoother(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of Rauch, Tung and Striebel, ``[T, N]``."""
    _, means, variances = kalman(x)
    mean, variance = means[-1], variances[-1]
    smoothed = [(mean, variance)]
    for t in range(len(x) - 2, -1, -1):
        ahead = A**2 * variances[t] + Q**2
        gain = A * variances[t] / ahead
        mean = means[t] + gain * (mean - A * means[t])
        variance = variances[t] + gain**2 * (variance - ahead)
        smoothed.append((mean, variance))
    first, second = zip(*smoothed[::-1], strict=True)
    return torch.stack(first), torch.stack(second)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return simulate(12, 4)


def test_against_the_kalman_filter(x) -> None:
    truth, means, variances = kalman(x)
    filtered = ParticleFilter(Walk(), near_optimal(), 2000, num_filters=10)(x)
    error = filtered.monte_carlo_error
    assert ((filtered.log_marginal - truth).abs() < 4 * error).all()
    assert (error < 0.05).all()
    assert (filtered.mean() - means).abs().max() < 0.05
    assert (filtered.variance("z") - variances).abs().max() < 0.05
    torch.testing.assert_close(filtered.log_increments.sum(0), filtered.log_marginal)
    each = torch.stack([kalman(x[: t + 1])[0] for t in range(12)]).diff(dim=0)
    assert (filtered.log_increments[1:] - each).abs().max() < 0.1
    assert filtered.ess.shape == (12, 4)
    assert (filtered.ess > 500).all()
    assert (filtered.ess <= 2000).all()
    torch.testing.assert_close(filtered.weights.sum(1), torch.ones(12, 4, dtype=torch.float64))
    assert "T=12, sequences=4, num_particles=2000, num_filters=10" in repr(filtered)


def test_filters_count_by_their_evidence(x) -> None:
    """Few particles in many filters: without the filters' own weights their means are off."""
    _, means, _ = kalman(x)
    filtered = ParticleFilter(Walk(), near_optimal(scale=1.5), 3, num_filters=6000)(x[:6])
    within = filtered.weights.reshape(6, 6000, 3, 4)
    plain = (
        (within / within.sum(2, keepdim=True) * filtered.values["z"].reshape(6, 6000, 3, 4)).sum(2).mean(1)
    )
    assert (filtered.mean() - means[:6]).abs().max() < 0.04
    assert (plain - means[:6]).abs().max() > 0.08


@pytest.mark.slow
def test_against_the_kalman_smoother(x) -> None:
    means, variances = smoother(x)
    filtered = ParticleFilter(Walk(), near_optimal(), 150, num_filters=4)(x)
    draws = filtered.smooth(600)["z"]
    assert draws.shape == (600, 12, 4)
    error = (variances / 150).sqrt()  # of fewer independent ones: the particles are shared
    assert ((draws.mean(0) - means).abs() < 5 * error).all()
    assert (draws.var(0) / variances - 1).abs().max() < 0.35
    together = ((draws[:, 1:] - draws.mean(0)[1:]) * (draws[:, :-1] - draws.mean(0)[:-1])).mean(0)
    gain = A * kalman(x)[2][:-1] / (A**2 * kalman(x)[2][:-1] + Q**2)
    assert (together - gain * variances[1:]).abs().max() < 0.08
    # Along the genealogy the early steps have few distinct values, and the late ones are right.
    lines = ParticleFilter(Walk(), near_optimal(), 4000, num_filters=4)(x).trajectories(4000)["z"]
    assert ((lines.mean(0) - means).abs()[-3:] < 5 * error[-3:]).all()


def test_the_error_is_that_of_repetitions(x) -> None:
    judge = ParticleFilter(Walk(), Proposal(), 100, num_filters=20)
    runs = [judge(x) for _ in range(40)]
    spread = torch.stack([run.log_marginal for run in runs]).std(0)
    claimed = torch.stack([run.monte_carlo_error for run in runs]).square().mean(0).sqrt()
    assert (spread / claimed - 1).abs().max() < 0.45
    assert ParticleFilter(Walk(), Proposal(), 100, num_filters=1)(x).monte_carlo_error.isnan().all()


def test_the_two_ways_to_the_evidence_agree(x) -> None:
    judge = ParticleFilter(Walk(), Proposal(), 50)
    judge.log_marginal(x)
    pyro.set_rng_seed(0)
    alone = judge.log_marginal(x)
    pyro.set_rng_seed(0)
    assert torch.equal(judge(x).log_marginal, alone)


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_the_genealogy_by_hand(x, threshold) -> None:
    filtered = ParticleFilter(Walk(), Proposal(), 8, num_filters=3, ess_threshold=threshold)(x)
    counts = filtered.num_ancestors()
    for n in range(4):
        total = torch.zeros(12)
        for m in range(3):
            alive = set(range(8 * m, 8 * m + 8))
            expected = []
            for t in range(11, -1, -1):
                expected.append(len(alive))
                alive = {filtered.ancestors[t, k, n].item() for k in alive}
                assert all(8 * m <= k < 8 * m + 8 for k in alive)  # filters do not mix
            total = total + torch.tensor(expected[::-1])
        torch.testing.assert_close(counts[:, n], total.double() / 3)
    assert (counts[-1] == 8).all()
    assert (counts[0] == 8).all() == (threshold == 0.0)
    lines = filtered.trajectories(50)["z"]
    for n in range(4):
        heads = {tuple(line) for line in lines[:, :, n].tolist()}
        for line in heads:
            k = (filtered.values["z"][-1, :, n] == line[-1]).nonzero().item()
            for t in range(11, -1, -1):
                assert filtered.values["z"][t, k, n] == line[t]
                k = filtered.ancestors[t, k, n].item()


def test_a_finished_sequence_stays_as_it_was() -> None:
    x = simulate(8, 5)
    filtered = ParticleFilter(Padded(), PaddedGuide(), 2000, ess_threshold=1.0)(x, lengths=LENGTHS)
    inside = torch.arange(8).unsqueeze(-1) < LENGTHS
    assert torch.equal(filtered.active, inside)
    assert torch.equal(filtered.mean().isfinite(), inside)
    assert torch.equal(filtered.ess.isfinite(), inside)
    _, means, _ = kalman(x)
    assert (filtered.mean() - means)[inside].abs().max() < 0.1
    own = torch.arange(16_000)
    for n, length in enumerate(LENGTHS.tolist()):
        assert (filtered.ancestors[length:, :, n] == own).all()
        assert torch.equal(filtered.weights[-1, :, n], filtered.weights[length - 1, :, n])
        assert (filtered.log_increments[length:, n].abs() < 1e-12).all()
    # The posterior of the last step of a short sequence is that of its filter.
    draws = filtered.trajectories(4000)["z"]
    last = torch.stack([draws[:, length - 1, n].mean() for n, length in enumerate(LENGTHS.tolist())])
    assert (last - means[LENGTHS - 1, torch.arange(5)]).abs().max() < 0.1


class Counting:
    """Pyro's own example keeps the time in self and names its sites by it."""

    def __init__(self, guide=False):
        self.guide = guide

    def init(self, state, initial):
        self.t = 0
        z = pyro.sample("z_init", dist.Delta(initial, event_dim=1))
        if not self.guide:
            state["z"] = z

    def step(self, state, y):
        self.t += 1
        turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        z = pyro.sample(f"z_{self.t}", dist.Normal(state["z"] @ turn, 1.0).to_event(1))
        if not self.guide:
            state["z"] = z
            pyro.sample(f"y_{self.t}", dist.Normal(z[..., 0], 1.0), obs=y)


@pytest.mark.parametrize("way", ["smooth", "trajectories"])
def test_a_model_that_counts_its_steps(way) -> None:
    y = torch.tensor([0.2, -1.0, 0.5, 1.5])
    model, guide = Counting(), Counting(guide=True)
    filtered = ParticleFilter(model, guide, 200, num_filters=2)(y, initial=torch.tensor([1.0, 0.0]))
    assert filtered.values["z"].shape == (4, 400, 2)
    draws = getattr(filtered, way)(300)["z"]
    assert draws.shape == (300, 4, 2)
    assert model.t == 4
    # The posterior of a Gaussian, by conditioning all of it.
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    joint = torch.zeros(8, 8)
    for t in range(4):
        for s in range(4):
            block = sum(
                torch.linalg.matrix_power(turn.T, t - r) @ torch.linalg.matrix_power(turn.T, s - r).T
                for r in range(min(s, t) + 1)
            )
            joint[2 * t : 2 * t + 2, 2 * s : 2 * s + 2] = block
    prior = torch.cat([torch.linalg.matrix_power(turn.T, t + 1) @ torch.tensor([1.0, 0.0]) for t in range(4)])
    seen = torch.arange(0, 8, 2)
    gain = joint[:, seen] @ torch.linalg.inv(joint[seen][:, seen] + torch.eye(4))
    mean = prior + gain @ (y - prior[seen])
    assert (draws.mean(0).flatten() - mean).abs().max() < 0.35


def test_names_that_only_their_number_tells_apart() -> None:
    class Layers:
        def init(self, state):
            pass

        def step(self, state, t):
            for name in (f"z1_{t}", f"z2_{t}", "w_1", "w_2", f"v_{2 * t}", f"v_{2 * t + 1}"):
                state["last"] = pyro.sample(name, dist.Normal(0.0, 1.0))

    with pytest.warns(UserWarning, match="'v_0', 'v_1', 'v_2', 'v_3' are not in every step"):
        filtered = ParticleFilter(Layers(), LayersGuide(Layers()), 5)(range(2))
    assert set(filtered.values) == {"z1", "z2", "w_1", "w_2"}


class LayersGuide:
    def __init__(self, model):
        self.model = model

    def init(self, state):
        pass

    def step(self, state, t):
        self.model.step({}, t)


class Clock(torch.nn.Module):
    """Grows noisier with a time that is kept somewhere."""

    def __init__(self, where):
        super().__init__()
        self.where, self.past, self.attribute = where, [], torch.tensor(0.0)
        self.register_buffer("buffer", torch.tensor(0.0))

    def init(self, state):
        state["z"], state["time"] = torch.zeros(()), torch.tensor(0.0)
        self.past.clear()
        self.attribute.zero_()
        self.buffer.zero_()

    def step(self, state, y):
        if self.where == "new":
            state["time"] = state["time"] + 1
        state["time"] += self.where == "state"  # in its place
        self.attribute += 1
        self.buffer += 1
        self.past.append(y)
        time = {"list": len(self.past), "attribute": self.attribute, "buffer": self.buffer}
        z = pyro.sample("z", dist.Normal(state["z"], time.get(self.where, state["time"])))
        state["z"] = z
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


class ClockGuide:
    def init(self, state):
        pass

    def step(self, state, y):
        pyro.sample("z", dist.Normal((state["z"] + y) / 2, 1.0))


@pytest.mark.parametrize("where", ["state", "attribute", "buffer", "list"])
def test_steps_that_write_into_what_there_is(where) -> None:
    draws = []
    for kept in ("new", where):
        torch.manual_seed(0)
        clock = Clock(kept)
        filtered = ParticleFilter(clock, ClockGuide(), 20)(torch.tensor([0.5, -1.0, 2.0, 1.0, -3.0, 4.0]))
        held = clock.buffer, clock.attribute, clock.past, clock._forward_hooks
        draws.append(filtered.smooth(50)["z"])
        now = clock.buffer, clock.attribute, clock.past, clock._forward_hooks
        assert all(one is other for one, other in zip(held, now, strict=True))  # others may hold them
        assert len(clock.past) == clock.attribute == clock.buffer == 6
    assert torch.equal(*draws)


def test_objects_of_pyros_filter_run_unchanged() -> None:
    y, initial = torch.tensor([0.2, -1.0, 0.5, 1.5]), torch.tensor([1.0, 0.0])
    filtered = ParticleFilter(Counting(), Counting(guide=True), 4000)(y, initial=initial)
    smc = SMCFilter(Counting(), Counting(guide=True), num_particles=20_000, max_plate_nesting=0)
    smc.init(initial=initial)
    for value in y:
        smc.step(value)
    theirs = smc.get_empirical()["z"]
    torch.testing.assert_close(filtered.mean()[-1], theirs.mean, atol=0.06, rtol=0)
    torch.testing.assert_close(filtered.variance()[-1], theirs.variance, atol=0.08, rtol=0)


def test_discrete_states_are_smoothed() -> None:
    x = torch.tensor([0, 0, 2, 1, 1, 0])
    filtered = ParticleFilter(Hidden(), HiddenGuide(), 200, num_filters=4)(x[:, None].expand(6, 2), size=2)
    draws = filtered.smooth(1000)["c"]
    from sequences.test_filtering import EMIT, MOVE, START

    alpha, beta = [START @ MOVE * EMIT[:, x[0]]], [torch.ones(3, dtype=torch.float64)]
    for value in x[1:]:
        alpha.append(alpha[-1] @ MOVE * EMIT[:, value])
    for value in x[1:].flip(0):
        beta.append(MOVE @ (EMIT[:, value] * beta[-1]))
    truth = torch.stack(alpha) * torch.stack(beta[::-1])
    truth = truth / truth.sum(-1, keepdim=True)
    share = (draws.unsqueeze(-1) == torch.arange(3)).double().mean(0)
    assert (share - truth.unsqueeze(1)).abs().max() < 0.09


def test_a_state_that_remembers_cannot_be_smoothed() -> None:
    class Remembering(Walk):
        def step(self, state, x):
            past = state["z"]
            super().step(state, x)
            state["before"] = state["z"] * 0 if past is None else past

    filtered = ParticleFilter(Remembering(), Proposal(), 20)(simulate(4, 2))
    with pytest.raises(NotImplementedError, match=r"state\['before'\] after step 3 depends on more than"):
        filtered.smooth(5)
    assert filtered.trajectories(5)["z"].shape == (5, 4, 2)


def test_sites_that_come_and_go_are_left_out_with_a_warning() -> None:
    class Extra(Walk):
        def init(self, state):
            super().init(state)
            self.t = 0

        def step(self, state, x):
            super().step(state, x)
            self.t += 1
            if self.t == 2:
                pyro.sample("jump", dist.Normal(0.0, 1.0))

    class ExtraGuide(Proposal):
        def init(self, state):
            self.t = 0

        def step(self, state, x):
            super().step(state, x)
            self.t += 1
            if self.t == 2:
                pyro.sample("jump", dist.Normal(0.0, 1.0))

    pair = Extra(plate=False), ExtraGuide(plate=False)
    with pytest.warns(UserWarning, match=r"'jump' are not in every step"):
        assert set(ParticleFilter(*pair, 20)(simulate(4, 1)[:, 0]).values) == {"z"}


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_not_finite_is_named_and_leaves_the_others(bad) -> None:
    class Broken(Walk):
        def init(self, state):
            super().init(state)
            self.t = -1

        def step(self, state, x):
            self.t += 1
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(0.0 if state["z"] is None else A * state["z"], Q))
                state["z"] = z
                pyro.sample("x", dist.Normal(B * z, 0.7), obs=x)
                pyro.factor("wall", torch.where(torch.arange(len(x)) == 1, bad if self.t == 2 else 0.0, 0.0))

    judge = ParticleFilter(Broken(), Proposal(), 30)
    kind = "NaN" if math.isnan(bad) else "-inf"
    pyro.enable_validation(False)
    for evaluate in (judge.log_marginal, lambda x: judge(x).log_marginal):
        with pytest.warns(RuntimeWarning, match=rf"{kind} in 1 of 3 .* 1, since step 2 .*'wall'") as caught:
            found = evaluate(simulate(5, 3))
        assert len(caught) == 1
        assert found.isfinite().tolist() == [True, False, True]
    with pytest.warns(RuntimeWarning, match=kind):
        filtered = judge(simulate(5, 3))
    assert filtered.mean().isfinite().all(1).tolist() == [True, True, False, False, False]
    assert filtered.mean()[:, [0, 2]].isfinite().all()
    assert not (filtered.ess[2:, 1] > 0).any()
    for draw in (filtered.trajectories, filtered.smooth):
        with pytest.raises(ValueError, match=r"1 of 3 .* first of them \[1\].* trajectories"):
            draw(5)
    pyro.enable_validation(True)


def test_arguments() -> None:
    for options, message in (
        ({"num_particles": 1}, "nothing to resample"),
        ({"num_particles": 0}, "num_particles must be"),
        ({"num_filters": 0}, "num_filters must be"),
        ({"ess_threshold": 2}, "ess_threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            ParticleFilter(Walk(), Proposal(), **options)
    filtered = ParticleFilter(Walk(), Proposal(), 10)(simulate(3, 2))
    with pytest.raises(ValueError, match=r"name must be one of the latent sites \['z'\]"):
        filtered.mean("y")
    for draw in (filtered.smooth, filtered.trajectories):
        with pytest.raises(ValueError, match="num_samples"):
            draw(0)

"""Bad input: what is wrong, where, and what to do."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from helpers.linear_gaussian import Proposal, Walk, simulate
from pyro_iw import FIVO_ELBO

X = simulate(5, 3)


class Model:
    """A walk; what a test changes is a method."""

    def init(self, state):
        state["z"] = torch.zeros((), dtype=torch.float64)

    def step(self, state, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc(state), 1.0))
            self.store(state, z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def loc(self, state):
        return 0.9 * state["z"]

    def store(self, state, z):
        state["z"] = z


class Guide:
    def init(self, state):
        pass

    def step(self, state, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc(state, x), 1.0))

    def loc(self, state, x):
        return 0.5 * x


def loss(model=None, guide=None, *args, **options) -> float:
    return FIVO_ELBO(**{"K": 4, **options}).loss(model or Model(), guide or Guide(), *(args or (X,)))


def test_what_is_read_and_not_stored() -> None:
    class Other(Model):
        def loc(self, state):
            return state["h"]

    with pytest.raises(
        KeyError, match=r"^state\['h'\] is read at step 0 \(model\), but nothing.* There is 'z'\.$"
    ):
        loss(Other())

    class Forgetful(Model):
        def init(self, state):
            pass

        def loc(self, state):
            return 0.9 * state["z"] if "started" in state else torch.zeros((), dtype=torch.float64)

        def store(self, state, z):
            state["started"] = True

    with pytest.raises(KeyError, match=r"read at step 1 \(model\)"):
        loss(Forgetful())


def test_a_step_that_stores_nothing_is_warned_of_once() -> None:
    class Other(Model):
        def store(self, state, z):
            pass

    elbo = FIVO_ELBO(4)
    with pytest.warns(UserWarning, match=r"At step 0 the model samples 'z' and stores nothing in the state"):
        elbo.loss(Other(), Guide(), X)
    elbo.loss(Other(), Guide(), X)


def test_memory_outside_of_the_state() -> None:
    class Hidden(Model):
        def init(self, state):
            self.z = torch.zeros((), dtype=torch.float64)

        def loc(self, state):
            return 0.9 * self.z

        def store(self, state, z):
            self.z = z
            state["unread"] = z

    with pytest.raises(
        ValueError, match=r"density of site 'z' \(model\) at step 1 does not follow its particle.*in self"
    ):
        loss(Hidden())

    class Box:
        pass

    class Boxed(Model):
        def loc(self, state):
            return (
                0.9 * state["z"].value
                if isinstance(state["z"], Box)
                else torch.zeros((), dtype=torch.float64)
            )

        def store(self, state, z):
            state["z"], state["unread"] = Box(), z
            state["z"].value = z

    with pytest.raises(ValueError, match="does not follow its particle"):
        loss(Boxed())


def test_a_state_over_particles_without_their_dim() -> None:
    class Summed(Model):
        def store(self, state, z):
            state["z"] = z
            state["total"] = z.sum()

    with pytest.raises(
        ValueError, match=r"state\['total'\] depends on the particles and has no particle dim.*step 0"
    ):
        loss(Summed())


def test_a_state_that_mixes_particles() -> None:
    class Centred(Model):
        def store(self, state, z):
            state["z"] = z - z.mean(0) if z.dim() > 1 else z - z

    with pytest.raises(ValueError, match=r"state\['z'\] depends on other particles"):
        loss(Centred())


def test_a_density_over_particles() -> None:
    class Mixing(Model):
        def loc(self, state):
            z = state["z"]
            return 0.9 * z if z.dim() < 2 else 0.9 * z + z.mean(0)

    with pytest.raises(
        ValueError, match=r"density of site 'z' \(model\) at step 1 depends on other particles"
    ):
        loss(Mixing())


def test_batch_normalisation_over_particles() -> None:
    class Normalised(Model):
        def __init__(self):
            self.norm = nn.BatchNorm1d(1).double()

        def loc(self, state):
            z = state["z"]
            return self.norm(z.reshape(-1, 1)).reshape(z.shape) if z.dim() else z

    model = Normalised()
    before = copy.deepcopy(model.norm.state_dict())
    with pytest.raises(ValueError, match="batch normalisation in train mode"):
        loss(model)
    assert all(torch.equal(value, before[name]) for name, value in model.norm.state_dict().items())
    model.norm.eval()
    loss(model)


def test_dropout_is_no_memory() -> None:
    class Dropping(Model):
        def loc(self, state):
            return nn.functional.dropout(state["z"], 0.5)

    loss(Dropping())


def test_a_value_without_the_dims_of_its_plates() -> None:
    class Averaged(Model):
        def store(self, state, z):
            state["z"] = z
            state["mean"] = z.mean(-1)

    with pytest.raises(
        ValueError, match=r"At step \d: state\['mean'\] varies .* shape \(4,\), .* with \[3\] cells"
    ):
        loss(Averaged(), ess_threshold=1.0)


def test_one_particle_has_nothing_to_resample() -> None:
    with pytest.raises(ValueError, match=r"K=1 leaves nothing to resample.*ess_threshold=0"):
        FIVO_ELBO(1)
    FIVO_ELBO(1, ess_threshold=0).loss(Model(), Guide(), X)


def test_a_latent_that_the_guide_leaves_out_in_one_step() -> None:
    class Missing(Guide):
        def init(self, state):
            self.t = -1

        def step(self, state, x):
            self.t += 1
            if self.t != 3:
                super().step(state, x)

    with pytest.raises(
        ValueError, match=r"At step 3: Latent site 'z' of the model is missing from the guide"
    ):
        loss(None, Missing())


def test_no_step() -> None:
    with pytest.raises(ValueError, match=r"empty: there is no step to take \(T = 0\)"):
        loss(None, None, X[:0])
    with pytest.raises(ValueError, match=r"empty"):
        loss(None, None, [])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "There is no sequence to filter"),
        ((X, 3), "Positional argument 1 is of type int"),
        ((torch.tensor(1.0),), "Positional argument 0 is a tensor without dims"),
        ((X, X[:2]), r"differ in length: \[5, 2\]"),
    ],
)
def test_arguments_that_are_no_sequences(args, message) -> None:
    with pytest.raises(ValueError, match=message):
        FIVO_ELBO(4).loss(Model(), Guide(), *args)


def test_other_kinds_of_sequences() -> None:
    a, b = FIVO_ELBO(4), FIVO_ELBO(4)
    seen = []
    for elbo, x in ((a, X), (b, list(X)), (FIVO_ELBO(4), X.numpy())):
        pair = Model(), Guide()
        if not isinstance(x, Tensor | list):
            pair[0].step, pair[1].step = (
                lambda state, row, step=part.step: step(state, torch.as_tensor(row)) for part in pair
            )
        pyro.set_rng_seed(0)
        seen.append(elbo.loss(*pair, x))
    assert len(set(seen)) == 1


def test_a_guide_that_writes() -> None:
    class Writing(Guide):
        def loc(self, state, x):
            state["seen"] = x
            return x

    with pytest.raises(RuntimeError, match=r"The guide writes to the state at step 0 \(guide\)"):
        loss(None, Writing())


@pytest.mark.parametrize(
    "method", ["update", "setdefault", "pop", "clear", "popitem", "__delitem__", "__ior__"]
)
def test_all_ways_to_write(method) -> None:
    arguments = {"update": ({"a": 1},), "setdefault": ("a", 1), "pop": ("z",), "__delitem__": ("z",)}
    arguments |= {"__ior__": ({"a": 1},)}

    class Writing(Guide):
        def loc(self, state, x):
            getattr(state, method)(*arguments.get(method, ()))
            return x

    with pytest.raises(RuntimeError, match="can only read"):
        loss(None, Writing())


def test_objects_without_the_methods() -> None:
    with pytest.raises(ValueError, match=r"The model \(function\) has no method init\(state, ...\)"):
        loss(lambda x: None)
    with pytest.raises(ValueError, match=r"The guide \(object\) has no method init"):
        loss(None, object())


def test_a_computation_that_does_not_broadcast() -> None:
    class Stacked(Guide):
        def loc(self, state, x):
            return (
                torch.cat([state["z"].expand(x.shape), x])
                if state["z"].dim() < 2
                else torch.cat([state["z"], x])
            )

        def step(self, state, x):
            with pyro.plate("data", len(x)):
                loc = self.loc(state, x)
                pyro.sample("z", dist.Normal(loc[..., : len(x)], 1.0))

    with pytest.raises(
        ValueError, match=r"The guide runs with one particle but not with 2 .* step 1, before its first"
    ):
        loss(None, Stacked())


def test_enumeration() -> None:
    class Summed(Model):
        def step(self, state, x):
            super().step(state, x)
            with pyro.plate("more", len(x)):
                pyro.sample("kind", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    with pytest.raises(NotImplementedError, match=r"At step 0: Site 'kind' of the model is to be enumerated"):
        loss(Summed())


def test_a_subsampled_plate_with_a_global_latent() -> None:
    class Global(Model):
        def init(self, state):
            state["g"] = pyro.sample("g", dist.Normal(0.0, 1.0))
            state["z"] = torch.zeros((), dtype=torch.float64)

        def step(self, state, x):
            with pyro.plate("data", 9, subsample=torch.arange(3)):
                z = pyro.sample("z", dist.Normal(0.9 * state["z"] + state["g"], 1.0))
                state["z"] = z
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class GlobalGuide(Guide):
        def init(self, state):
            pyro.sample("g", dist.Normal(0.0, 1.0))

        def step(self, state, x):
            with pyro.plate("data", 9, subsample=torch.arange(3)):
                pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match=r"Plate 'data' is subsampled .* 'g of init' \(guide\)"):
        loss(Global(), GlobalGuide())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"K": 0}, "K must be an integer >= 1"),
        ({"K": 2.5}, "K must be an integer >= 1"),
        ({"ess_threshold": 1.5}, r"ess_threshold must be a number in \[0, 1\], got 1.5"),
        ({"ess_threshold": float("nan")}, "ess_threshold"),
        ({"ess_threshold": True}, "ess_threshold"),
        ({"resampling": "residual"}, r"resampling must be one of \['multinomial', 'systematic'\]"),
        ({"resampling_gradient": True}, "Pass ess_threshold=1"),
        ({"resampling_gradient": True, "ess_threshold": 1}, "Pass resampling='multinomial'"),
        (
            {
                "resampling_gradient": True,
                "ess_threshold": 1,
                "resampling": "multinomial",
                "estimator": "dreg",
            },
            "Pass estimator='reparam'",
        ),
        ({"estimator": "dreg"}, "estimator='dreg' needs .* Pass ess_threshold=1"),
        ({"estimator": "dreg", "ess_threshold": 0}, "estimator='dreg' needs"),
        ({"estimator": "vimco"}, r"estimator must be one of \['auto', 'reparam', 'dreg', 'score'\]"),
        ({"kl_weight": -1}, "kl_weight must be a finite number >= 0"),
        ({"plates": [3]}, "plates must be a name"),
    ],
)
def test_arguments_out_of_range(options, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        FIVO_ELBO(**{"K": 4, **options})


def test_a_plate_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="plates names 'sequences', but model and guide have no such plate"):
        loss(plates="sequences")


def test_names_that_change_with_time_and_longer_sequences() -> None:
    class Named(Model):
        def init(self, state):
            self.t = 0
            state["z_0"] = torch.zeros((), dtype=torch.float64)

        def step(self, state, x):
            self.t += 1
            with pyro.plate("data", len(x)):
                z = pyro.sample(f"z_{self.t}", dist.Normal(0.9 * state[f"z_{self.t - 1}"], 1.0))
                state[f"z_{self.t}"] = z
                pyro.sample(f"x_{self.t}", dist.Normal(z, 1.0), obs=x)

    class NamedGuide(Guide):
        def init(self, state):
            self.t = 0

        def step(self, state, x):
            self.t += 1
            with pyro.plate("data", len(x)):
                pyro.sample(f"z_{self.t}", dist.Normal(0.5 * x, 1.0))

    elbo, same = FIVO_ELBO(4), FIVO_ELBO(4)
    pair, other = (Named(), NamedGuide()), (Model(), Guide())
    for size in (2, 5, 3):
        losses = []
        for one, who in ((elbo, pair), (same, other)):
            pyro.set_rng_seed(size)
            losses.append(one.loss(*who, X[:size]))
        assert losses[0] == losses[1]


def test_more_plates_later_on() -> None:
    class Growing(Model):
        def step(self, state, x):
            super().step(state, x)
            if x.shape[0] == 3:
                with pyro.plate("more", 2, dim=-2):
                    pyro.sample(
                        "y", dist.Normal(state["z"].sum(-1, keepdim=True), 1.0), obs=x.new_zeros(2, 1)
                    )

    elbo, fresh, pair = FIVO_ELBO(4), FIVO_ELBO(4), (Growing(), Guide())
    elbo.loss(*pair, X[:, :2])
    losses = []
    for one in (elbo, fresh):
        pyro.set_rng_seed(1)
        with pytest.warns(
            UserWarning, match="'y of step 0' \\(model\\).* do not, so there is one joint importance weight"
        ):
            losses.append(one.loss(*pair, X))
    assert losses[0] == losses[1]


def test_values_that_a_distribution_does_not_allow() -> None:
    x = X.clone()
    x[3, 1] = float("nan")
    with pytest.raises(
        ValueError, match=r"^At step 3, in the guide before its first sample site: Expected parameter loc"
    ):
        loss(None, None, x)


def test_copies_and_pickles() -> None:
    elbo = FIVO_ELBO(4, 0.25)
    elbo.loss(Walk(), Proposal(), X)
    for other in (copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo))):
        assert repr(other) == "FIVO_ELBO(K=4, ess_threshold=0.25)"
        other.loss(Walk(), Proposal(), X)


def test_the_first_run_leaves_the_random_state_alone() -> None:
    elbo, losses = FIVO_ELBO(4), []
    pair = Walk(), Proposal()
    for _ in range(2):
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(*pair, X))
    assert losses[0] == losses[1]


def test_cells_that_know_of_one_another() -> None:
    class Averaged(Model):
        def store(self, state, z):
            state["z"] = z.mean(-1, keepdim=True)

    with pytest.raises(ValueError, match=r"'z' \(model\) at step 1 depends on latents of other.*plates=\(\)"):
        loss(Averaged())
    assert loss(Averaged(), plates=()) > 0


def test_what_is_recorded_outside_of_the_plates_is_no_site() -> None:
    class Recording(Model):
        def step(self, state, x):
            super().step(state, x)
            pyro.deterministic("recorded", state["z"].sum())

    torch.manual_seed(0)
    plain = loss(Model())
    torch.manual_seed(0)
    assert loss(Recording()) == plain


def test_arguments_that_make_a_state_vary_with_the_particles() -> None:
    class Mixed(Model):
        def step(self, state, x, mixes):
            super().step(state, x)
            state["z"] = state["z"] if mixes else torch.zeros(1, 3, dtype=torch.float64)

    class MixedGuide(Guide):
        def step(self, state, x, mixes):
            super().step(state, x)

    def run(elbo, mixes):
        torch.manual_seed(0)
        return elbo.loss(*pair, X, [mixes] * 5)

    pair = Mixed(), MixedGuide()
    fresh = {mixes: run(FIVO_ELBO(K=4, ess_threshold=1), mixes) for mixes in (True, False)}
    for order in ((True, False), (False, True)):
        elbo = FIVO_ELBO(K=4, ess_threshold=1)
        for mixes in order:
            assert run(elbo, mixes) == fresh[mixes]


def test_a_list_that_init_is_given_and_steps_extend() -> None:
    class Listing(Model):
        def init(self, state, past):
            super().init(state)
            state["past"] = past

        def loc(self, state):
            return sum(state["past"])

        def store(self, state, z):
            state["past"].append(z)

    class ListingGuide(Guide):
        def init(self, state, past):
            pass

    past, elbo = [torch.ones((), dtype=torch.float64)], FIVO_ELBO(K=4)
    assert math.isfinite(elbo.loss(Listing(), ListingGuide(), X, past=past))
    assert len(past) == 1

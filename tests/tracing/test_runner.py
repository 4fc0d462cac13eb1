"""Running particles: their dim, the probe before it, and what is said when a model breaks under it."""

import gc
import math
import random
import weakref
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from torch import nn

from pyro_iw import IWAE_ELBO, MIWAE_ELBO


def data_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def data_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))


class TestParticleDim:
    def test_it_is_left_of_every_plate(self):
        shapes = {}

        def model():
            with pyro.plate("a", 2, dim=-3), pyro.plate("b", 4, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                shapes[len(z.shape)] = z.shape

        IWAE_ELBO(K=5).loss(model, model)
        assert shapes == {4: (2, 1, 4, 3), 5: (5, 2, 1, 4, 3)}  # one particle, all of them

    def test_a_given_nesting_is_used(self):
        shapes = {}

        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            shapes[len(z.shape)] = z.shape

        IWAE_ELBO(K=5, max_plate_nesting=2).loss(model, model)
        assert shapes == {0: (), 3: (5, 1, 1)}

    def test_one_instance_serves_pairs_of_any_nesting(self):
        def deep():
            with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3, dim=-1):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        def flat():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        loss = IWAE_ELBO(K=5)
        for model, shape in ((flat, (5,)), (deep, (5, 2, 3)), (flat, (5,))):
            assert loss.particles(model, model).log_weights.shape == shape

    @pytest.mark.parametrize("dims", [(None, None), (-1, -2)])
    def test_a_pair_whose_nesting_grows(self, dims):
        def model(depth):
            with pyro.plate("a", 2, dim=dims[0]):
                if depth == 2:
                    with pyro.plate("b", 3, dim=dims[1]):
                        pyro.sample("z", dist.Normal(0.0, 1.0))
                else:
                    pyro.sample("z", dist.Normal(0.0, 1.0))

        loss = IWAE_ELBO(K=5)
        assert loss.particles(model, model, 1).log_weights.shape == (5, 2)
        assert loss.particles(model, model, 2).log_weights.shape == (5, 3, 2)
        assert loss.particles(model, model, 1).log_weights.shape == (5, 2)

    def test_structure_may_vary_from_particle_to_particle_one_by_one(self):
        calls = []

        def model():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        def guide():
            calls.append("guide")
            if len(calls) % 2:
                auxiliary = {"is_auxiliary": True}
                pyro.sample("extra", dist.Normal(0.0, 1e-3), infer=auxiliary)
            pyro.sample("z", dist.Normal(0.0, 1.0))

        with pytest.warns(UserWarning, match="'extra'.*mixture"):
            particles = IWAE_ELBO(K=4, vectorize_particles=False).particles(model, guide)
        extra = [log_q > 3 for log_q in particles.log_q - particles.log_p]
        assert extra == [False, True, False, True]  # after the probe


class TestProbe:
    def test_it_runs_once_for_a_pair(self):
        calls = []

        def model(x):
            calls.append("model")
            data_model(x)

        loss = IWAE_ELBO(K=3)
        for _ in range(3):
            loss.loss(model, data_guide, torch.zeros(2))
        assert len(calls) == 1 + 3 + 1  # and one particle by itself

    def test_bound_methods_are_known_by_their_owner(self):
        class Pair:
            calls = 0

            def model(self, x):
                self.calls += 1
                data_model(x)

            def guide(self, x):
                data_guide(x)

        pair, loss = Pair(), IWAE_ELBO(K=3)
        for _ in range(3):
            loss.loss(pair.model, pair.guide, torch.zeros(2))
        assert pair.calls == 1 + 3 + 1

    def test_it_sees_what_the_handlers_around_the_loss_do(self):
        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

        def guide():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        with poutine.condition(data={"x": torch.tensor(1.0)}):
            assert math.isfinite(IWAE_ELBO(K=3).loss(model, guide))

    def test_it_leaves_the_random_state_alone(self):
        x, loss = torch.zeros(2), IWAE_ELBO(K=3)
        values = []
        for _ in range(2):
            pyro.set_rng_seed(0)
            values.append(loss.loss(data_model, data_guide, x))
        assert values[0] == values[1]

    def test_nor_numpys_and_pythons(self):
        def model(x):
            random.random()
            np.random.rand()  # noqa: NPY002 - as models do
            data_model(x)

        random.seed(0), np.random.seed(0)  # noqa: NPY002
        random.random(), np.random.rand()  # noqa: NPY002
        expected = random.random(), np.random.rand()  # noqa: NPY002
        random.seed(0), np.random.seed(0)  # noqa: NPY002
        IWAE_ELBO(K=3).loss(model, data_guide, torch.zeros(2))
        assert (random.random(), np.random.rand()) == expected  # noqa: NPY002

    def test_parameters_made_at_random_do_not_repeat_the_first_particles_noise(self):
        values = {}

        def guide():
            values["init"] = pyro.param("init", lambda: torch.randn(3)).detach().clone()
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            values["z"] = z if z.dim() == 1 else z[0]

        def model():
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

        IWAE_ELBO(K=2).loss(model, guide)
        assert not torch.allclose(values["init"], values["z"])

    def test_it_keeps_no_pair_alive(self):
        class Guide:
            def __call__(self, x):
                data_guide(x)

        guide, loss = Guide(), IWAE_ELBO(K=3)
        loss.loss(data_model, guide, torch.zeros(2))
        reference = weakref.ref(guide)
        del guide
        gc.collect()
        assert reference() is None

    @pytest.mark.parametrize("max_plate_nesting", [1, float("inf")])
    @pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal])
    def test_lazy_guides_are_set_up_without_the_particle_dim(self, auto, max_plate_nesting):
        def model():
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            with pyro.plate("data", 6):
                pyro.sample("x", dist.Normal(0.0, scale), obs=torch.ones(6))

        loss = MIWAE_ELBO(M=2, K=4, max_plate_nesting=max_plate_nesting)
        guide = auto(model)
        loss.loss_and_grads(model, guide)
        assert all(parameter.numel() == 1 for parameter in guide.parameters())
        second = auto(model)  # the same loss, another guide
        loss.loss_and_grads(model, second)
        assert all(parameter.numel() == 1 for parameter in second.parameters())


class TestBreaking:
    class Reshaping(nn.Module):
        """Right with one particle alone: it takes z's first dim for the batch."""

        def __init__(self, how):
            super().__init__()
            self.how = how
            self.linear = nn.Linear(2, 3)

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                if self.how == "merge":
                    out = self.linear(z.reshape(-1, 2))
                elif self.how == "flatten":
                    out = self.linear(z.flatten(1))
                pyro.sample("x", dist.Normal(out, 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    @pytest.mark.parametrize("how", ["merge", "flatten"])
    def test_the_site_is_named_and_the_way_out_given(self, how):
        pair, x = self.Reshaping(how), torch.zeros(5, 3)
        message = (
            "The model runs with one particle but not with 4 in one pass: it failed after sample site 'z' "
            r"with (ValueError|RuntimeError)(.|\n)*vectorize_particles=False"
        )
        with pytest.raises(ValueError, match=message):
            IWAE_ELBO(K=4).loss(pair.model, pair.guide, x)
        IWAE_ELBO(K=4, vectorize_particles=False).loss_and_grads(pair.model, pair.guide, x)

    def test_a_guide_that_breaks(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                z.view(len(x))

        with pytest.raises(ValueError, match="The guide runs with one particle but not with 4"):
            IWAE_ELBO(K=4).loss(data_model, guide, torch.zeros(5))

    def test_a_messenger_guide_that_breaks_is_placed(self):
        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            z.reshape(())
            pyro.sample("y", dist.Normal(z, 1.0))

        with pytest.raises(ValueError, match="failed after sample site 'z'"):
            IWAE_ELBO(K=4).loss(model, AutoNormalMessenger(model))

    def test_an_error_of_its_own_kind_keeps_its_type(self):
        class Mine(RuntimeError):
            pass

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if z.dim() > 1:
                raise Mine("for many particles only")

        with pytest.raises(Mine, match="for many particles only"):
            IWAE_ELBO(K=4).loss(model, data_guide, torch.zeros(5))

    def test_what_this_package_refuses_is_said_as_it_is(self):
        with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=r"^Particle weights that"):
            IWAE_ELBO(K=4, estimator="dreg").loss_and_grads(data_model, data_guide, torch.zeros(5))

    def test_values_that_a_distribution_does_not_allow(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                scale = 1.0 if z.dim() == 1 else -z.abs()
                pyro.sample("x", dist.Normal(z, scale), obs=x)

        with pytest.raises(ValueError, match=r"^Expected parameter scale"):
            IWAE_ELBO(K=4).loss(model, data_guide, torch.zeros(5))

    @pytest.mark.parametrize("keywords", [{}, {"vectorize_particles": False}, {"chunk_size": 2}])
    def test_a_flow_without_an_inverse(self, keywords):
        class Doubling(torch.distributions.transforms.Transform):
            domain = codomain = dist.constraints.real
            bijective = True

            def _call(self, x):
                return 2 * x

            def log_abs_det_jacobian(self, x, y):
                return torch.full_like(x, math.log(2.0))

        def guide(x):
            with pyro.plate("data", len(x)):
                base = dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0)
                flow = dist.TransformedDistribution(base, [Doubling(cache_size=1)])
                pyro.sample("z", flow.to_event(1))

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

        message = (
            r"site 'z' \(guide\) cannot be evaluated at this value: .*NotImplementedError.*without an inverse"
        )
        with pytest.raises(ValueError, match=message):
            IWAE_ELBO(K=4, estimator="dreg", **keywords).loss_and_grads(model, guide, torch.zeros(5))
        loss = IWAE_ELBO(K=4, estimator="reparam", **keywords)  # as the message advises
        assert math.isfinite(loss.loss_and_grads(model, guide, torch.zeros(5)))

    def test_a_failing_step_leaves_pyro_clean_for_the_next(self):
        loss, x = IWAE_ELBO(K=4), torch.zeros(5)

        def broken(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z.reshape(len(x)), 1.0), obs=x)

        for _ in range(2):
            with pytest.raises(ValueError, match="vectorize_particles=False"):
                loss.loss_and_grads(broken, data_guide, x)
            assert math.isfinite(loss.loss_and_grads(data_model, data_guide, x))
        assert not pyro.poutine.runtime._PYRO_STACK

    def test_a_model_that_is_simply_wrong_raises_its_own_error(self):
        def model(x):
            data_model(x)
            raise RuntimeError("my own mistake")

        with pytest.raises(RuntimeError, match="my own mistake"):
            IWAE_ELBO(K=4).loss(model, data_guide, torch.zeros(5))

    def test_a_density_with_its_particles_on_the_wrong_dim(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
                pyro.factor("wrong", z if z.dim() == 1 else torch.zeros(2, *z.shape))

        with pytest.raises(ValueError, match=r"site 'wrong' \(model\) has shape"):
            MIWAE_ELBO(M=4, K=1).loss(model, data_guide, torch.zeros(5))


class TestBatchNorm:
    class Net(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.linear = nn.Linear(2, 3)
            self.norm = norm

        def model(self, x):
            pyro.module("linear", self.linear)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                h = self.linear(z)
                h = self.norm(h.reshape(-1, 3)).reshape(h.shape)
                pyro.sample("x", dist.Normal(h, 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                loc = pyro.param("loc", torch.zeros(2))
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    x = torch.zeros(8, 3)

    @pytest.mark.parametrize("max_plate_nesting", [1, float("inf")])
    def test_in_train_mode_over_particles_it_is_warned_of_once(self, max_plate_nesting):
        net, loss = self.Net(nn.BatchNorm1d(3)), IWAE_ELBO(K=4, max_plate_nesting=max_plate_nesting)
        with pytest.warns(UserWarning, match="BatchNorm1d 'norm' is in train mode and normalises over"):
            loss.loss_and_grads(net.model, net.guide, self.x)
        loss.loss_and_grads(net.model, net.guide, self.x)  # once: warnings are errors
        IWAE_ELBO(K=4, vectorize_particles=False).loss_and_grads(net.model, net.guide, self.x)

    def test_also_when_it_was_in_eval_mode_before(self):
        net, loss = self.Net(nn.BatchNorm1d(3)), IWAE_ELBO(K=4)
        net.eval()
        loss.loss(net.model, net.guide, self.x)
        net.train()
        with pytest.warns(UserWarning, match="BatchNorm1d 'norm'"):
            loss.loss_and_grads(net.model, net.guide, self.x)

    def test_the_probe_does_not_move_its_statistics(self):
        updates = []
        for probed in (True, False):
            pyro.set_rng_seed(0)
            net = self.Net(nn.BatchNorm1d(3))
            loss = MIWAE_ELBO(M=1, K=1) if not probed else MIWAE_ELBO(M=2, K=2)
            if probed:
                with pytest.warns(UserWarning, match="BatchNorm1d"):
                    loss.loss(net.model, net.guide, self.x)
            else:
                loss.loss(net.model, net.guide, self.x)
            updates.append(int(net.norm.num_batches_tracked))
        assert updates == [1, 1]

    def test_a_lazy_one_is_made_by_the_probe_but_not_moved(self):
        net, loss = self.Net(nn.LazyBatchNorm1d()), IWAE_ELBO(K=4)
        with pytest.warns(UserWarning, match="BatchNorm1d 'norm'"):
            loss.loss_and_grads(net.model, net.guide, self.x)
        assert int(net.norm.num_batches_tracked) == 1

    def test_batches_of_different_sizes_are_no_particles(self):
        norm = nn.BatchNorm1d(3)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(norm(x)[:, :2], 1.0).to_event(1))

        net, loss = self.Net(nn.Identity()), IWAE_ELBO(K=4)
        loss.loss(net.model, guide, torch.randn(4, 3))
        loss.loss_and_grads(net.model, guide, torch.randn(16, 3))

    def test_a_large_batch_first_does_not_hide_the_particles(self):
        net, loss = self.Net(nn.BatchNorm1d(3)), IWAE_ELBO(K=2)
        net.eval()
        loss.loss(net.model, net.guide, torch.zeros(64, 3))
        net.train()
        with pytest.warns(UserWarning, match="BatchNorm1d 'norm'"):
            loss.loss_and_grads(net.model, net.guide, self.x)

    @pytest.mark.parametrize("norm", [nn.LayerNorm(3), nn.BatchNorm1d(3).eval()])
    def test_other_normalisation_is_fine(self, norm):
        net = self.Net(norm)
        IWAE_ELBO(K=4).loss_and_grads(net.model, net.guide, self.x)

    def test_one_that_sees_no_particles_is_fine(self):
        norm = nn.BatchNorm1d(3)

        def guide(x):
            with pyro.plate("data", len(x)):
                loc = norm(x)[:, :2]
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

        net = self.Net(nn.Identity())
        IWAE_ELBO(K=4).loss_and_grads(net.model, guide, torch.randn(8, 3))


class TestMinibatchesOfBothSides:
    """A plate that the model is given by subsample= takes the guide's indices in a replay, not its own."""

    SIZE, GIVEN = 6, torch.tensor([4, 0])

    def model(self, indices):
        with pyro.plate("data", self.SIZE, subsample=indices):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.arange(6.0)[indices])

    def guide_of(self, indices):
        def guide(_):
            with pyro.plate("data", self.SIZE, subsample=indices) as drawn:
                pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(6))[drawn], 1.0))

        return guide

    @pytest.mark.parametrize("loss", [IWAE_ELBO(K=3), IWAE_ELBO(K=3, vectorize_particles=False)], ids=repr)
    def test_another_minibatch_is_refused(self, loss):
        with pytest.raises(
            ValueError, match=r"Plate 'data' has another minibatch in the guide .*\[1, 2\] aga"
        ):
            loss.loss(self.model, self.guide_of(torch.tensor([1, 2])), self.GIVEN)

    def test_so_is_that_of_an_autoguide(self):
        guide = AutoNormal(self.model)
        pyro.set_rng_seed(0)
        with pytest.raises(ValueError, match="create_plates"):
            IWAE_ELBO(K=3).loss(self.model, guide, self.GIVEN)
        # The way out that the message gives.
        plates = partial(pyro.plate, "data", self.SIZE, dim=-1)
        guide = AutoNormal(self.model, create_plates=lambda indices: plates(subsample=indices))
        IWAE_ELBO(K=3).loss_and_grads(self.model, guide, self.GIVEN)
        rows = (
            guide.locs.z_unconstrained.grad if hasattr(guide.locs, "z_unconstrained") else guide.locs.z.grad
        )
        assert rows.nonzero().flatten().tolist() == sorted(self.GIVEN.tolist())

    def test_the_same_minibatch_passes(self):
        IWAE_ELBO(K=3).loss(self.model, self.guide_of(self.GIVEN.clone()), self.GIVEN)

"""Cells, scales and refusals: which plates are kept, and what raises by name."""

import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

from pyro_iw import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO

normal = dist.Normal


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(0.0, 1.0))
        pyro.sample("x", normal(z, 1.0), obs=x)


def local_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(pyro.param("loc", torch.tensor(0.1)), 1.0))


def global_model(x, size=None):
    b = pyro.sample("b", normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample_size=len(x)):
        z = pyro.sample("z", normal(b, 1.0))
        pyro.sample("x", normal(z, 1.0), obs=x)


def global_guide(x, size=None):
    pyro.sample("b", normal(pyro.param("loc", torch.tensor(0.1)), 1.0))
    with pyro.plate("data", size or len(x), subsample_size=len(x)):
        pyro.sample("z", normal(0.0, 1.0))


def plates_of(loss, model, guide, *args):
    return [frame.name for frame in loss.particles(model, guide, *args).plates]


@pytest.fixture
def x():
    return torch.randn(5)


class TestKeptPlates:
    @pytest.mark.parametrize("vectorize", [True, False])
    def test_the_plate_of_all_sites_is_kept(self, x, vectorize):
        loss = IWAE_ELBO(K=4, vectorize_particles=vectorize)
        particles = loss.particles(local_model, local_guide, x)
        assert particles.log_p.shape == particles.log_q.shape == (4, 5)

    @pytest.mark.parametrize("vectorize", [True, False])
    def test_a_global_latent_makes_one_joint_weight_without_a_warning(self, x, vectorize):
        loss = IWAE_ELBO(K=4, vectorize_particles=vectorize)
        assert loss.particles(global_model, global_guide, x).log_weights.shape == (4,)

    def test_cells_come_in_the_order_of_dims(self):
        def model():
            with pyro.plate("a", 2, dim=-3), pyro.plate("b", 3, dim=-1), pyro.plate("c", 4, dim=-2):
                pyro.sample("z", normal(0.0, 1.0))

        particles = IWAE_ELBO(K=5).particles(model, model)
        assert particles.log_weights.shape == (5, 2, 4, 3)
        assert [frame.name for frame in particles.plates] == ["a", "c", "b"]

    def test_order_of_entering_plates_does_not_matter(self):
        x = torch.randn(2, 3)

        def model(flip):
            plates = [pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)]
            first, second = reversed(plates) if flip else plates
            with first, second:
                z = pyro.sample("z", normal(0.0, 1.0))
                pyro.sample("x", normal(z, 1.0), obs=x)

        def guide(flip):
            model_plates = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
            with model_plates[0], model_plates[1]:
                pyro.sample("z", normal(0.0, 1.0))

        values = []
        for flip in (False, True):
            pyro.set_rng_seed(0)
            values.append(IWAE_ELBO(K=3).loss(model, guide, flip))
        assert values[0] == values[1]

    def test_deterministic_sites_outside_do_not_matter(self, x):
        def model(x):
            pyro.deterministic("size", torch.tensor(float(len(x))))
            local_model(x)

        assert plates_of(IWAE_ELBO(K=4), model, local_guide, x) == ["data"]

    def test_asking_for_the_joint_weight(self, x):
        pyro.set_rng_seed(0)
        cells = IWAE_ELBO(K=4).particles(local_model, local_guide, x).log_weights
        pyro.set_rng_seed(0)
        joint = IWAE_ELBO(K=4, plates=()).particles(local_model, local_guide, x).log_weights
        torch.testing.assert_close(joint, cells.sum(-1))

    def test_keeping_one_of_two_plates(self):
        def model():
            with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
                pyro.sample("z", normal(0.0, 1.0))

        def guide():
            with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
                pyro.sample("z", normal(1.0, 1.0))

        pyro.set_rng_seed(0)
        cells = IWAE_ELBO(K=4).particles(model, guide).log_weights
        for plates, dim in (("rows", -1), (["columns"], -2)):
            pyro.set_rng_seed(0)
            kept = IWAE_ELBO(K=4, plates=plates).particles(model, guide).log_weights
            torch.testing.assert_close(kept, cells.sum(dim))

    @pytest.mark.parametrize("plates", [["data", "data"], (name for name in ["data"]), {"data"}])
    def test_names_may_repeat_and_come_from_any_iterable(self, x, plates):
        loss = IWAE_ELBO(K=4, plates=plates)
        for _ in range(2):
            assert plates_of(loss, local_model, local_guide, x) == ["data"]

    def test_names_must_be_strings(self):
        with pytest.raises(ValueError, match="plates must be a name or names"):
            IWAE_ELBO(K=4, plates=[1])

    @pytest.mark.parametrize("validate", [True, False])
    @pytest.mark.parametrize("K", [1, 4])
    def test_a_plate_of_different_sizes_is_refused(self, x, K, validate):
        """Full size in the model alone: which N / B is meant is in doubt, and half of it would be lost."""

        def model(x):
            with pyro.plate("data", 100, subsample=torch.arange(5)):
                z = pyro.sample("z", normal(0.0, 1.0))
                pyro.sample("x", normal(z, 1.0), obs=x)

        message = r"Plate 'data' runs on 5 of 100 at site 'z' \(model\), but on 5 of 5 at site 'z' \(guide\)"
        with pyro.validation_enabled(validate), pytest.raises(ValueError, match=message):
            IWAE_ELBO(K=K).loss(model, local_guide, x)

    def test_an_unknown_plate(self, x):
        with pytest.raises(ValueError, match=r"'batch'.*they have \['data'\]"):
            IWAE_ELBO(K=4, plates="batch").loss(local_model, local_guide, x)

    def test_sites_outside_a_named_plate(self, x):
        with pytest.raises(ValueError, match=r"'data' cannot be kept.*'b' \(guide\), 'b' \(model\)"):
            IWAE_ELBO(K=4, plates=["data"]).loss(global_model, global_guide, x)

    def test_a_sequential_plate_cannot_be_kept(self):
        def model():
            for i in pyro.plate("loop", 2):
                pyro.sample(f"z_{i}", normal(0.0, 1.0))

        assert plates_of(IWAE_ELBO(K=4), model, model) == []
        with pytest.raises(ValueError, match="'loop' is a Python loop"):
            IWAE_ELBO(K=4, plates="loop").loss(model, model)

    @pytest.mark.parametrize(
        "make_outside",
        [
            lambda: pyro.factor("penalty", torch.tensor(-1.0)),
            lambda: pyro.sample("penalty", normal(0.0, 1.0), obs=torch.tensor(1.0)),
        ],
    )
    def test_an_observed_site_outside_drops_the_plate_with_one_warning(self, x, make_outside):
        def model(x):
            make_outside()
            local_model(x)

        loss = IWAE_ELBO(K=4)
        with pytest.warns(UserWarning, match=r"plate 'data', but site\(s\) 'penalty' \(model\).*one joint"):
            assert loss.particles(model, local_guide, x).log_weights.shape == (4,)
        loss.loss(model, local_guide, x)  # not again: warnings are errors
        IWAE_ELBO(K=4, plates=()).loss(model, local_guide, x)
        MIWAE_ELBO(M=4, K=1).loss(model, local_guide, x)

    def test_a_joint_latent_of_the_guide_drops_it_with_a_warning_too(self, x):
        guide = AutoDiagonalNormal(local_model)
        joint = r"'_AutoDiagonalNormal_latent' \(guide\).*AutoNormal rather than"
        with pytest.warns(UserWarning, match=joint):
            assert plates_of(IWAE_ELBO(K=4), local_model, guide, x) == []
        assert plates_of(IWAE_ELBO(K=4, plates=()), local_model, guide, x) == []
        assert plates_of(IWAE_ELBO(K=4), local_model, AutoNormal(local_model), x) == ["data"]

    def test_warnings_point_at_the_callers_line(self, x):
        def model(x):
            pyro.factor("penalty", torch.tensor(-1.0))
            local_model(x)

        svi = pyro.infer.SVI(model, local_guide, pyro.optim.Adam({}), loss=IWAE_ELBO(K=4))
        with pytest.warns(UserWarning, match="one joint") as caught:
            svi.step(x)
        assert [warning.filename for warning in caught] == [__file__]


class TestSubsampling:
    @pytest.mark.parametrize("vectorize", [True, False])
    @pytest.mark.parametrize(
        "loss",
        [IWAE_ELBO, lambda K, **kw: PIWAE_ELBO(M=K, K=1, **kw), lambda K, **kw: CIWAE_ELBO(K, 0.5, **kw)],
    )
    def test_a_subsampled_plate_below_a_global_latent_is_refused(self, x, vectorize, loss):
        message = r"'data' is subsampled \(5 of 100\).*'b' \(guide\), 'b' \(model\).*K=1"
        with pytest.raises(ValueError, match=message):
            loss(K=4, vectorize_particles=vectorize).loss(global_model, global_guide, x, 100)

    def test_so_is_dropping_it_by_hand(self, x):
        def subsampled(fn):
            def wrapped(x):
                with pyro.plate("data", 50, subsample=torch.arange(5)):
                    fn(x)

            return wrapped

        model = subsampled(lambda x: pyro.sample("x", normal(pyro.sample("z", normal(0.0, 1.0)), 1.0), obs=x))
        guide = subsampled(lambda x: pyro.sample("z", normal(0.0, 1.0)))
        assert IWAE_ELBO(K=4).particles(model, guide, x).scale == pytest.approx(10)
        with pytest.raises(ValueError, match="plates= does not keep it"):
            IWAE_ELBO(K=4, plates=()).loss(model, guide, x)

    def test_a_subsampled_loop_is_refused(self):
        def model():
            for i in pyro.plate("loop", 100, subsample_size=2):
                pyro.sample(
                    f"x_{i}", normal(pyro.sample(f"z_{i}", normal(0.0, 1.0)), 1.0), obs=torch.ones(())
                )

        def guide():
            for i in pyro.plate("loop", 100, subsample_size=2):
                pyro.sample(f"z_{i}", normal(0.0, 1.0))

        with pytest.raises(
            ValueError, match=r"'loop' is subsampled .*Python loop.* make it a vectorised plate"
        ):
            IWAE_ELBO(K=4).loss(model, guide)

        # The way out.
        def vectorised(observe):
            with pyro.plate("loop", 100, subsample_size=2) as indices:
                z = pyro.sample("z", normal(0.0, 1.0))
                if observe:
                    pyro.sample("x", normal(z, 1.0), obs=torch.ones(len(indices)))

        assert IWAE_ELBO(K=4).loss(lambda: vectorised(True), lambda: vectorised(False)) > 0

    def test_the_elbo_allows_it_as_pyro_does(self, x):
        def seeded(loss):
            pyro.set_rng_seed(0)
            return loss.loss(global_model, global_guide, x, 100)

        theirs = pyro.infer.Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
        assert seeded(MIWAE_ELBO(M=4, K=1)) == pytest.approx(seeded(theirs), rel=1e-5)
        assert seeded(CIWAE_ELBO(K=4, beta=1)) == pytest.approx(seeded(theirs), rel=1e-5)

    @pytest.mark.filterwarnings("ignore:.*tempered density")
    def test_a_model_that_scales_one_side_tempers_it(self, x):
        """A shared scale is a weight on the loss; one on the model alone stays inside the logarithm."""

        def value(model_scale, guide_scale):
            pyro.set_rng_seed(0)
            model = poutine.scale(local_model, model_scale)
            guide = poutine.scale(local_guide, guide_scale)
            return IWAE_ELBO(K=4).particles(model, guide, x)

        plain, shared, tempered = value(1.0, 1.0), value(0.1, 0.1), value(0.1, 1.0)
        torch.testing.assert_close(shared.log_weights, plain.log_weights)
        assert shared.scale == pytest.approx(0.1)
        torch.testing.assert_close(tempered.log_p, 0.1 * plain.log_p)
        torch.testing.assert_close(tempered.log_q, plain.log_q)
        assert tempered.scale == 1

    @pytest.mark.parametrize(
        "scales",
        [
            (0.1, 0.1),
            (torch.tensor(0.1), torch.tensor(0.1)),
            (torch.tensor(0.1), 0.1),
            (torch.tensor([0.1]), torch.tensor(0.1)),
            (torch.full((5,), 0.1), torch.tensor(0.1)),
            (torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)),
        ],
        ids=repr,
    )
    def test_a_shared_scale_is_known_by_its_value(self, x, scales):
        model = poutine.scale(local_model, scales[0])
        guide = poutine.scale(local_guide, scales[1])
        particles = IWAE_ELBO(K=4).particles(model, guide, x)
        torch.testing.assert_close(
            torch.as_tensor(particles.scale).double().expand(5), torch.full((5,), 0.1).double()
        )
        z = particles.sites[0].message["value"]
        torch.testing.assert_close(particles.log_q, normal(0.1, 1.0).log_prob(z))

    def test_a_factor_outside_a_subsampled_plate(self, x):
        def model(x):
            pyro.factor("penalty", torch.tensor(-1.0))
            with pyro.plate("data", 100, subsample=torch.arange(5)):
                z = pyro.sample("z", normal(0.0, 1.0))
                pyro.sample("x", normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", 100, subsample=torch.arange(5)):
                pyro.sample("z", normal(0.0, 1.0))

        with pytest.raises(ValueError, match=r"'penalty' \(model\) lie outside it.*divided by its size"):
            IWAE_ELBO(K=4).loss(model, guide, x)

    @pytest.mark.filterwarnings("ignore:.*tempered density")
    def test_a_scale_that_varies_within_a_cell_stays_inside(self):
        scale = torch.tensor([1.0, 2.0, 3.0])

        def model():
            with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
                pyro.sample("z", normal(0.0, 1.0))

        def guide():
            with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
                pyro.sample("z", normal(1.0, 1.0))

        def particles(scale, **kw):
            pyro.set_rng_seed(0)
            scaled = poutine.scale(model, scale), poutine.scale(guide, scale)
            return IWAE_ELBO(K=4, **kw).particles(*scaled)

        one = torch.tensor(1.0)
        cells = particles(one).log_weights
        torch.testing.assert_close(particles(scale).scale.expand(2, 3), scale.expand(2, 3))
        inside = particles(scale, plates="rows")
        torch.testing.assert_close(inside.log_weights, (cells * scale).sum(-1))
        assert inside.scale == 1
        outside = particles(scale, plates="columns")
        torch.testing.assert_close(outside.log_weights, cells.sum(-2))
        torch.testing.assert_close(outside.scale, scale)


class TestRefusals:
    def test_a_latent_missing_from_the_guide(self, x):
        def guide(x):
            pass

        with pytest.raises(ValueError, match="Latent site 'z' of the model is missing from the guide"):
            IWAE_ELBO(K=4).loss(local_model, guide, x)

    def test_sequential_enumeration_is_sampled_with_one_warning(self, x):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(0.5))
                pyro.sample("x", normal(z, 1.0), obs=x)

        loss = IWAE_ELBO(K=4)
        with pytest.warns(UserWarning, match="Site 'z' is marked for sequential enumeration"):
            loss.loss(model, guide, x)
        loss.loss(model, guide, x)  # not again: warnings are errors
        IWAE_ELBO(K=4, strict_enumeration_warning=False).loss(model, guide, x)

    def test_shapes_that_clash(self, x):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", normal(0.0, 1.0))
                pyro.sample("x", normal(z.sum(), 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", normal(torch.zeros(len(x), 3), 1.0).to_event(1))

        for vectorize in (True, False):
            with pytest.raises(ValueError, match="event_dims disagree at site 'z'"):
                IWAE_ELBO(K=4, vectorize_particles=vectorize).loss(model, guide, x)

    @pytest.mark.parametrize("vectorize", [True, False])
    def test_a_mask_over_undeclared_dims(self, x, vectorize):
        def model(x):
            with pyro.plate("data", len(x)), poutine.mask(mask=torch.ones(3, 5, dtype=torch.bool)):
                z = pyro.sample("z", normal(0.0, 1.0))
                pyro.sample("x", normal(z, 1.0), obs=x)

        with pytest.raises(ValueError, match=r"The mask at site 'z' \(model\) has shape \(3, 5\)"):
            IWAE_ELBO(K=3, vectorize_particles=vectorize).loss(model, local_guide, x)

    def test_a_batch_dim_without_a_plate(self, x):
        def model(x):
            z = pyro.sample("z", normal(torch.zeros(5), 1.0))
            pyro.sample("x", normal(z, 1.0), obs=x)

        def guide(x):
            pyro.sample("z", normal(torch.zeros(5), 1.0))

        for vectorize in (True, False):
            with pytest.raises(ValueError, match='at site "z", invalid log_prob shape'):
                IWAE_ELBO(K=4, vectorize_particles=vectorize).loss(model, guide, x)

    def test_a_value_its_distribution_cannot_score(self):
        def model():
            pyro.sample("z", normal(0.0, 1.0))
            with pyro.plate("data", 3):
                pyro.sample("x", normal(torch.zeros(3), 1.0), obs=torch.zeros(4))

        def guide():
            pyro.sample("z", normal(0.0, 1.0))

        for vectorize in (True, False):
            with pytest.raises(ValueError, match="site 'x'"):
                IWAE_ELBO(K=2, vectorize_particles=vectorize).loss(model, guide)

    def test_a_factor_in_the_guide_must_say_where_it_comes_from(self, x):
        def guide(x, **kw):
            with pyro.plate("data", len(x)):
                pyro.sample("z", normal(0.0, 1.0))
                pyro.factor("jacobian", torch.zeros(len(x)), **kw)

        with pytest.raises(ValueError, match=r"'jacobian'.*has_rsample=True or has_rsample=False"):
            IWAE_ELBO(K=4).loss(local_model, guide, x)

    def test_a_factor_in_the_guide_belongs_to_log_q(self, x):
        def guide(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", normal(0.0, 1.0))
                pyro.factor("jacobian", 3 * z, has_rsample=True)

        particles = IWAE_ELBO(K=4).particles(local_model, guide, x)
        z = particles.sites[0].message["value"]
        torch.testing.assert_close(particles.log_q, normal(0.0, 1.0).log_prob(z) + 3 * z)

    def test_a_step_without_validation_is_silent(self, x):
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("error")
            IWAE_ELBO(K=4).loss_and_grads(local_model, local_guide, x)


class TestBits:
    """The density of independent Bernoullis, which is not left to the distribution."""

    def particles(self, fn, value):
        def model():
            pyro.sample("x", fn, obs=value)

        return IWAE_ELBO(K=1).particles(model, lambda: None)

    @pytest.mark.parametrize("event_dim", [1, 2])
    @pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
    def test_value_and_gradient_are_the_distributions_own(self, event_dim, shape):
        logits = torch.randn(2, 3, 5, requires_grad=True)
        value = (torch.rand(shape) < 0.5).float()
        fn = dist.Bernoulli(logits=logits).to_event(event_dim)
        pyro.enable_validation(False)  # as batch dims without a plate are refused
        try:
            ours = self.particles(fn, value).log_p.sum()
        finally:
            pyro.enable_validation(True)
        theirs = fn.log_prob(value).sum()
        torch.testing.assert_close(ours, theirs)
        pairs = (torch.autograd.grad(log_p, logits)[0] for log_p in (ours, theirs))
        torch.testing.assert_close(*pairs)

    def test_values_that_are_no_bits(self):
        fn = dist.Bernoulli(logits=torch.zeros(5)).to_event(1)
        with pytest.raises(ValueError, match=r"'x' \(model\).*support"):
            self.particles(fn, torch.full((5,), 0.5))

    def test_probabilities_and_single_bits_as_well(self):
        probs = torch.tensor([0.2, 0.9])
        value = torch.tensor([1.0, 0.0])
        for fn in (dist.Bernoulli(probs).to_event(1), dist.Bernoulli(logits=probs.logit()).to_event(1)):
            assert self.particles(fn, value).log_p.exp().item() == pytest.approx(0.02)
        assert self.particles(dist.Bernoulli(logits=torch.zeros(())), torch.tensor(1.0)).log_p.exp() == 0.5

"""Masks and scales that differ between model and guide, and what a mask hides: closed forms and messages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

import pyro_iw.compiling.inductor as inductor
from pyro_iw import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, VR_ELBO, ImportanceSampler

N = 6
Y = torch.tensor([1.4, -0.3, 2.1, 0.8, 0.2, -1.0], dtype=torch.float64)
SEEN = torch.tensor([True, False, True, True, False, True])
WAYS: list[dict[str, Any]] = [
    {},
    {"vectorize_particles": False},
    {"chunk_size": 2},
    {"backward_particles": 2},
    {"compile": True},
    {"estimator": "stl"},
    {"estimator": "dreg"},
    {"estimator": "rws"},
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded, without Inductor's compilation."""
    monkeypatch.setattr(inductor, "inductor", lambda graph, inputs: lambda args: graph(*args))


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def imputing() -> None:
    """A partly observed site below a global latent."""
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(level, 1.0), obs=Y, obs_mask=SEEN)


def waiting() -> None:
    """The same with a latent part that has to be positive."""
    rate = pyro.sample("level", dist.Normal(0.0, 1.0)).exp()
    with pyro.plate("data", N):
        pyro.sample("y", dist.Exponential(rate), obs=Y.abs(), obs_mask=SEEN)


def evidence() -> float:
    """log p of the observed entries of ``imputing``."""
    seen = Y[SEEN]
    covariance = torch.eye(len(seen)) + 1.0
    return dist.MultivariateNormal(torch.zeros(len(seen)), covariance).log_prob(seen).item()


def auto_normal(model: Callable) -> AutoNormal:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNormal(model, init_scale=0.5)
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


def hand_written(model: Callable, guide: AutoNormal, values: dict[str, Tensor]) -> Tensor:
    """The log-weight from the entries that exist, given the particle's value at each site."""
    level, noise = values["level"].squeeze(-1), values["y_unobserved_unconstrained"]
    loc, scale = guide.locs.y_unobserved, guide.scales.y_unobserved
    log_w = dist.Normal(0.0, 1.0).log_prob(level)
    log_w = log_w - dist.Normal(guide.locs.level, guide.scales.level).log_prob(level)
    for n in range(N):
        if model is imputing:
            density = dist.Normal(level, 1.0)
            y, jacobian = Y[n] if SEEN[n] else noise[..., n], torch.zeros(())
        else:
            density = dist.Exponential(level.exp())
            y, jacobian = (Y[n].abs(), torch.zeros(())) if SEEN[n] else (noise[..., n].exp(), noise[..., n])
        log_w = log_w + density.log_prob(y)
        if not SEEN[n]:
            log_w = log_w + jacobian - dist.Normal(loc[n], scale[n]).log_prob(noise[..., n])
    return log_w


@pytest.mark.parametrize("model", [imputing, waiting])
@pytest.mark.parametrize("vectorize", [True, False])
def test_the_weights_are_those_of_the_entries_that_exist(model: Callable, vectorize: bool) -> None:
    guide = auto_normal(model)
    particles = IWAE_ELBO(K=4, vectorize_particles=vectorize).particles(model, guide)
    for pair in {site.pair for site in particles.sites}:
        values = {site.name: site.message["value"] for site in particles.sites if site.pair == pair}
        if not vectorize:
            values["level"] = values["level"].reshape(1)
        wanted = hand_written(model, guide, values)
        found = particles.log_weights if vectorize else particles.log_weights[pair]
        torch.testing.assert_close(found, wanted.reshape(found.shape))


@pytest.mark.parametrize("model", [imputing, waiting])
def test_the_gradient_is_that_of_the_entries_that_exist(model: Callable) -> None:
    guide = auto_normal(model)
    parameters = list(guide.parameters())
    pyro.set_rng_seed(1)
    particles = IWAE_ELBO(K=4).particles(model, guide)
    values = {site.name: site.message["value"] for site in particles.sites}
    bound = hand_written(model, guide, values).logsumexp(0) - math.log(4)
    wanted = torch.autograd.grad(-bound, parameters)
    pyro.set_rng_seed(1)
    assert IWAE_ELBO(K=4).loss_and_grads(model, guide) == pytest.approx(-bound.item())
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_entries_that_do_not_exist_have_no_gradient(way: dict[str, Any]) -> None:
    guide = auto_normal(waiting)
    loss = IWAE_ELBO(K=5, **way)
    for _ in range(3 if "compile" in way else 1):
        loss.loss_and_grads(waiting, guide)
    parameters = dict(guide.named_parameters())
    for kind in ("locs", "scales"):
        gradient = next(p.grad for name, p in parameters.items() if name.startswith(f"{kind}.y_unobserved"))
        assert gradient is not None
        assert torch.equal(gradient != 0, ~SEEN)


def test_evidence_and_imputations() -> None:
    pyro.clear_param_store()
    guide = AutoNormal(imputing)
    guide()
    with torch.no_grad():  # the posterior's own mean and sd, but for the correlation
        precision = 1 + SEEN.sum()
        mean = Y[SEEN].sum() / precision
        guide.locs.level.fill_(mean)
        guide.locs.y_unobserved.fill_(mean)
        guide.scales.level = precision**-0.5
        # What is left there by training is nobody's business.
        guide.scales.y_unobserved = torch.where(SEEN, 1e6, 1.2)
    pyro.set_rng_seed(0)
    samples = ImportanceSampler(imputing, guide, 20_000, chunk_size=5000)()
    assert abs(samples.log_marginal.item() - evidence()) < 5 * samples.monte_carlo_error.item()
    assert samples.monte_carlo_error < 0.02
    imputed = samples.expectation("y_unobserved")[~SEEN]
    torch.testing.assert_close(imputed, mean.expand(2), rtol=0, atol=0.05)
    data = samples.to_arviz(num_samples=200)
    y = torch.as_tensor(data.posterior["y"].values[0])
    assert torch.equal(y[:, SEEN], Y[SEEN].expand(200, -1))
    assert (y[:, ~SEEN].std(0) > 0.5).all()
    log_likelihood = torch.as_tensor(data.log_likelihood["y_observed"].values[0])
    assert torch.equal(log_likelihood[:, ~SEEN], torch.zeros(200, 2))


def one_normal(model: Callable) -> Callable:
    """The unobserved part as one event."""

    def guide() -> None:
        pyro.sample("level", dist.Normal(0.0, 1.0))
        pyro.sample("y_unobserved", dist.MultivariateNormal(torch.zeros(N), torch.eye(N)))

    return guide


JOINT = {
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoIAFNormal": AutoIAFNormal,
    "AutoStructured": AutoStructured,
    "one event": one_normal,
}


@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("name", JOINT)
def test_a_joint_guide_is_refused(name: str, K: int) -> None:
    pyro.clear_param_store()
    guide = JOINT[name](imputing)
    with pyro.validation_enabled(False):
        for run in (IWAE_ELBO(K=K).loss_and_grads, IWAE_ELBO(K=K).loss):
            with pytest.raises(ValueError, match="'y_unobserved', of which only the unobserved entries"):
                run(imputing, guide)
        with pytest.raises(ValueError, match="'y_unobserved', of which only the unobserved entries"):
            ImportanceSampler(imputing, guide, 10).log_marginal()


@pytest.mark.parametrize("rest", [AutoDiagonalNormal, AutoMultivariateNormal])
def test_the_ways_out_of_a_joint_guide(rest: Callable) -> None:
    pyro.clear_param_store()
    guide = AutoGuideList(imputing)
    guide.append(AutoNormal(poutine.block(imputing, expose=["y_unobserved"])))
    guide.append(rest(poutine.block(imputing, hide=["y_unobserved"])))
    guide()
    with torch.no_grad():
        guide[0].scales.y_unobserved = torch.where(SEEN, 1e6, 1.5)
        guide[1].loc.fill_(0.6)
        guide[1].scale = torch.full((1,), 0.6)
    pyro.set_rng_seed(0)
    samples = ImportanceSampler(imputing, guide, 20_000, chunk_size=20_000)()
    assert abs(samples.log_marginal.item() - evidence()) < 5 * samples.monte_carlo_error.item()

    def dropping() -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N), poutine.mask(mask=SEEN):
            pyro.sample("y", dist.Normal(level, 1.0), obs=Y)

    pyro.clear_param_store()
    samples = ImportanceSampler(dropping, rest(dropping, init_scale=0.6), 20_000, chunk_size=20_000)()
    assert abs(samples.log_marginal.item() - evidence()) < 5 * samples.monte_carlo_error.item()


@pytest.mark.parametrize("mask", [torch.tensor(False), torch.tensor([[True], [False]]), SEEN], ids=str)
def test_masks_of_any_shape(mask: Tensor) -> None:
    """At the exact posterior of independent entries the weight is the evidence of what is observed."""
    y = torch.stack([Y, -Y])

    def model() -> None:
        with pyro.plate("columns", N, dim=-1), pyro.plate("rows", 2, dim=-2):
            pyro.sample("y", dist.Normal(0.5, 2.0), obs=y, obs_mask=mask)

    pyro.clear_param_store()
    guide = AutoNormal(model)
    guide()
    with torch.no_grad():
        guide.locs.y_unobserved.fill_(0.5)
        guide.scales.y_unobserved = torch.full((2, N), 2.0)
    log_w = IWAE_ELBO(K=3).particles(model, guide).log_weights
    wanted = torch.where(mask, dist.Normal(0.5, 2.0).log_prob(y), 0.0)
    # The cells' dims in order: rows, columns.
    torch.testing.assert_close(log_w, wanted.expand(3, 2, N))


def test_a_reparameterised_site() -> None:
    """The latent part then is y_unobserved_decentered."""
    model = poutine.reparam(imputing, config={"y_unobserved": LocScaleReparam(0.0)})
    guide = auto_normal(model)
    with torch.no_grad():
        guide.locs.y_unobserved_decentered.fill_(0.0)
        guide.scales.y_unobserved_decentered = torch.where(SEEN, 1e6, 1.2)
    samples = ImportanceSampler(model, guide, 20_000, chunk_size=20_000)()
    assert abs(samples.log_marginal.item() - evidence()) < 5 * samples.monte_carlo_error.item()


def test_a_point_of_the_unobserved_beside_a_joint_guide() -> None:
    pyro.clear_param_store()
    guide = AutoGuideList(imputing)
    guide.append(AutoDelta(poutine.block(imputing, expose=["y_unobserved"])))
    guide.append(AutoDiagonalNormal(poutine.block(imputing, hide=["y_unobserved"])))
    assert math.isfinite(IWAE_ELBO(K=4).loss(imputing, guide))


def test_a_guide_of_ones_own_needs_no_mask_but_may_have_one() -> None:
    def guide(mask: bool) -> None:
        pyro.sample("level", dist.Normal(0.2, 0.8))
        with pyro.plate("data", N), poutine.mask(mask=~SEEN) if mask else nullcontext():
            pyro.sample("y_unobserved", dist.Normal(0.4, 1.2))

    values = []
    for mask in (True, False):
        pyro.set_rng_seed(0)
        values.append(IWAE_ELBO(K=4).loss(lambda mask: imputing(), guide, mask))
    assert values[0] == values[1]


# Latents masked in the model alone ---------------------------------------------------------------

LENGTHS = torch.tensor([3, 1, 2])


def padded(how: str) -> Callable:
    """Sequences of unequal lengths, masked in some way."""

    def sequences() -> None:
        h = torch.tensor(0.0)
        with pyro.plate("data", 3):
            for t in range(3):
                mask: Any = t < LENGTHS
                if how == "other shape":
                    mask = mask.clone().reshape(1, 3)
                context = poutine.mask(mask=mask) if how in ("poutine", "other shape") else nullcontext()
                with context:
                    fn = dist.Normal(0.5 * h, 1.0)
                    h = pyro.sample(f"h_{t}", fn.mask(mask) if how == "distribution" else fn)

    return sequences


@pytest.mark.parametrize("side", ["model", "guide"])
def test_a_new_pair_is_looked_at_whatever_the_validation(side: str) -> None:
    """Later minibatches are looked at under validation alone: on an accelerator that waits for the device."""
    pair = padded("poutine"), padded("none")
    loss = IWAE_ELBO(K=3)
    with pyro.validation_enabled(False):
        with pytest.warns(UserWarning, match=f"'h_1', 'h_2' are masked in the {side} where"):
            loss.loss(*(pair if side == "model" else reversed(pair)))
        loss.loss(*(pair if side == "model" else reversed(pair)))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("how", ["poutine", "distribution"])
def test_padding_masked_in_the_model_alone_warns_once(how: str, vectorize: bool) -> None:
    model, guide = padded(how), padded("none")
    loss = IWAE_ELBO(K=3, vectorize_particles=vectorize)
    with pytest.warns(UserWarning, match="'h_1', 'h_2' are masked in the model"):
        loss.loss(model, guide)
    loss.loss(model, guide)
    sampler = ImportanceSampler(model, guide, 10, vectorize_particles=vectorize)
    with pyro.validation_enabled(False):
        with pytest.warns(UserWarning, match="'h_1', 'h_2' are masked in the model"):
            sampler.log_marginal()
        sampler.log_marginal()


@pytest.mark.parametrize("theirs", ["poutine", "distribution", "other shape"])
@pytest.mark.parametrize("ours", ["poutine", "distribution", "other shape"])
def test_masks_of_equal_value_are_one(ours: str, theirs: str) -> None:
    IWAE_ELBO(K=3).loss(padded(ours), padded(theirs))
    ImportanceSampler(padded(ours), padded(theirs), 10).log_marginal()


@pytest.mark.parametrize("how", ["poutine", "distribution", "other shape"])
def test_a_mask_in_the_guide_alone_warns_once(how: str) -> None:
    """The sampler had log p(x) too low by the log of what q left out, or too high."""
    model, guide = padded("none"), padded(how)
    match = r"'h_1', 'h_2' are masked in the guide where the model does not"
    loss, linear, sampler = IWAE_ELBO(K=3), IWAE_ELBO(K=1), ImportanceSampler(model, guide, 10)
    for evaluate in (
        partial(loss.loss, model, guide),
        partial(linear.loss, model, guide),
        sampler.log_marginal,
    ):
        with pytest.warns(UserWarning, match=match):
            evaluate()
        evaluate()


@pytest.mark.parametrize("masked", ["model", "guide"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_a_prior_that_depends_on_an_enumerated_site(masked: str, vectorize: bool) -> None:
    """It goes into a term with that site, and is no site of the model's any more."""
    mask = torch.tensor([True, False, True])

    def of(side: str) -> Any:
        return poutine.mask(mask=mask) if side == masked else nullcontext()

    def model() -> None:
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            with of("model"):
                z = pyro.sample("z", dist.Normal(k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    def guide() -> None:
        with pyro.plate("data", 3), of("guide"):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.warns(UserWarning, match=f"'z' are masked in the {masked} where the"):
        IWAE_ELBO(K=3, vectorize_particles=vectorize).loss(model, guide)


def test_a_masked_delta_of_noise_is_no_point() -> None:
    """Its log density is a part of log q, which the mask takes out, together with that of the noise."""

    def model() -> None:
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        with poutine.mask(mask=torch.tensor(False)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    with pytest.warns(UserWarning, match="'z' are masked in the guide"):
        IWAE_ELBO(K=3).loss(model, guide)


def test_the_ways_out_of_a_mask_in_the_model_alone() -> None:
    model = padded("poutine")
    particles = IWAE_ELBO(K=3).particles(model, AutoNormalMessenger(model))
    assert particles.log_weights.shape[0] == 3
    whole = torch.tensor([True, False, True])
    model = poutine.mask(padded("none"), mask=whole)
    guide = AutoNormal(model)
    with pytest.warns(UserWarning, match="'h_0', 'h_1', 'h_2' are masked"):
        IWAE_ELBO(K=3).loss(model, guide)
    log_w = IWAE_ELBO(K=3).particles(model, poutine.mask(guide, mask=whole)).log_weights
    assert torch.equal(log_w[:, 1], torch.zeros(3))


def test_point_estimates_have_no_density_to_leave_over() -> None:
    pyro.clear_param_store()
    model = padded("poutine")
    IWAE_ELBO(K=3).loss(model, AutoDelta(model))
    with pytest.warns(UserWarning, match="'h_1', 'h_2' are masked"):
        IWAE_ELBO(K=3).loss(model, AutoNormal(model))


def test_a_flat_prior_is_legal() -> None:
    def model() -> None:
        with poutine.mask(mask=False):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(level, 1.0), obs=Y)

    def guide() -> None:
        pyro.sample("level", dist.Normal(Y.mean(), N**-0.5))

    # Under a flat prior the guide is the posterior: every weight is the integral of the likelihood.
    wanted = dist.Normal(Y.mean(), 1.0).log_prob(Y).sum() + 0.5 * math.log(2 * math.pi / N)
    assert IWAE_ELBO(K=3).loss(model, guide) == pytest.approx(-wanted.item())
    torch.testing.assert_close(ImportanceSampler(model, guide, 10).log_marginal(), wanted)


@pytest.mark.parametrize("how", ["False", "tensor", "distribution"])
def test_dreg_refuses_a_mask_on_the_guides_side_alone(how: str) -> None:
    """Its expectation would be -0.13 here where the gradient is -0.44."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        fn = dist.Normal(pyro.param("a", torch.tensor(0.2)), 0.5)
        mask: Any = False if how == "False" else torch.tensor(False)
        with poutine.mask(mask=mask) if how != "distribution" else nullcontext():
            pyro.sample("z", fn.mask(mask) if how == "distribution" else fn)

    pyro.clear_param_store()
    with (
        pytest.warns(UserWarning, match="'z' are masked in the guide"),
        pytest.raises(ValueError, match=r"Guide site\(s\) 'z' are masked where the model is not.*reparam"),
    ):
        IWAE_ELBO(K=3, estimator="dreg").loss_and_grads(model, guide)
    with pytest.warns(UserWarning, match="'z' are masked in the guide"):
        IWAE_ELBO(K=3, estimator="reparam").loss_and_grads(model, guide)
    with pytest.warns(UserWarning, match="'z' are masked in the guide"):
        IWAE_ELBO(K=1, estimator="dreg").loss_and_grads(model, guide)


# Scales ------------------------------------------------------------------------------------------


def regression(outer: Any = 1.0, inner: Any = 1.0, enumerated: bool = False) -> Callable:
    """Data below a global latent, with a scale around all or around the data."""

    def model() -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        if enumerated:
            level = level + pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        with pyro.plate("data", N), poutine.scale(scale=inner):
            pyro.sample("y", dist.Normal(level, 1.0), obs=Y)

    return poutine.scale(model, scale=outer)


def level_guide() -> None:
    pyro.sample("level", dist.Normal(0.3, 0.5))


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("where", ["model", "guide", "enumerated", "factor", "auxiliary"])
def test_a_scale_over_more_than_the_site_is_refused(where: str, validate: bool) -> None:
    weights = torch.ones(N)
    model, guide, site = regression(), level_guide, "'level' (guide)"
    if where == "model":
        model, site = regression(weights), "'level' (model)"
    elif where == "guide":
        guide = poutine.scale(guide, scale=weights)
    elif where == "enumerated":
        model, site = regression(weights, enumerated=True), "'level' (model)"
    elif where == "auxiliary":
        pyro.clear_param_store()
        guide, site = poutine.scale(AutoDiagonalNormal(model), scale=weights), "latent' (guide)"
    else:

        def model() -> None:
            regression()()
            with poutine.scale(scale=weights):
                pyro.factor("penalty", torch.tensor(-1.0))

        site = "'penalty' (model)"
    runs: list[Callable] = [IWAE_ELBO(K=3).loss, IWAE_ELBO(K=1).loss_and_grads]
    runs += [IWAE_ELBO(K=3, vectorize_particles=False).loss]
    runs += [lambda *pair: ImportanceSampler(*pair, num_particles=10).log_marginal()]
    for run in runs:
        with (
            pyro.validation_enabled(validate),
            pytest.raises(ValueError, match=r"poutine.scale at site") as error,
        ):
            run(model, guide)
        assert site in str(error.value)
        assert f"has shape ({N},)" in str(error.value)


def test_the_way_out_of_a_scale_over_more_than_the_site() -> None:
    """Around the data's site inside its plate it weights every datapoint, once."""
    weights = torch.linspace(0.5, 1.5, N)
    pyro.set_rng_seed(0)
    particles = MIWAE_ELBO(M=3, K=1).particles(regression(inner=weights), level_guide)
    level = particles.sites[0].message["value"].reshape(3, 1)
    wanted = (weights * dist.Normal(level, 1.0).log_prob(Y)).sum(-1) + dist.Normal(0.0, 1.0).log_prob(
        level[:, 0]
    )
    torch.testing.assert_close(particles.log_p, wanted)


LINEAR = [
    IWAE_ELBO(K=1),
    MIWAE_ELBO(M=4, K=1),
    CIWAE_ELBO(K=4, beta=1),
    VR_ELBO(alpha=1, K=4),
    IWAE_ELBO(K=4, kl_weight=0.5),
]


@pytest.mark.parametrize("loss", LINEAR, ids=repr)
def test_a_scale_is_quiet_where_it_is_right(loss: Any) -> None:
    if loss.bound.is_linear:
        loss.loss(regression(inner=4.0), level_guide)
        loss.loss(regression(inner=torch.full((N,), 4.0)), level_guide)
    loss.loss(regression(outer=0.1), poutine.scale(level_guide, scale=0.1))


@pytest.mark.parametrize(
    "way", [{}, {"vectorize_particles": False}, {"chunk_size": 2}, {"backward_particles": 2}], ids=str
)
def test_a_tempered_likelihood_warns_once(way: dict[str, Any]) -> None:
    model = regression(inner=4.0)
    loss = IWAE_ELBO(K=4, **way)
    with pytest.warns(UserWarning, match=r"Site\(s\) 'y' \(model\) have a poutine.scale.*K=1") as caught:
        loss.loss_and_grads(model, level_guide)
    assert len(caught) == 1
    loss.loss_and_grads(model, level_guide)
    loss.loss(model, level_guide)
    with pytest.warns(UserWarning, match="tempered density") as again:
        ImportanceSampler(model, level_guide, 10).log_marginal()
    assert [str(warning.message) for warning in again] == [str(caught[0].message)]


def test_a_guide_scaled_alone_warns() -> None:
    with pytest.warns(UserWarning, match=r"'level' \(guide\) have a poutine.scale"):
        IWAE_ELBO(K=4).loss(regression(), poutine.scale(level_guide, scale=0.5))


def test_a_minibatch_of_a_gaussian_process() -> None:
    """pyro.contrib.gp scales its likelihood by N / B."""
    pyro.clear_param_store()
    x = torch.linspace(0.0, 1.0, 5)
    model = gp.models.VariationalSparseGP(
        x, x.sin(), gp.kernels.RBF(1), Xu=x[:3].clone(), likelihood=gp.likelihoods.Gaussian(), num_data=50
    )
    assert math.isfinite(MIWAE_ELBO(M=3, K=1).loss(model.model, model.guide))
    with pytest.warns(UserWarning, match=r"'likelihood.y' \(model\) have a poutine.scale"):
        IWAE_ELBO(K=4).loss(model.model, model.guide)


# What a mask hides -------------------------------------------------------------------------------

SEEN_COLUMNS = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0], [1, 0, 0]]).bool()
LOGITS = torch.tensor([0.0, 0.5, -0.5])


def over_columns(z: Tensor) -> Tensor:
    return z[..., None] + pyro.param("t", torch.tensor(0.3)) * LOGITS


def shift(z: Tensor) -> Tensor:
    return z + pyro.param("t", torch.tensor(0.3))


COUNTS = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0, 1.0])
BITS = SEEN_COLUMNS.double()
HIDDEN: dict[str, tuple[Callable[[Tensor], Any], Tensor, float]] = {
    "Normal": (lambda z: dist.Normal(shift(z), 1.0), Y, math.nan),
    "Normal of infinity": (lambda z: dist.Normal(shift(z), 1.0), Y, math.inf),
    "Gamma": (lambda z: dist.Gamma(shift(z).exp(), 1.0), Y.abs(), math.nan),
    "LogNormal of 0": (lambda z: dist.LogNormal(shift(z), 1.0), Y.abs(), 0.0),
    "Beta": (lambda z: dist.Beta(shift(z).exp(), 1.0), Y.sigmoid(), math.nan),
    "Uniform": (lambda z: dist.Uniform(-5.0 - shift(z).exp(), 5.0), Y, math.nan),
    "Poisson": (lambda z: dist.Poisson(shift(z).exp()), COUNTS, math.nan),
    "Poisson of -1": (lambda z: dist.Poisson(shift(z).exp()), COUNTS, -1.0),
    "Bernoulli": (lambda z: dist.Bernoulli(logits=shift(z)), COUNTS.clamp(max=1), math.nan),
    "Categorical": (lambda z: dist.Categorical(logits=over_columns(z)), COUNTS.clamp(max=2).long(), -1),
    "OneHot": (lambda z: dist.OneHotCategorical(logits=over_columns(z)), torch.eye(3).repeat(2, 1), math.nan),
    "bits": (lambda z: dist.Bernoulli(logits=over_columns(z)).to_event(1), BITS, math.nan),
    "event": (lambda z: dist.Normal(over_columns(z), 1.0).to_event(1), BITS, math.nan),
    "joint": (lambda z: dist.MultivariateNormal(over_columns(z), torch.eye(3)), BITS, math.nan),
    "simplex": (lambda z: dist.Dirichlet(over_columns(z).exp()), (BITS + 1).softmax(-1), math.nan),
    "transformed": (
        lambda z: dist.TransformedDistribution(dist.Normal(shift(z), 1.0), dist.transforms.ExpTransform()),
        Y.abs(),
        math.nan,
    ),
    "masked": (lambda z: dist.Normal(shift(z), 1.0).mask(SEEN), Y, math.nan),
    "masked columns": (
        lambda z: dist.Normal(over_columns(z), 1.0).mask(SEEN_COLUMNS).to_event(1),
        BITS,
        math.nan,
    ),
}


def hiding(name: str, fill: bool) -> tuple[Callable, Callable]:
    """A latent a row and data of some kind, with something else in place of what is masked, or not."""
    density, x, garbage = HIDDEN[name]
    kept = SEEN_COLUMNS if name == "masked columns" else SEEN.reshape(-1, *[1] * (x.dim() - 1))
    data = torch.where(kept, x, garbage).to(x.dtype) if fill else x

    def model() -> None:
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with nullcontext() if name.startswith("masked") else poutine.mask(mask=SEEN):
                pyro.sample("x", density(z), obs=data)

    def guide() -> None:
        loc, scale = pyro.param("loc", torch.full((N,), 0.2)), pyro.param("scale", torch.full((N,), 0.7))
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(loc, scale))

    return model, guide


def step(pair: tuple[Callable, Callable], way: dict[str, Any]) -> tuple[float, list[Tensor]]:
    pyro.clear_param_store()
    loss = IWAE_ELBO(K=4, **way)
    for _ in range(3 if "compile" in way else 1):
        for name in pyro.get_param_store():
            pyro.param(name).unconstrained().grad = None
        pyro.set_rng_seed(0)
        value = loss.loss_and_grads(*pair)
    gradients = [pyro.param(name).unconstrained().grad for name in ("t", "loc", "scale")]
    return value, [gradient for gradient in gradients if gradient is not None]


def assert_nothing_shows(name: str, way: dict[str, Any]) -> None:
    value, gradients = step(hiding(name, fill=False), way)
    found, found_gradients = step(hiding(name, fill=True), way)
    assert found == value
    assert len(gradients) == len(found_gradients) == 3
    for gradient, wanted in zip(found_gradients, gradients, strict=True):
        assert wanted.isfinite().all()
        assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_mask_hides_may_be_anything(name: str, validate: bool) -> None:
    with pyro.validation_enabled(validate):
        assert_nothing_shows(name, {})


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ["Gamma", "masked columns"])
def test_in_every_way_of_running(name: str, way: dict[str, Any]) -> None:
    with pyro.validation_enabled(False):
        assert_nothing_shows(name, way)


def test_a_nan_of_unknown_support() -> None:
    """Where no value is known to be in the support, a NaN at least is none."""
    counts = torch.tensor([[1.0, 2.0, 0.0]] * N)
    HIDDEN["Multinomial"] = (lambda z: dist.Multinomial(3, logits=over_columns(z)), counts, math.nan)
    try:
        with pyro.validation_enabled(False):
            assert_nothing_shows("Multinomial", {})
    finally:
        del HIDDEN["Multinomial"]


def test_a_nan_that_is_not_masked_is_still_refused() -> None:
    _, guide = hiding("Normal", fill=True)

    def model() -> None:
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=SEEN):
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.full((N,), math.nan))

    for validate, message in ((True, "within the support"), (False, "log-weights are NaN")):
        with pyro.validation_enabled(validate), pytest.raises(ValueError, match=message):
            IWAE_ELBO(K=3).loss(model, guide)


@pytest.mark.parametrize("validate", [True, False])
def test_log_likelihoods_beside_masked_nans(validate: bool) -> None:
    pyro.clear_param_store()
    with pyro.validation_enabled(validate):
        pyro.set_rng_seed(0)
        data = ImportanceSampler(*hiding("Normal", fill=True), 2000)().to_arviz(num_samples=50)
    log_likelihood = torch.as_tensor(data.log_likelihood["x"].values)
    assert log_likelihood.isfinite().all()
    assert torch.equal(log_likelihood == 0, (~SEEN).expand(1, 50, N))
    assert torch.equal(torch.as_tensor(data.observed_data["x"].values).isnan(), ~SEEN)


def test_beside_an_enumerated_site() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(pyro.param("t", torch.tensor(0.3)), 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            with poutine.mask(mask=SEEN):
                pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)

    _, guide = hiding("Normal", fill=False)
    runs = []
    for x in (Y, torch.where(SEEN, Y, math.nan)):
        with pyro.validation_enabled(False):
            runs.append(step((lambda x=x: model(x), guide), {}))
    assert runs[0][0] == runs[1][0]
    for gradient, wanted in zip(runs[1][1], runs[0][1], strict=True):
        assert torch.equal(gradient, wanted)


def test_no_word_of_masks_and_scales_without_any() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IWAE_ELBO(K=3).loss(regression(), level_guide)

"""What adversarial training reads off a pair: the prior's draws, the cells, and the pairs it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor, nn

from pyro_iw import AdversarialSVI
from pyro_iw.adversarial.pair import Prior, run_pair
from pyro_iw.tracing.traces import Pair

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
ENUMERATE = {"enumerate": "parallel"}
NOISE = {"is_auxiliary": True}


def model(prior: Any = None, name: str = "z", infer: Any = None, obs: Any = None, data: Any = X) -> Callable:
    """One latent site, a decoder without parameters, and what the tests need to go wrong."""

    def run() -> None:
        with pyro.plate("data", len(X)):
            fn = dist.Normal(torch.zeros(2), 1.0).to_event(1) if prior is None else prior()
            z = pyro.sample(name, fn, infer=infer or {}, obs=obs)
            loc = z.reshape(len(X), -1).sum(-1, True).expand(-1, 3)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=data)

    return run


def guide(fn: Any = None, name: str = "z", infer: Any = None, size: int = 2) -> Callable:
    def run() -> None:
        loc = pyro.param("loc", torch.zeros(len(X), size))
        with pyro.plate("data", len(X)):
            pyro.sample(name, dist.Delta(loc, event_dim=1) if fn is None else fn(loc), infer=infer or {})

    return run


def both(*fns: Callable) -> Callable:
    return lambda: [fn() for fn in fns]


def global_site(name: str, fn: Any = None, **options: Any) -> Callable:
    return lambda: pyro.sample(
        name, fn or dist.Normal(pyro.param(f"{name}_loc", torch.tensor(0.1)), 1.0), **options
    )


def sgd() -> Any:
    return pyro.optim.SGD({"lr": 0.1})


REFUSED: dict[str, tuple[Callable, Callable, list[str], type, str]] = {
    "in neither": (
        model(),
        guide(),
        ["z", "w"],
        ValueError,
        "'w'.*neither in the model nor in the guide.*'z'",
    ),
    "in the guide only": (
        model(),
        both(guide(), global_site("w")),
        ["z", "w"],
        ValueError,
        "'w'.*the guide has but not the model",
    ),
    "in the model only": (
        both(model(), global_site("w", dist.Normal(0.0, 1.0))),
        guide(),
        ["z", "w"],
        ValueError,
        "'w'.*the model has but not the guide",
    ),
    "observed": (model(), guide(), ["z", "x"], ValueError, "'x'.*observed in the model"),
    "observed though the guide has it": (
        model(obs=torch.zeros(4, 2)),
        guide(),
        ["z"],
        ValueError,
        "'z'.*observed in the model",
    ),
    "without discriminator": (
        both(global_site("w", dist.Normal(0.0, 1.0)), model()),
        both(global_site("w"), guide()),
        ["z"],
        ValueError,
        "'w' of the guide has no discriminator.*discriminators={'w': ...}",
    ),
    "noise that is not marked": (
        model(),
        both(global_site("w"), guide()),
        ["z"],
        ValueError,
        "'w' of the guide has no discriminator.*is_auxiliary",
    ),
    "marked as noise, but in the model": (
        both(global_site("w", dist.Normal(0.0, 1.0)), model()),
        both(global_site("w", infer=NOISE), guide()),
        ["z"],
        ValueError,
        "'w' of the guide has no discriminator",
    ),
    "marked as noise, but in the decoder": (
        both(model(), global_site("w", dist.Normal(0.0, 1.0))),
        both(global_site("w", infer=NOISE), guide()),
        ["z"],
        ValueError,
        "'w' of the guide has no discriminator",
    ),
    "enumerated in the model": (
        model(lambda: dist.OneHotCategorical(torch.ones(2)), infer=ENUMERATE),
        guide(),
        ["z"],
        NotImplementedError,
        "'z' of the model is to be enumerated",
    ),
    "enumerated in the guide": (
        model(),
        guide(infer={"enumerate": "sequential"}),
        ["z"],
        NotImplementedError,
        "'z' of the guide is to be enumerated",
    ),
    "enumerated and left out": (
        both(model(), global_site("c", dist.Categorical(torch.ones(2)), infer=ENUMERATE)),
        guide(),
        ["z"],
        NotImplementedError,
        "'c' of the model is to be enumerated",
    ),
    "not reparameterised": (
        model(lambda: dist.OneHotCategorical(torch.ones(2))),
        guide(lambda loc: dist.OneHotCategorical(logits=loc)),
        ["z"],
        ValueError,
        r"'z' of the guide: OneHotCategorical is not.*Delta\(probabilities.*Relaxed.*StraightThrough",
    ),
    "not reparameterised, mixture": (
        model(),
        guide(
            lambda loc: dist.MixtureSameFamily(
                dist.Categorical(torch.ones(4, 3)),
                dist.Normal(loc[:, None, :].expand(-1, 3, -1), 1.0).to_event(1),
            )
        ),
        ["z"],
        ValueError,
        "'z' of the guide: MixtureSameFamily is not",
    ),
    "noise that is not reparameterised": (
        model(),
        both(global_site("w", dist.Bernoulli(torch.tensor(0.5, requires_grad=True)), infer=NOISE), guide()),
        ["z"],
        ValueError,
        "'w' of the guide: Bernoulli is not",
    ),
    "detached": (
        model(),
        guide(lambda loc: dist.Delta(loc.detach(), event_dim=1)),
        ["z"],
        ValueError,
        "'z' of the guide: they depend on no parameter",
    ),
    "nothing observed": (model(data=None), guide(), ["z"], ValueError, "no observed site"),
    "another size": (
        model(),
        guide(size=3),
        ["z"],
        ValueError,
        r"'z' the guide's values have shape \(4, 3\) with 1 .*draws \(4, 2\) with 1",
    ),
    "another number of event dims": (
        model(lambda: dist.Normal(torch.zeros(4, 1), 1.0).to_event(1)),
        guide(lambda loc: dist.Normal(loc.sum(-1, True).expand(-1, 4), 1.0).to_event(0)),
        ["z"],
        ValueError,
        "event dim",
    ),
    "a mask over other dims": (
        model(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1)),
        lambda: poutine.mask(guide(), mask=torch.ones(5, 1, dtype=torch.bool))(),
        ["z"],
        ValueError,
        r"mask at site 'z' has shape \(5, 1\).*batch shape \(4,\)",
    ),
    "a mask over more than the data": (
        poutine.mask(model(), mask=torch.ones(5, 1, dtype=torch.bool)),
        guide(),
        ["z"],
        ValueError,
        r"mask at site 'z' has shape \(5, 1\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_moves(case: str) -> None:
    a_model, a_guide, names, error, message = REFUSED[case]
    critics = {name: nn.Linear(2, 1) for name in names}
    before = [value.clone() for critic in critics.values() for value in critic.parameters()]
    svi = AdversarialSVI(a_model, a_guide, critics, sgd())
    with pytest.raises(error, match=message):
        svi.step()
    assert not _PYRO_STACK
    assert not _DIM_ALLOCATOR._stack
    after = [value for critic in critics.values() for value in critic.parameters()]
    assert all(map(torch.equal, before, after))
    if "loc" in pyro.get_param_store():
        assert not pyro.param("loc").any()


def test_a_density_of_the_wrong_shape() -> None:
    def wrong() -> None:
        with pyro.plate("data", len(X)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(X, 1.0), obs=X)

    with pytest.raises(ValueError, match="x"):
        AdversarialSVI(wrong, guide(), nn.Linear(2, 1), sgd()).step()


@pytest.mark.parametrize("kind", ["mask", "scale"])
def test_a_mask_or_scale_over_more_than_the_data(kind: str) -> None:
    """It would count every density several times."""
    over = torch.ones(5, 1, dtype=torch.bool if kind == "mask" else torch.float)

    def repeated() -> None:
        with pyro.plate("data", len(X)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with poutine.mask(mask=over) if kind == "mask" else poutine.scale(scale=over):
                pyro.sample("x", dist.Normal(X, 1.0).to_event(1), obs=X)

    svi = AdversarialSVI(repeated, guide(), nn.Linear(2, 1), sgd())
    with pytest.raises(ValueError, match=rf"The {kind} at site 'x' has shape \(5, 1\)"):
        svi.step()


def test_the_prior_leaves_before_the_decoder() -> None:
    reached = []

    def sequential() -> None:
        total = torch.zeros(())
        for i in pyro.plate("steps", 3):
            total = total + pyro.sample(f"z_{i}", dist.Normal(total, 1.0))
            for j in pyro.markov(range(2)):
                reached.append((i, j))

    prior = Prior(["z_0", "z_1"])
    prior.run(Pair(sequential, lambda: None))
    assert reached == [(0, 0), (0, 1)]
    assert list(prior.sites) == ["z_0", "z_1"]
    assert not _PYRO_STACK
    assert not _DIM_ALLOCATOR._stack


def test_the_prior_follows_upstream_draws_and_observations() -> None:
    """z | w | y: w is the prior's own draw, y the data."""
    label = torch.tensor([5.0, -5.0, 5.0, -5.0])

    def hierarchy() -> None:
        with pyro.plate("data", 4):
            y = pyro.sample("y", dist.Normal(0.0, 10.0), obs=label)
            w = pyro.sample("w", dist.Normal(y, 0.1))
            z = pyro.sample("z", dist.Normal(2 * w, 1e-4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[:, 0])

    def shared() -> None:
        loc = pyro.param("loc", torch.zeros(4))
        with pyro.plate("data", 4):
            for name in "wz":
                pyro.sample(name, dist.Delta(loc))

    run = run_pair(Pair(hierarchy, shared), lambda latents: list(latents))
    torch.testing.assert_close(run.real["z"].values, 2 * run.real["w"].values, rtol=0, atol=1e-3)
    assert ((run.real["w"].values - label).abs() < 1).all()
    assert not run.real["z"].values.requires_grad
    assert run.fake["z"].values.tolist() == [0.0] * 4
    # y and x; nothing of the latents' densities.
    expected = dist.Normal(0.0, 10.0).log_prob(label).sum() + dist.Normal(0.0, 1.0).log_prob(X[:, 0]).sum()
    assert run.terms.keys() == {"y", "x"}
    assert sum(run.terms.values()).item() == pytest.approx(-expected.item())


def test_factors_count_and_deterministic_sites_do_not() -> None:
    def scored() -> None:
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.deterministic("twice", 2 * z)
            pyro.factor("energy", -z.square().sum(-1))

    def shifted() -> None:
        loc = pyro.param("loc", torch.ones(4, 2))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Delta(loc, event_dim=1))

    run = run_pair(Pair(scored, shifted), lambda latents: list(latents))
    assert {name: term.item() for name, term in run.terms.items()} == {"energy": pytest.approx(8.0)}


def test_nested_plates_are_flattened_with_their_features() -> None:
    """Each cell keeps its own features and its own mask."""
    mask = torch.tensor([[True, False, True], [True, True, False]])
    grid = torch.arange(6.0).reshape(2, 3)

    def nested(values: Callable) -> Callable:
        def run() -> None:
            with pyro.plate("columns", 3, dim=-1), pyro.plate("rows", 2, dim=-2), poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Delta(values(), event_dim=1))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=grid)

        return run

    def codes() -> Tensor:
        return torch.stack([grid, -grid], -1) * pyro.param("one", torch.ones(()))

    def features() -> Tensor:
        return grid[..., None]

    pair = Pair(nested(codes), nested(codes))
    run = run_pair(pair, lambda latents: list(latents), features)
    kept = torch.tensor([0.0, 2.0, 3.0, 4.0])
    for cells in (run.real["z"], run.fake["z"]):
        assert torch.equal(cells.values, torch.stack([kept, -kept], -1))
        assert torch.equal(cells.features, kept[:, None])
    one_for_all = run_pair(pair, lambda latents: list(latents), lambda: torch.ones(7))
    assert torch.equal(one_for_all.real["z"].features, torch.ones(4, 7))


def test_a_cell_that_one_of_both_masks_counts_in_neither() -> None:
    """As with a label that is observed for some: its latent rest is masked in the model alone."""
    known = torch.tensor([True, False, True, False])
    labels = torch.eye(2)[[0, 1, 1, 0]]

    def labelled() -> None:
        with pyro.plate("data", 4):
            prior = dist.OneHotCategorical(torch.ones(2))
            y = pyro.sample("y", prior, obs=labels, obs_mask=known)
            pyro.sample("x", dist.Normal(y.sum(-1), 1.0), obs=X[:, 0])

    def soft() -> None:
        logits = pyro.param("logits", torch.zeros(4, 2))
        with pyro.plate("data", 4):
            pyro.sample("y_unobserved", dist.Delta(logits.softmax(-1), event_dim=1))

    run = run_pair(Pair(labelled, soft), lambda latents: list(latents))
    assert run.real["y_unobserved"].values.shape == run.fake["y_unobserved"].values.shape == (2, 2)
    assert run.terms["y_observed"].item() == pytest.approx(2 * math.log(2))
    masked_guide = poutine.mask(guide(), mask=known)
    run = run_pair(Pair(model(), masked_guide), lambda latents: list(latents))
    assert len(run.real["z"].values) == len(run.fake["z"].values) == 2


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(5, 2), r"condition.*'z' has shape \(5,\).*batch shape \(4,\)"),
        (torch.ones(()), r"tensor \[\*batch, C\], got \(\)"),
        ([1.0], r"tensor \[\*batch, C\], got list"),
    ],
)
def test_features_of_another_shape(features: Any, message: str) -> None:
    svi = AdversarialSVI(model(), guide(), nn.Bilinear(2, 2, 1), sgd(), condition=lambda: features)
    with pytest.raises(ValueError, match=message):
        svi.step()


def test_one_minibatch_for_prior_and_guide_of_one_run() -> None:
    """Where model and guide subsample by themselves, the runs agree; the next pair of runs has others."""
    seen: list[Any] = []

    def subsampled(is_guide: bool) -> Callable:
        def run() -> None:
            loc = pyro.param("loc", torch.zeros(4)) if is_guide else torch.zeros(4)
            with pyro.plate("data", 4, subsample_size=2) as index:
                seen.append(index.tolist())
                fn = dist.Delta(loc[index]) if is_guide else dist.Normal(index.float(), 1e-6)
                z = pyro.sample("z", fn)
                if not is_guide:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=X[index, 0])

        return run

    critic = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1))
    svi = AdversarialSVI(subsampled(False), subsampled(True), critic, sgd())
    for _ in range(5):
        svi.evaluate_loss()
    groups = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert all(group[0] == group[1] == group[2] for group in groups)
    assert any(one[0] != other[0] for one, other in itertools.pairwise(groups))


def test_infinite_data_are_named_before_anything_moves() -> None:
    data = X.clone()
    data[1, 1] = math.nan
    svi = AdversarialSVI(model(data=data), guide(), nn.Linear(2, 1), sgd())
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="reconstruction loss at site 'x' is nan"),
    ):
        svi.step()
    assert not pyro.param("loc").any()


def test_a_decoders_own_draw_that_stops_its_gradient() -> None:
    logits = torch.zeros(2, requires_grad=True)

    def decoder(learnt: bool) -> Callable:
        def run() -> None:
            with pyro.plate("data", len(X)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                k = pyro.sample("k", dist.Categorical(logits=z + logits if learnt else z), infer=NOISE)
                loc = z.sum(-1, True).expand(-1, 3) + k.unsqueeze(-1)
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=X)

        return run

    def mixture() -> None:
        with pyro.plate("data", len(X)):
            k = pyro.sample("k", dist.Categorical(logits=logits), infer=NOISE)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0 + k.unsqueeze(-1)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, True).expand(-1, 3), 1.0).to_event(1), obs=X)

    with pytest.raises(ValueError, match=r"'k' of the model, which it draws itself: Categorical is not rep"):
        AdversarialSVI(decoder(True), guide(), nn.Linear(2, 1), sgd()).step()
    with pytest.raises(ValueError, match="'k' of the model"):  # of the code, whose gradient it holds up, too
        AdversarialSVI(decoder(False), guide(), nn.Linear(2, 1), sgd()).step()
    pyro.clear_param_store()
    # Part of the prior, whose parameters no phase trains.
    AdversarialSVI(mixture, guide(), nn.Linear(2, 1), sgd()).step()


def test_what_condition_may_return() -> None:
    labels = torch.tensor([0, 2, 1, 0])

    class Critic(nn.Linear):
        def forward(self, z: Tensor, c: Tensor) -> Tensor:
            seen.append(c)
            return super().forward(torch.cat([z, c], -1))

    seen: list[Tensor] = []
    one_hot = nn.functional.one_hot(labels)  # of integers
    AdversarialSVI(model(), guide(), Critic(5, 1), sgd(), condition=lambda: one_hot).step()
    assert torch.equal(seen[-1], one_hot.float())
    pyro.clear_param_store()
    for returned, message in ((labels, "ids of classes: .*one_hot"), (None, "tensor .* got NoneType")):
        svi = AdversarialSVI(model(), guide(), Critic(5, 1), sgd(), condition=lambda value=returned: value)
        with pytest.raises(ValueError, match=message):
            svi.step()

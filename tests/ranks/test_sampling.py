"""The importance sampler over ranks: the whole on each of them, and what one process would have drawn."""

import datetime
import os
import warnings
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from helpers.ranks import names_lost, run_on_ranks
from pyro_iw import AnnealedImportanceSampler, ImportanceSampler, LogMarginal
from pyro_iw.bounds import MIWAE
from pyro_iw.posterior import over_data
from pyro_iw.ranks import group as the_group
from pyro_iw.ranks.exchange import seed_of


def model(x, size=None):
    with pyro.plate("data", len(x) if size is None else size, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x, size=None):
    with pyro.plate("data", len(x) if size is None else size, subsample_size=len(x)):
        pyro.sample("z", dist.Normal(0.4 * x, 0.9))


def exact(x):
    return dist.Normal(torch.zeros((), dtype=x.dtype), 2**0.5).log_prob(x)


def hierarchical_model(x):
    mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def hierarchical_guide(x):
    mean = pyro.sample("mean", dist.Normal(x.mean(), 0.4))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((mean + x) / 2, 0.8))


def exact_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)


def world(**options):
    return {"particle_group": torch.distributed.group.WORLD, "progress": False, **options}


# ----------------------------------------------------------------------------------------------------
# Particles
# ----------------------------------------------------------------------------------------------------


def everything(rank, seeds):
    """What a sampler of 70 particles in chunks of 9 knows, on this rank."""
    torch.manual_seed(seeds[rank])
    sampler = ImportanceSampler(model, guide, 70, chunk_size=9, **world())
    before = torch.get_rng_state()
    value, error, ess = sampler.evidence(X)
    torch.set_rng_state(before)
    samples = sampler(X)
    torch.set_rng_state(before)
    bounded = sampler.log_marginal_dataset([X], bound=MIWAE(M=2, K=4))
    torch.set_rng_state(before)
    corrected = ImportanceSampler(model, guide, 70, chunk_size=9, jackknife=True, **world()).log_marginal(X)
    torch.set_rng_state(before)
    hierarchical = ImportanceSampler(
        hierarchical_model, hierarchical_guide, 70, local="data", num_local=2, chunk_size=9, **world()
    )(X)
    local = hierarchical.local["data"]
    torch.manual_seed(5)  # from here on each rank is by itself
    found = {
        "value": value,
        "error": error,
        "ess": ess,
        "log_p": samples.log_p,
        "log_q": samples.log_q,
        "z": samples.values["z"],
        "posterior": samples.posterior(20)["z"],
        "predictive": samples.predictive(20)(X)["x"],
        "bound": bounded.bounds,
        "gap error": bounded.minus_kl_errors,
        "jackknife": corrected,
        "hierarchical": hierarchical.log_weights,
        "hierarchical z": hierarchical.values["z"],
        "local": local.log_weights,
    }
    return {name: tensor.numpy() for name, tensor in found.items()}


def test_particles_do_not_depend_on_the_number_of_ranks():
    """8 chunks on 1 and 3 ranks, whatever seeds the ranks but the first one have."""
    (whole,) = run_on_ranks(everything, 1, [11])
    for got in run_on_ranks(everything, 3, [11, 11, 12]):
        for name, truth in whole.items():
            assert torch.allclose(torch.tensor(got[name]), torch.tensor(truth), rtol=1e-12, atol=1e-12), name

    # The same particles, drawn chunk by chunk without any ranks.
    torch.manual_seed(11)
    seed = int(torch.randint(2**62, ()))
    drawn = []
    for index, size in enumerate([9] * 7 + [7]):
        torch.manual_seed(seed_of(seed, "chunk", index))
        z = 0.4 * X + 0.9 * torch.randn(size, 3, dtype=X.dtype)
        log_q = dist.Normal(0.4 * X, 0.9).log_prob(z)
        drawn.append(dist.Normal(0.0 * X, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(X) - log_q)
    log_w = torch.cat(drawn)
    whole = {name: torch.tensor(value) for name, value in whole.items()}
    close = {"rtol": 1e-10, "atol": 1e-12}
    assert torch.allclose(whole["log_p"] - whole["log_q"], log_w, **close)
    assert torch.allclose(whole["value"], log_w.exp().mean(0).log(), **close)
    assert torch.allclose(whole["ess"], log_w.exp().sum(0) ** 2 / log_w.exp().square().sum(0), **close)
    groups = log_w[:64].reshape(8, 2, 4, 3).exp().mean(2).log().mean(1)
    assert torch.allclose(whole["bound"], groups.mean(0), **close)


def odd_cases(rank):
    few = ImportanceSampler(model, guide, 3, chunk_size=None, **world())
    samples = few(X)
    minibatches = ImportanceSampler(model, guide, 20, chunk_size=5, **world())(X, 1000)
    own = torch.randint(2**62, ()).item()  # each rank still has a stream of its own
    with pytest.raises(ValueError, match=r"share of the particles.*ImportanceSamples are the whole"):
        next(few.particles(X))
    return {
        "log_w": samples.log_weights.tolist(),
        "value": few.log_marginal(X).tolist(),
        "minibatch": minibatches.rerun.minibatch.indices["data"].tolist(),
        "log_p": minibatches.log_p.tolist(),
        "own": own,
    }


def test_fewer_chunks_than_ranks_and_one_minibatch():
    found = run_on_ranks(odd_cases, 4)
    for name in "log_w", "value", "minibatch", "log_p":
        assert all(other[name] == found[0][name] for other in found), name
    assert len({other["own"] for other in found}) == 4
    assert len(found[0]["log_w"]) == 3
    assert len({row[0] for row in found[0]["log_w"]}) == 3
    assert len(found[0]["log_p"]) == 20


# ----------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------

N = 7
DATA = torch.linspace(-2, 3, N, dtype=torch.float64)


def parts(rank, size, folder):
    """Results of a guide that is the posterior, whose every weight is p(x)."""
    group = torch.distributed.group.WORLD
    if size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "particles"))
        group, particles, rank = mesh["data"], mesh["particles"], rank // 2
    options = {} if size < 4 else {"particle_group": particles}
    sampler = ImportanceSampler(model, exact_guide, 20, chunk_size=5, progress=False, **options)
    replicas = min(size, 2) if size == 4 else size
    split = {"num_replicas": replicas, "rank": rank}
    padded = DistributedSampler(range(N), shuffle=True, seed=3, **split)
    shuffled = DataLoader(TensorDataset(DATA), batch_size=2, sampler=padded)
    found = {"padded": sampler.log_marginal_dataset(shuffled, bound=MIWAE(M=2, K=3), data_group=group)}
    mine = range(rank, N, replicas)
    strided = DATA[mine].split(2)
    found["indices"] = sampler.log_marginal_dataset(strided, data_group=group, indices=mine)
    found["in order"] = sampler.log_marginal_dataset(
        DATA.tensor_split(replicas)[rank].split(2), data_group=group
    )
    some = DATA.split(2) if rank == 0 else []
    found["empty"] = sampler.log_marginal_dataset(some, data_group=group)
    if size == 3:
        annealed = AnnealedImportanceSampler(
            model, exact_guide, num_chains=3, num_temperatures=4, num_adaptation=4, progress=False
        )
        again = {"data_group": group, "indices": mine, "resume": f"{folder}/ais.pt"}
        found["annealed"] = annealed.log_marginal_dataset(strided, **again)
        resumed = annealed.log_marginal_dataset(strided, **again)
        assert torch.equal(resumed.values, found["annealed"].values)
    columns = "values", "monte_carlo_errors", "ess", "bounds"
    return {
        name: [None if (column := getattr(result, one)) is None else column.tolist() for one in columns]
        for name, result in found.items()
    }


@pytest.mark.parametrize("size", [3, 4])
def test_parts_of_a_data_set(size, tmp_path):
    """7 datapoints on 3 ranks, and on 2 times 2 that share the particles, too."""
    results = run_on_ranks(parts, size, size, str(tmp_path))
    truth = exact(DATA)
    for name in results[0]:
        values, errors, ess, bounds = results[0][name]
        assert torch.allclose(torch.tensor(values, dtype=truth.dtype), truth, rtol=1e-12), name
        assert max(errors) < 1e-6
        assert min(ess) == pytest.approx(20 if name != "annealed" else 3)
        assert all(result[name] == results[0][name] for result in results), name
        if bounds is not None:
            assert bounds == pytest.approx(values)
    if size == 3:
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["ais.rank0of3.pt", "ais.rank1of3.pt", "ais.rank2of3.pt"]


# ----------------------------------------------------------------------------------------------------
# Calibration
# ----------------------------------------------------------------------------------------------------


def many_evaluations(rank):
    """Of the same datapoints on both ranks, which begin at the same seed."""
    pyro.set_rng_seed(0)
    x = X.repeat(2)
    group = torch.distributed.group.WORLD
    sampler = ImportanceSampler(model, guide, 200, progress=False)
    mine = {"data_group": group, "indices": range(len(x) * rank, len(x) * (rank + 1))}
    by_data, by_particles = [], []
    for _ in range(80):
        result = sampler.log_marginal_dataset([x], **mine)
        by_data.append((result.mean, result.monte_carlo_error))
    compiled = ImportanceSampler(model, guide, 4, compile=True, progress=False)
    compiled.log_marginal_dataset([x], **mine)
    assert compiled._compiler._new  # at the second request it is compiled
    shared = ImportanceSampler(model, guide, 400, chunk_size=200, **world())
    for _ in range(8):
        value, error, _ = shared.evidence(X.repeat(50))
        by_particles.append(((value - exact(X.repeat(50))) / error).tolist())
    return by_data, by_particles


def test_errors_are_calibrated():
    """Deviations in units of their standard error have variance 1, within 4 standard errors of a variance."""
    (by_data, by_particles), other = run_on_ranks(many_evaluations, 2)
    assert (by_data, by_particles) == tuple(other)
    mean, error = torch.tensor(by_data, dtype=torch.float64).T
    for deviations in (mean - exact(X).mean()) / error, torch.tensor(by_particles).flatten():
        count = len(deviations)
        assert deviations.mean().abs() < 4 / count**0.5 + 0.1  # the bias, of order 1 / S
        assert deviations.var().item() == pytest.approx(1, abs=4 * (2 / count) ** 0.5)


# ----------------------------------------------------------------------------------------------------
# What goes wrong
# ----------------------------------------------------------------------------------------------------


def guide_that_fails(x):
    guide_that_fails.left -= 1
    if not guide_that_fails.left:
        raise KeyError("the guide")
    exact_guide(x)


def faults(rank):
    """What each rank hears of faults of rank 1 alone, by name; after each of them all go on together."""
    group = torch.distributed.group.WORLD
    is_wrong = rank == 1
    heard = {}

    def hear(name, call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except Exception as error:
            heard[name] = type(error).__name__, str(error)
        else:
            heard[name] = None

    def sampler(particles=20, guide=guide, **options):
        return ImportanceSampler(model, guide, particles, chunk_size=5, **{"progress": False, **options})

    shared = sampler(**world())
    other = X + is_wrong
    hear("other data", shared.log_marginal, other)
    hear("other data, samples", shared, other)
    hear("other shapes", shared.log_marginal, X[: 3 - is_wrong])
    hear("NaN", shared, torch.full_like(X, torch.nan) if is_wrong else X)
    hear("other numbers", sampler(20 + is_wrong, **world()).log_marginal, X)
    guide_that_fails.left = 5 if is_wrong else 1000  # by then the first particle is through
    hear("failing guide", sampler(guide=guide_that_fails, **world()).log_marginal, X)
    hear("fewer batches", shared.log_marginal_dataset, [X] * (2 - is_wrong))
    hear("failing loader", shared.log_marginal_dataset, map([X].__getitem__, [0, is_wrong]))

    alone = sampler()
    bad = torch.full_like(X, torch.nan) if is_wrong else X
    hear("NaN in a part", alone.log_marginal_dataset, [bad], data_group=group)
    hear("the same data", alone.log_marginal_dataset, [X[torch.randperm(3)]], data_group=group)
    hear("no data", alone.log_marginal_dataset, [], data_group=group)
    hear("other estimator", sampler(20 + is_wrong).log_marginal_dataset, [other], data_group=group)
    gap = range(4 * rank, 4 * rank + 3)
    hear("gap", alone.log_marginal_dataset, [X], data_group=group, indices=gap)
    hear("few indices", alone.log_marginal_dataset, [X], data_group=group, indices=range(3 - is_wrong))
    batches = iter([] if is_wrong else [X])  # as one that was read before
    last = range(3 * rank, 3 * rank + 3)
    hear("no batch for indices", alone.log_marginal_dataset, batches, data_group=group, indices=last)

    def own_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(float(rank))), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def own_guide(x):
        loc = pyro.param("locs of a part", x / 2)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5))

    own = ImportanceSampler(own_model, own_guide, 20, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hear("other parameters", own.log_marginal_dataset, [other], data_group=group)

    def loader(num_replicas=2, **options):
        split = DistributedSampler(DATA, num_replicas=num_replicas, rank=rank % num_replicas, **options)
        return DataLoader(DATA, batch_size=3, sampler=split)

    hear("wrong sampler", alone.log_marginal_dataset, loader(1), data_group=group)
    hear("drop_last", alone.log_marginal_dataset, loader(drop_last=True), data_group=group)
    hear("indices alone", alone.log_marginal_dataset, [X], indices=range(3))
    value = shared.log_marginal(X)
    assert (value - exact(X)).abs().max() < 1  # all is well again
    return heard


def test_faults_of_one_rank_stop_all():
    good, bad = run_on_ranks(faults, 2)
    for name, (kind, words) in {
        "other data": (
            "RankError",
            "rank(s) 1 give the same draw of the guide other log-weights than rank",
        ),
        "other data, samples": ("RankError", "rank(s) 1 give the same draw of the guide other log-weights"),
        "other shapes": ("RankError", "rank 1 has ('particle_group, the cells of the first particle', (2,)"),
        "NaN": (
            "RankError",
            "rank 1 raised ValueError",
        ),
        "other numbers": (
            "RankError",
            "rank 1 has ('particle_group, the sampler', 'ImportanceSampler(",
        ),
        "failing guide": ("RankError", "particle_group, the particles: rank 1 raised KeyError: 'the guide'"),
        "fewer batches": ("RankError", "rank 1 has ('particle_group, the next batch of the loader', 'none')"),
        "failing loader": ("RankError", "next batch of the loader: rank 1 raised IndexError"),
        "NaN in a part": ("RankError", "rank's part: rank 1 raised ValueError"),
        "the same data": ("ValueError", "Ranks 0, 1 of data_group= evaluated the same data"),
        "no data": ("ValueError", "The loader gave no batch"),
        "other estimator": ("ValueError", "the particles of part 0: 20; of part 1: 21"),
        "gap": (
            "ValueError",
            "Parts leave a gap: of the datapoints 0 to 6 there are 1 in none",
        ),
        "few indices": (
            "RankError",
            "rank 1 raised ValueError: The loader gave 3 datapoints, but there are",
        ),
        "no batch for indices": (
            "RankError",
            "rank 1 raised ValueError: The loader gave 0 datapoints, but there are indices of 3",
        ),
        "other parameters": ("UserWarning", "of parameter(s) 'locs of a part', 'loc' than rank 0"),
        "wrong sampler": (
            "ValueError",
            "DistributedSampler is of rank 0 among 1, but this is rank 0 among",
        ),
        "drop_last": (
            "ValueError",
            "The ranks evaluated 6 of the 7 datapoints: the Distrib",
        ),
        "indices alone": ("ValueError", "indices= tells apart what the ranks of data_group= evaluate"),
    }.items():
        assert good[name] is not None, name
        assert good[name][0] == kind, (name, good[name])
        assert words in good[name][1], (name, good[name])
        assert bad[name] is not None, name
        own = {"NaN": "ValueError", "NaN in a part": "ValueError", "few indices": "ValueError"}
        own["no batch for indices"] = "ValueError"
        own |= {"failing guide": "KeyError", "failing loader": "IndexError"}
        assert bad[name][0] == own.get(name, kind), (name, bad[name])


def test_two_of_three_ranks_with_the_same_data():
    loaders = [over_data._Fingerprint(batches) for batches in ([X, "a"], [X + 1, "a"], [X.flip(0), "a"])]
    marks = [list(loader) and loader.mark for loader in loaders]
    with pytest.raises(ValueError, match=r"Ranks 4, 8 of data_group= .* would count 2 times"):
        over_data._refuse_the_same(marks, SimpleNamespace(world_ranks=[4, 6, 8]))
    over_data._refuse_the_same([*marks[:2], None, None], SimpleNamespace(world_ranks=[4, 6, 8, 9]))


def one_dies(rank):
    the_group._GRACE = datetime.timedelta(seconds=1)
    sampler = ImportanceSampler(model, guide, 20, chunk_size=5, **world())
    sampler.log_marginal(X)
    if rank == 1:
        os._exit(1)
    sampler.log_marginal(X)


def test_a_rank_that_died_ends_the_others():
    (name, message), dead = run_on_ranks(one_dies, 2, timeout=5, expect_errors=True)
    assert dead is None
    assert name == "RankError"
    assert names_lost(message, 1), message


# ----------------------------------------------------------------------------------------------------
# Parts that were evaluated anywhere
# ----------------------------------------------------------------------------------------------------


def test_join():
    sampler = ImportanceSampler(model, guide, 50, progress=False)
    parts = [
        sampler.log_marginal_dataset([DATA[rows]], bound=MIWAE(M=2, K=3)) for rows in ([4, 0, 2], [1, 3])
    ]
    whole = LogMarginal.join(parts, [torch.tensor([4, 0, 2]), [1, 3]])
    for name in "values", "monte_carlo_errors", "ess", "bounds", "minus_kl_errors":
        first, second = (getattr(part, name) for part in parts)
        expected = torch.stack([first[1], second[0], first[2], second[1], first[0]])
        assert torch.equal(getattr(whole, name), expected), name
    assert whole.mean == pytest.approx((parts[0].mean * 3 + parts[1].mean * 2) / 5)
    variance = (3 * parts[0].monte_carlo_error) ** 2 + (2 * parts[1].monte_carlo_error) ** 2
    assert whole.monte_carlo_error == pytest.approx(variance**0.5 / 5)
    assert torch.equal(LogMarginal.join(parts).values, torch.cat([part.values for part in parts]))


def test_join_refuses_what_are_no_parts():
    sampler = ImportanceSampler(model, guide, 50, progress=False)
    part, plain = (
        sampler.log_marginal_dataset([DATA], bound=MIWAE(M=2, K=3)),
        sampler.log_marginal_dataset([X]),
    )
    corrected = ImportanceSampler(model, guide, 50, jackknife=True).log_marginal_dataset([X])
    for parts, indices, message in [
        ([], None, "no part"),
        ([part, plain], None, r"estimator of part 0: .*bound=MIWAE\(M=2, K=3\); of part 1: .*bound=None"),
        ([plain, corrected], None, r"jackknife=False.*; of part 1: .*jackknife=True"),
        ([plain, plain], [range(3)], "2 parts need indices for each of them, got those of 1"),
        ([plain, plain], [range(3), range(2)], "Part 1 has 3 values, but 2 indices"),
        ([plain, plain], [range(3), range(2, 5)], "overlap: 1 datapoint.*first 2"),
        ([plain, plain], [range(3), range(4, 7)], "gap: of the datapoints 0 to 6 there are 1 .*first 3"),
        ([plain, plain], [range(3), [3, 4, 10**12]], "first 5"),
        ([plain], [[-1, 0, 1]], "count the datapoints from 0, but -1"),
        ([plain], [[0.0, 1.0, 2.0]], "float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            LogMarginal.join(parts, indices)

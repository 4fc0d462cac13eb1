"""The deep Markov model: the truth by enumeration, masks by hand, and the smoke run."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import dmm
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from pyro_iw import ImportanceSampler


def test_the_forward_algorithm_sums_over_all_paths() -> None:
    music = dmm.Music()
    torch.testing.assert_close(music.transition.sum(1), torch.ones(dmm.CHORDS))
    x, lengths = music.play(3)
    lengths = torch.tensor([1, 3, 4])
    heard = Bernoulli(music.emission).log_prob(x.unsqueeze(-2)).sum(-1).double()
    for n, length in enumerate(lengths.tolist()):
        total = []
        for path in itertools.product(range(dmm.CHORDS), repeat=length):
            steps = itertools.pairwise(path)
            prior = math.prod([music.transition[a, b].item() for a, b in steps]) / dmm.CHORDS
            total.append(prior * sum(heard[n, t, c] for t, c in enumerate(path)).exp())
        truth = torch.stack(total).sum().log().item()
        assert music.log_prob(x, lengths)[n].item() == pytest.approx(truth, abs=1e-3)


def test_sequences_end_where_they_say() -> None:
    x, lengths = dmm.Music().play(500)
    assert x.shape == (500, dmm.LONGEST, dmm.KEYS)
    assert lengths.min() == dmm.SHORTEST
    assert lengths.max() == dmm.LONGEST
    for roll, length in zip(x, lengths, strict=True):
        assert not roll[length:].any()
        assert roll[:length].any(-1).float().mean() > 0.9


def test_reverse() -> None:
    x = torch.arange(8.0).reshape(2, 4, 1)
    turned = dmm.reverse(x, torch.tensor([3, 1]))
    assert turned.flatten().tolist() == [2, 1, 0, 3, 4, 5, 6, 7]


def test_the_guide_looks_ahead_to_the_end_and_no_further() -> None:
    net = dmm.DMM(latent=2, hidden=3)
    x = torch.rand(1, 5, dmm.KEYS, requires_grad=True)
    lengths = torch.tensor([4])
    dmm.reverse(net.reader(dmm.reverse(x, lengths))[0], lengths)[0, 1].sum().backward()
    assert x.grad[0].any(-1).tolist() == [False, True, True, True, False]


def by_hand(net: dmm.DMM, roll: Tensor, values: list[Tensor]) -> Tensor:
    """The log-weight of one particle for one sequence, without its padding."""
    states = net.reader(roll.flip(0)[None])[0][0].flip(0)
    total, z = torch.zeros(()), net.start
    for notes, state, value in zip(roll, states, values, strict=False):
        loc, scale = net.transition(z).chunk(2, -1)
        total = total + Normal(loc, F.softplus(scale)).log_prob(value).sum()
        loc, scale = net.proposal(torch.tanh(net.combiner(z) + state)).chunk(2, -1)
        total = total - Normal(loc, F.softplus(scale)).log_prob(value).sum()
        total = total + Bernoulli(logits=net.emission(value)).log_prob(notes).sum()
        z = value
    return total


@torch.no_grad()
def test_padding_counts_for_nothing() -> None:
    torch.manual_seed(2)
    net = dmm.DMM(latent=2, hidden=3)
    x = torch.bernoulli(torch.full((3, 5, dmm.KEYS), 0.4))  # garbage beyond the ends
    lengths = torch.tensor([2, 5, 1])
    samples = ImportanceSampler(net.model, net.guide, num_particles=4)(x, lengths)
    assert samples.plates == ("data",)
    assert len(samples.values) == 5
    for k, n in itertools.product(range(4), range(3)):
        values = [samples.values[f"z_{t}"][k, n] for t in range(5)]
        truth = by_hand(net, x[n, : lengths[n]], values)
        torch.testing.assert_close(samples.log_weights[k, n], truth, rtol=1e-4, atol=1e-4)


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = dmm.main(["--smoke", "--out", str(tmp_path)])
    bounds = list(results["bounds"].values())
    assert list(results["bounds"]) == [1, 2, 4, 8, 16]
    assert all(low <= high for low, high in itertools.pairwise(bounds))
    assert bounds[-1] < results["truth"]
    assert results["frequencies"] < results["truth"]
    assert all(1 <= ess <= 16 for ess in results["ess"])
    saved = json.loads((tmp_path / "dmm.json").read_text())
    assert saved["truth"] == results["truth"]
    assert (tmp_path / "dmm.png").read_bytes().startswith(b"\x89PNG")
    assert "the truth" in capsys.readouterr().out


@pytest.mark.slow
def test_it_learns_more_than_frequencies(tmp_path: Path) -> None:
    argv = [
        "--epochs",
        "40",
        "--train-size",
        "150",
        "-K",
        "4",
        "--num-particles",
        "64",
        "--out",
        str(tmp_path),
    ]
    results = dmm.main(argv)
    assert results["frequencies"] + 0.5 < results["bounds"][64] < results["truth"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--latent", "0"], "--latent: must be at least 1"), (["--loss", "vimco"], "invalid choice")],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dmm.main([*argv, "--smoke"])
    assert message in capsys.readouterr().err


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        dmm.main(["--smoke", "--out", str(tmp_path / "file")])

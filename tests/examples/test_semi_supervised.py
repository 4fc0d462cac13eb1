"""The semi-supervised VAE: sums over classes written out by hand, the split, and the smoke run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import semi_supervised
import torch
from torch.distributions import Bernoulli, Normal

from pyro_iw import ImportanceSampler
from shared import datasets

CLASSES = semi_supervised.CLASSES


def small() -> semi_supervised.ClassVAE:
    torch.manual_seed(1)
    vae = semi_supervised.ClassVAE(pixels=6, latent=2, hidden=5)
    with torch.no_grad():
        vae.log_scales.uniform_(-0.5, 0.5)
    return vae


def test_unknown_classes_are_summed_out_and_known_ones_are_not() -> None:
    vae, x = small(), torch.bernoulli(torch.full((4, 6), 0.5))
    labels, known = torch.tensor([3, 0, 7, 0]), torch.tensor([True, False, True, False])
    samples = ImportanceSampler(vae.model, vae.guide, num_particles=5)(x, labels, known)
    assert samples.plates == ("data",)
    assert list(samples.values) == ["z"]
    with torch.no_grad():
        loc, scale = vae.encoder(x)
        for k in range(5):
            for n in range(4):
                z = samples.values["z"][k, n]
                terms = [
                    Normal(vae.centres[c], vae.log_scales[c].exp()).log_prob(z).sum() - math.log(CLASSES)
                    for c in range(CLASSES)
                ]
                prior = terms[labels[n]] if known[n] else torch.stack(terms).logsumexp(0)
                pixels = Bernoulli(logits=vae.decoder(z)).log_prob(x[n]).sum()
                truth = prior + pixels - Normal(loc[n], scale[n]).log_prob(z).sum()
                torch.testing.assert_close(samples.log_weights[k, n], truth, rtol=1e-4, atol=1e-4)


def test_classes_by_bayes() -> None:
    vae, z = small(), torch.randn(4, 3, 2)
    with torch.no_grad():
        densities = torch.stack(
            [
                Normal(vae.centres[c], vae.log_scales[c].exp()).log_prob(z).sum(-1).exp()
                for c in range(CLASSES)
            ],
            -1,
        )
        torch.testing.assert_close(vae.classes(z), densities / densities.sum(-1, keepdim=True))


def test_probabilities_by_quadrature() -> None:
    """p(c | x) and p(x) on a grid over the plane of z."""
    vae, x = small(), torch.bernoulli(torch.full((3, 6), 0.5))
    with torch.no_grad():
        vae.encoder.log_scale[0].bias.fill_(0.9)  # wide enough a proposal for any posterior
        axis = torch.linspace(-8, 8, 301)
        z = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
        prior = vae.prior(torch.arange(CLASSES)).log_prob(z[:, None]).double() - math.log(CLASSES)
        pixels = Bernoulli(logits=vae.decoder(z)[:, None]).log_prob(x).sum(-1).double()
        log_joint = (prior[:, None] + pixels[..., None]).logsumexp(0) + 2 * math.log(axis[1] - axis[0])
    probabilities, log_p = semi_supervised.judge(vae, x, 20_000)
    torch.testing.assert_close(probabilities.double(), log_joint.softmax(-1), rtol=0, atol=0.03)
    torch.testing.assert_close(log_p.double(), log_joint.logsumexp(-1), rtol=0, atol=0.05)


def test_split() -> None:
    data = datasets.load("digits")
    (x, labels, known), labelled = semi_supervised.split(data, labels=50, unlabelled=800)
    assert x.shape == (1600, 64)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert int(known.sum()) == 800
    assert labels[~known].unique().tolist() == [0]  # no label leaks
    assert labels[known].bincount().tolist() == [80] * CLASSES
    assert len(labelled[0]) == 800
    assert bool(labelled[2].all())
    # A labelled image comes 16 times, each time with other bits of the same probabilities.
    once, again = labelled[0][:50], labelled[0][50:100]
    assert torch.equal(labelled[1][:50], labelled[1][50:100])
    assert 0.02 < (once != again).float().mean() < 0.3


def test_split_with_all_labels() -> None:
    (x, _, known), labelled = semi_supervised.split(datasets.load("digits"), labels=5000, unlabelled=800)
    assert len(x) == len(labelled[0]) == 1500
    assert bool(known.all())


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = semi_supervised.main(["--smoke", "--out", str(tmp_path)])
    names = ["labels alone, 1", "labels alone, 20", "with unlabelled, 1", "with unlabelled, 20"]
    assert list(results["methods"]) == ["logistic regression", *(f"VAE, {name}" for name in names)]
    for found in results["methods"].values():
        assert 0 <= found["accuracy"] <= 1
        assert found.get("log_p", -1) < 0
    confusion = torch.tensor(results["confusion"])
    assert confusion.shape == (10, 10)
    assert confusion.sum() == 20
    last = results["methods"]["VAE, with unlabelled, 20"]["accuracy"]
    assert confusion.diagonal().sum() / 20 == pytest.approx(last)
    saved = json.loads((tmp_path / "semi_supervised.json").read_text())
    assert saved["methods"] == results["methods"]
    assert (tmp_path / "semi_supervised.png").read_bytes().startswith(b"\x89PNG")
    assert "with unlabelled" in capsys.readouterr().out
    left = semi_supervised.draw(results).axes[0]
    assert left.get_ylabel() == "class"
    assert [tick.get_text() for tick in left.get_yticklabels()] == [str(c) for c in range(10)]


@pytest.mark.slow
def test_it_learns_classes(tmp_path: Path) -> None:
    methods = semi_supervised.main(["--epochs", "6", "--out", str(tmp_path)])["methods"]
    weighted = methods["VAE, with unlabelled, 200"]
    assert weighted["accuracy"] > 0.55  # by chance: 0.1
    assert weighted["accuracy"] > methods["VAE, with unlabelled, 1"]["accuracy"]
    assert weighted["log_p"] > methods["VAE, labels alone, 200"]["log_p"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--labels", "9"], "--labels: one for each of the 10 classes"),
        (["--unlabelled", "0"], "--unlabelled: must be at least 1"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        semi_supervised.main([*argv, "--smoke"])
    assert message in capsys.readouterr().err


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        semi_supervised.main(["--smoke", "--out", str(tmp_path / "file")])

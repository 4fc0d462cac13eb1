"""Results and tables of the adversarial autoencoders' example, against loops and scikit-learn."""

from __future__ import annotations

import math
from collections import Counter

import aae
import numpy as np
import pyro.distributions as dist
import pytest
import torch

from shared.aae import evaluation
from shared.aae.networks import LatentAAE
from shared.aae.priors import Gaussian, Mixture


def test_cluster_labels_against_loops() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 6)), rng.integers(0, 4, 200)
    logits[:, 5] -= 100  # a head that nobody chooses
    majority, confident = evaluation.cluster_labels(torch.tensor(logits), torch.tensor(labels))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for head in range(5):
        votes = Counter(labels[probabilities.argmax(1) == head].tolist())
        assert votes[majority[head].item()] == max(votes.values())
        assert confident[head] == labels[probabilities[:, head].argmax()]
    assert majority[5] == -1


def test_most_confident_where_single_precision_is_certain() -> None:
    logits = torch.tensor([[40.0, 0.0], [60.0, 0.0], [-30.0, 0.0], [-20.0, 0.0]])
    assert ((logits / 2).softmax(-1)[:2, 0] == 1).all()
    _, confident = evaluation.cluster_labels(logits / 2, torch.arange(4))
    assert confident.tolist() == [1, 2]


def test_cluster_results() -> None:
    logits = torch.eye(3)[[0, 0, 0, 1, 1]] * torch.tensor([1.0, 1.0, 3.0, 2.0, 1.0])[:, None]
    labels = torch.tensor([4, 4, 7, 5, 5])
    heldout = torch.eye(3)[[0, 0, 1, 1, 2]]
    truth = torch.tensor([4, 7, 5, 5, 4])
    # By majority the heads are 4, 5, nothing; the most confident of head 0 is a 7, of head 2 it is a 4.
    found = evaluation.cluster_results(logits, labels, heldout, truth)
    assert found["error_majority"] == pytest.approx(2 / 5)
    assert found["clusters_used"] == 2
    assert found["error_most_confident"] == pytest.approx(1 / 5)


def test_neighbours_against_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    codes, heldout = rng.normal(size=(300, 2)), rng.normal(size=(1500, 2))
    labels, truth = ((x[:, 0] > 0) + 2 * (x[:, 1] > 0.3) for x in (codes, heldout))
    predicted = KNeighborsClassifier(5).fit(codes, labels).predict(heldout)
    expected = (predicted != truth).mean()
    assert 0.01 < expected < 0.2
    tensors = map(torch.tensor, (codes, labels, heldout, truth))
    assert evaluation.neighbour_error(*tensors) == pytest.approx(expected)


def test_reconstruction_is_the_density_of_images() -> None:
    pair = LatentAAE(6, Gaussian(2), hidden=4).eval()
    x = torch.rand(1200, 6)
    with torch.no_grad():
        means = pair.images(pair.encoder(x))
        found = evaluation.reconstruction(pair, x)
    log_p = dist.Normal(means, 0.2).log_prob(x).sum(-1).mean()
    assert found["reconstruction"] == pytest.approx(-log_p.item(), rel=1e-5)
    assert found["pixel_error"] == pytest.approx((means - x).square().mean().sqrt().item(), rel=1e-5)


def test_parzen_results_against_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth by the validation images alone, the result of the held-out ones alone."""
    from sklearn.neighbors import KernelDensity

    pair = LatentAAE(6, Mixture(), hidden=4).eval()
    validation, heldout = torch.rand(30, 6), 0.3 + 0.1 * torch.rand(50, 6)
    drawn = []
    draws = evaluation.prior_draws
    monkeypatch.setattr(evaluation, "prior_draws", lambda *args: drawn.append(draws(*args)) or drawn[-1])
    with torch.no_grad():
        found = evaluation.parzen_results(pair, 1100, validation, heldout)
        samples = pair.images(drawn[0]).numpy()
    assert samples.shape == (1100, 6)
    best = max(
        evaluation.parzen.BANDWIDTHS,
        key=lambda sigma: KernelDensity(bandwidth=sigma).fit(samples).score(validation.numpy()),
    )
    values = KernelDensity(bandwidth=best).fit(samples).score_samples(heldout.numpy())
    assert found["parzen_bandwidth"] == best
    assert found["parzen"] == pytest.approx(values.mean(), rel=1e-4)
    assert found["parzen_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=1e-3)


def test_codes_that_fit_and_codes_that_do_not() -> None:
    pair = LatentAAE(2, Gaussian(2), hidden=4).eval()
    x = torch.randn(1000, 2)
    with torch.no_grad():
        pair.encoder.forward = lambda x: x  # type: ignore[method-assign]
        fits = evaluation.fit_of_codes(pair, x)
        misses = evaluation.fit_of_codes(pair, x + 1.0)
    # 1000 held-out draws; the best classifier of two normals √2 apart is right with probability Φ(√2 / 2).
    assert fits["two_sample_error"] == pytest.approx(0.5 / math.sqrt(1000))
    assert fits["two_sample_accuracy"] == pytest.approx(0.5, abs=4 * fits["two_sample_error"])
    assert misses["two_sample_accuracy"] == pytest.approx(0.760, abs=4 * misses["two_sample_error"])


@pytest.mark.parametrize("mode", [["steered"], ["semi-supervised"], ["clustering"], ["reduction"]])
def test_evaluation_is_of_held_out_images_in_eval_mode(mode: list[str]) -> None:
    argv = ["--mode", *mode, "--hidden", "32", "--train-size", "300", "--test-size", "100"]
    args = aae.parse_args(argv)
    args.labels = args.labels and 50
    data = aae.load_data(args, 0)
    pair = aae.make_pair(args, (8, 8)).train()
    before = torch.random.get_rng_state()
    found = evaluation.evaluate(pair, data, args.mode, parzen_samples=10, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    x, truth = data.heldout, data.heldout_labels
    # By the modules themselves: the noise of a pair in train mode would be seen here.
    pair.eval()
    with torch.no_grad():
        z, h = pair.encoder.code(pair.encoder.trunk(x)), pair.encoder.trunk(x)
        if mode == ["steered"]:
            chosen = pair.prior.nearest(z)
            assert found["error"] == pytest.approx((chosen != truth).double().mean().item())
            code = z
        else:
            logits = pair.encoder.heads(h)
            code = pair.decoder.code(logits.softmax(-1), z)
        if mode == ["semi-supervised"]:
            assert found["error"] == pytest.approx((logits.argmax(-1) != truth).double().mean().item())
        if "error_majority" in found:
            known = pair.encoder.heads(pair.encoder.trunk(data.images))
            expected = evaluation.cluster_results(known, data.labels, logits, truth)
            assert {key: found[key] for key in expected} == expected
        log_p = dist.Normal(pair.images(code), 0.2).log_prob(x).sum(-1).mean()
    assert found["reconstruction"] == pytest.approx(-log_p.item(), rel=1e-4)
    assert ("neighbour_error" in found) == (mode == ["reduction"])


def test_what_a_style_still_holds_of_the_class() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    argv = ["--mode", "supervised", "--hidden", "16", "--train-size", "300", "--test-size", "100"]
    args = aae.parse_args(argv)
    data = aae.load_data(args, 0)
    pair = aae.make_pair(args, data.shape)
    found = evaluation.evaluate(pair, data, args.mode, parzen_samples=10, seed=0)
    pair.eval()
    with torch.no_grad():
        styles, z = (pair.encoder(x) for x in (data.images, data.heldout))
        told = torch.cat([torch.eye(10)[data.heldout_labels], z], 1)
        log_p = dist.Normal(pair.images(told), 0.2).log_prob(data.heldout).sum(-1).mean()
    predicted = KNeighborsClassifier(5).fit(styles.numpy(), data.labels.numpy()).predict(z.numpy())
    assert found["style_error"] == pytest.approx((predicted != data.heldout_labels.numpy()).mean(), abs=0.011)
    assert found["reconstruction"] == pytest.approx(-log_p.item(), rel=1e-4)
    assert "error" not in found


def test_summary() -> None:
    runs = [{"a": 1.0, "b": 2}, {"a": 4.0, "b": 2}, {"a": 1.0, "b": 2}]
    summary = evaluation.summarise(runs)
    assert summary["a"]["mean"] == pytest.approx(2)
    assert summary["a"]["standard_error"] == pytest.approx(np.std([1, 4, 1], ddof=1) / math.sqrt(3))
    assert summary["b"] == {"mean": 2, "standard_error": 0}
    assert evaluation.summarise(runs[:1]) == {"a": {"mean": 1}, "b": {"mean": 2}}


def test_table_of_one_run_has_the_numbers_own_errors() -> None:
    results = {"two_sample_accuracy": 0.49712, "two_sample_error": 0.029, "clusters_used": 16}
    results |= {"reconstruction": -28.44, "error": 0.0241}
    assert evaluation.table(evaluation.summarise([results])).splitlines() == [
        "classification error                       2.4 %",
        "clusters used                              16",
        "reconstruction, −log p(x | code)           −28.4 nats per image",
        "two-sample accuracy                        0.497 ± 0.029",
    ]


def test_table_of_several_runs_has_their_errors() -> None:
    results = {
        "two_sample_accuracy": 0.4,
        "two_sample_error": 0.2,
        "clusters_used": 16,
        "parzen_samples": 100,
    }
    other = {"two_sample_accuracy": 0.6, "two_sample_error": 0.2, "clusters_used": 15, "parzen_samples": 100}
    results["error_difference"], other["error_difference"] = -0.05, -0.03
    assert evaluation.table(evaluation.summarise([results, other])).splitlines() == [
        "difference of the two                      −4.0 ± 1.0 percentage points",
        "clusters used                              15.5 ± 0.5",
        "draws for the windows                      100",
        "two-sample accuracy                        0.500 ± 0.100",
    ]

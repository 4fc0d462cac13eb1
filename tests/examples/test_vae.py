"""The examples run at smoke size, read every file format they claim to, and evaluate correctly."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import checkpoint
import datasets
import demo
import evaluate
import numpy as np
import options
import pyro
import pytest
import torch
import vae
from PIL import Image

from pyro_iw import IWAE_ELBO, ImportanceSampler

PICTURES = ("samples.png", "reconstructions.png", "latents.png", "learning_curve.png")


@pytest.fixture(autouse=True)
def _clean_pyro() -> None:
    pyro.clear_param_store()


def finite(numbers: dict) -> bool:
    return all(math.isfinite(value) for value in numbers.values())


# Data sets


def mnist_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "train_images": rng.integers(0, 256, (30, 28, 28), dtype=np.uint8),
        "train_labels": rng.integers(0, 10, 30, dtype=np.uint8),
        "test_images": rng.integers(0, 256, (9, 28, 28), dtype=np.uint8),
        "test_labels": rng.integers(0, 10, 9, dtype=np.uint8),
    }


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def assert_holds(data: datasets.ImageData, arrays: dict[str, np.ndarray]) -> None:
    for part in ("train", "test"):
        images, labels = getattr(data, part), getattr(data, f"{part}_labels")
        assert images.dtype == torch.float32
        # Multiplied back, a byte divided by 255 has to be the byte itself.
        np.testing.assert_array_equal((images * 255).round().numpy(), arrays[f"{part}_images"])
        assert images.min() >= 0
        assert 0.9 < images.max() <= 1
        np.testing.assert_array_equal(labels.numpy(), arrays[f"{part}_labels"])
    assert not data.binary


def test_digits_are_split_once_and_for_all() -> None:
    from sklearn.datasets import load_digits

    data, again = datasets.load("digits"), datasets.load("digits")
    assert data.train.shape == (1500, 8, 8)
    assert data.test.shape == (297, 8, 8)
    assert data.image_shape == (8, 8)
    assert torch.equal(data.train, again.train)
    both = torch.cat([data.train, data.test]).flatten(1) * 16
    original = load_digits().data
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, original.tolist()))


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("mnist", "mnist"),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "fashion_mnist"),
        ("omniglot", "omniglot_28x28"),
    ],
)
def test_npz(name: str, stem: str, tmp_path: Path) -> None:
    arrays = mnist_arrays()
    np.savez(tmp_path / f"{stem}.npz", **arrays)
    assert_holds(datasets.load(name, tmp_path), arrays)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", ".")],
)
def test_idx_layout(name: str, folder: str, suffix: str, tmp_path: Path) -> None:
    arrays = mnist_arrays(1)
    for key, stem in datasets.IDX_STEMS.items():
        write_idx(tmp_path / folder / f"{stem}{suffix}", arrays[key])
    assert_holds(datasets.load(name, tmp_path), arrays)


def test_binarized_mnist_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    bits = {part: rng.integers(0, 2, (n, 784)) for part, n in (("train", 7), ("test", 5))}
    packed = {f"{part}_images": np.packbits(rows, axis=1) for part, rows in bits.items()}
    np.savez(tmp_path / "binarized_mnist.npz", **packed, valid_images=packed["test_images"])
    data = datasets.load("binarized-mnist", tmp_path)
    assert data.binary
    assert data.train_labels is None
    np.testing.assert_array_equal(data.train.flatten(1).numpy(), bits["train"])
    np.testing.assert_array_equal(data.test.flatten(1).numpy(), bits["test"])


def test_binarized_mnist_text(tmp_path: Path) -> None:
    bits = np.random.default_rng(3).integers(0, 2, (4, 784))
    for part in ("train", "test"):
        np.savetxt(tmp_path / f"binarized_mnist_{part}.amat", bits, fmt="%d")
    data = datasets.load("binarized-mnist", tmp_path)
    np.testing.assert_array_equal(data.train.flatten(1).numpy(), bits)

    (tmp_path / "binarized_mnist_test.amat").write_text("0 1 2\n")
    with pytest.raises(ValueError, match="784 zeros and ones"):
        datasets.load("binarized-mnist", tmp_path)


@pytest.mark.parametrize("name", [name for name in datasets.NAMES if name != "digits"])
def test_missing_files_say_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_download", lambda *_: (None, "not in a test"))
    with pytest.raises(FileNotFoundError, match="--data-dir") as caught:
        datasets.load(name, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)
    with pytest.raises(SystemExit, match="--data-dir"):
        vae.main(["--data", name, "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")])


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="digits"):
        datasets.load("imagenet")


def test_bad_idx_files(tmp_path: Path) -> None:
    labels = np.arange(4, dtype=np.uint8)
    path = tmp_path / "file"
    write_idx(path, labels)
    np.testing.assert_array_equal(datasets.read_idx(path, ndim=1), labels)
    with pytest.raises(ValueError, match="bad magic number 00000801, expected 00000803"):
        datasets.read_idx(path, ndim=3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="truncated"):
        datasets.read_idx(path, ndim=1)
    path = tmp_path / "labels.gz"
    for damaged in (gzip.compress(whole)[:-9], whole, gzip.compress(whole)[:12] + b"\xff" * 8):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"labels\.gz is no gzip file, or a damaged one"):
            datasets.read_idx(path, ndim=1)


def test_bad_npz_files(tmp_path: Path) -> None:
    arrays = mnist_arrays()
    path = tmp_path / "mnist.npz"
    np.savez(path, **{**arrays, "test_labels": arrays["test_labels"][1:]})
    with pytest.raises(ValueError, match="9 test images, but labels"):
        datasets.load("mnist", tmp_path)
    np.savez(path, **{**arrays, "train_images": arrays["train_images"] / 255})
    with pytest.raises(ValueError, match="should be uint8"):
        datasets.load("mnist", tmp_path)
    np.savez(path, **{**arrays, "test_images": arrays["test_images"][:, 1:]})
    with pytest.raises(ValueError, match="different sizes in training and test"):
        datasets.load("mnist", tmp_path)
    np.savez(
        path, **{**arrays, "test_images": arrays["test_images"][:0], "test_labels": arrays["test_labels"][:0]}
    )
    with pytest.raises(ValueError, match=r"test_images should be .* not empty"):
        datasets.load("mnist", tmp_path)
    np.savez(path, train_images=arrays["train_images"])
    with pytest.raises(ValueError, match="no array train_labels"):
        datasets.load("mnist", tmp_path)


def test_subset_is_shuffled_and_keeps_labels() -> None:
    rows = torch.arange(50.0)
    data = datasets.ImageData("mnist", rows.reshape(-1, 1, 1), rows.reshape(-1, 1, 1), rows.long(), None)
    part = data.subset(train_size=20, test_size=60)
    assert len(part.train) == 20
    assert len(part.test) == 50
    assert torch.equal(part.train.flatten().long(), part.train_labels)
    assert part.train_labels.max() >= 20
    assert part.train_labels.unique().numel() == 20


def test_binarize_has_the_right_mean() -> None:
    probabilities = torch.tensor([0.0, 0.2, 0.7, 1.0]).expand(20_000, 4)
    bits = datasets.binarize(probabilities, torch.Generator().manual_seed(0))
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    # Five standard errors of a mean of 20 000 bits.
    torch.testing.assert_close(bits.mean(0), probabilities[0], rtol=0, atol=5 * 0.5 / 20_000**0.5)


# The VAE


@pytest.mark.parametrize("loss", options.LOSSES)
def test_vae_smoke(loss: str, tmp_path: Path) -> None:
    argv = ["--loss", loss, "-M", "3", "-K", "4", "--smoke", "--out", str(tmp_path)]
    metrics = vae.main(argv)
    assert finite(metrics["results"])
    assert all(finite(record) for record in metrics["history"])
    assert 0 <= metrics["results"]["active_units"] <= 50
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    for name in PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    saved = torch.load(tmp_path / "vae.pt")
    assert saved["settings"] == metrics["settings"]
    again = vae.VAE(64)
    again.load_state_dict(saved["state_dict"])

    # The decoder's bias must have moved away from where it started: the training has trained.
    images = datasets.load("digits").subset(100, 40).train.flatten(1)
    start = images.mean(0).clamp(0.001, 0.999).logit()
    assert not torch.equal(again.decoder[-1].bias, start)


@pytest.mark.parametrize("estimator", options.ESTIMATORS)
def test_vae_with_every_estimator(estimator: str, tmp_path: Path) -> None:
    metrics = vae.main(["--smoke", "--estimator", estimator, "--out", str(tmp_path)])
    assert metrics["settings"]["estimator"] == estimator
    assert math.isfinite(metrics["results"]["heldout_nll"])


@pytest.mark.parametrize("loss", options.LOSSES)
def test_every_loss_spends_the_same_budget(loss: str) -> None:
    network = vae.VAE(6, latent=2, hidden=3)
    particles = options.make_loss(loss, M=3, K=5).particles(network.model, network.guide, torch.ones(4, 6))
    assert particles.log_weights.shape == (15, 4)


@pytest.mark.parametrize(
    ("loss", "bound"),
    [
        ("elbo", lambda w: w.mean(0)),
        ("iwae", lambda w: w.exp().mean(0).log()),
        ("miwae", lambda w: w.reshape(3, 5, -1).exp().mean(1).log().mean(0)),
        ("ciwae", lambda w: 0.2 * w.mean(0) + 0.8 * w.exp().mean(0).log()),
        ("vr", lambda w: (0.3 * w).exp().mean(0).log() / 0.3),
        # Partitions at β = 0 and 0.025: the mean of w, and that under its 0.025th power.
        ("tvo", lambda w: 0.025 * w.mean(0) + 0.975 * ((0.025 * w).softmax(0) * w).sum(0)),
    ],
)
def test_losses_are_what_their_names_say(loss: str, bound: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    network = vae.VAE(6, latent=2, hidden=3).double()
    images = torch.bernoulli(torch.full((4, 6), 0.5, dtype=torch.float64))
    elbo = options.make_loss(loss, M=3, K=5, beta=0.2, alpha=0.7, partitions=2)
    torch.manual_seed(1)
    value = -elbo.loss(network.model, network.guide, images)
    torch.manual_seed(1)
    weights = elbo.particles(network.model, network.guide, images).log_weights.detach()
    assert weights.std() > 0.05
    assert value == pytest.approx(bound(weights).sum().item(), rel=1e-9)


def test_piwae_gets_m_and_k_the_right_way_round() -> None:
    bound = options.make_loss("piwae", M=3, K=5).bound
    assert (bound.M, bound.K) == (3, 5)


def test_two_latent_dimensions_have_a_manifold(tmp_path: Path) -> None:
    vae.main(["--smoke", "--latent", "2", "--out", str(tmp_path)])
    assert (tmp_path / "manifold.png").read_bytes().startswith(b"\x89PNG")
    assert evaluate.load_vae(tmp_path)[0].latent == 2


def test_damaged_model(tmp_path: Path) -> None:
    vae.main(["--smoke", "--out", str(tmp_path)])
    path = tmp_path / "vae.pt"
    content = bytearray(path.read_bytes())
    weights = checkpoint.read_torch(path)["state_dict"]["decoder.0.weight"]
    content[content.index(weights.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"vae\.pt is no model saved by .*checksum"):
        evaluate.load_vae(tmp_path)


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        vae.main(["--smoke", "--out", str(tmp_path / "file")])


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "one bit"])
def test_damaged_data(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    np.savez(path, **mnist_arrays())
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    damaged = {"truncated": content[:-100], "empty": b"", "text": b"no images\n", "one bit": content}
    path.write_bytes(damaged[kind])
    with pytest.raises(SystemExit, match=r"error: .*mnist\.npz"):
        vae.main(["--smoke", "--data", "mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vae, "train", interrupt)
    with pytest.raises(SystemExit) as caught:
        vae.main(["--smoke", "--out", str(tmp_path)])
    assert caught.value.code == 130
    assert "interrupted: nothing is saved" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_says_defaults_once() -> None:
    parser = options.new_parser("First.\n\nSecond.")
    parser.add_argument("--size", default=3, help="a number")
    parser.add_argument("--other", help="by mode (default: 1 or 2)")
    parser.add_argument("--none", help="no default")
    text = parser.format_help()
    assert "First." in text
    assert "Second" not in text
    assert "a number (default: 3)" in text
    assert text.count("default:") == 2


def test_vae_is_repeatable_and_evaluation_leaves_training_alone(tmp_path: Path) -> None:
    def history(name: str, extra: dict) -> list[float]:
        args = vae.parse_args(["--smoke", "-M", "2", "-K", "2", "--out", str(tmp_path / name)])
        args.epochs = 2
        return [record["train_bound"] for record in vae.run(args, extra)["history"]]

    first = history("a", {})
    assert history("b", {}) == first
    assert history("c", {"heldout_iwae": IWAE_ELBO(K=4)}) == first


def test_grey_images_are_binarised_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training sees bits alone, and other bits of the same images in every epoch."""
    seen = []
    guide = vae.VAE.guide
    monkeypatch.setattr(vae.VAE, "guide", lambda self, x: (seen.append(x.clone()), guide(self, x)))
    argv = ["-M", "1", "-K", "1", "--epochs", "2", "--train-size", "30", "--test-size", "5"]
    argv += ["--batch-size", "30", "--nll-particles", "1", "--out", str(tmp_path)]
    vae.main(argv)
    assert {value for x in seen for value in x.unique().tolist()} == {0.0, 1.0}
    # The first batch is seen twice: the pair is new to the loss, which probes it.
    first, again, second = (x for x in seen if len(x) == 30)
    assert torch.equal(first, again)
    assert not torch.equal(first.sort(0).values, second.sort(0).values)
    # The five held-out images are drawn once.
    held_out = [x for x in seen if len(x) == 5]
    assert all(torch.equal(x, held_out[0]) for x in held_out)


@pytest.mark.parametrize(("draws", "size"), [(60, 8), (8, 8), (5, 5)])
def test_minus_kl_compares_bounds_of_the_same_draws(draws: int, size: int) -> None:
    network = vae.VAE(6, latent=2, hidden=3)
    images = (torch.rand(9, 6) < 0.5).float()
    loss = IWAE_ELBO(K=8)
    found = vae.evaluate(network, images, loss, nll_particles=draws, num_particles=8, seed=3)
    assert found["iwae_particles"] == size
    # The draws again, taken by hand in groups of 8.
    with vae.seeded(3, images.device):
        particles = ImportanceSampler(network.model, network.guide, draws).particles(images)
        log_w = torch.cat([part.log_weights for part in particles]).double()
    log_p = (log_w.logsumexp(0) - math.log(draws)).mean().item()
    groups = log_w[: draws // size * size].reshape(-1, size, 9)
    iwae = (groups.logsumexp(1) - math.log(size)).mean().item()
    assert found["heldout_nll"] == pytest.approx(-log_p, abs=1e-5)
    assert found["heldout_iwae_bound"] == pytest.approx(iwae, abs=1e-5)
    assert found["minus_kl"] == pytest.approx(iwae - log_p, abs=1e-5)
    assert (found["minus_kl_error"] == 0) == (draws == size)


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (-0.5812, 0.0231, "-0.581 ± 0.023"),
        (22.864, 0.31, "22.86 ± 0.31"),
        (1234.5, 42.0, "1234.50 ± 42.00"),
        (-0.02, 0.00012, "-0.02000 ± 0.00012"),
        (0.0, 0.0, "0.00 ± 0.00"),
        (-3.0, math.nan, "-3.00"),
    ],
)
def test_numbers_with_their_errors(value: float, error: float, expected: str) -> None:
    assert vae.plus_minus(value, error) == expected


def test_evaluation_is_seeded() -> None:
    network = vae.VAE(6, latent=2, hidden=3)
    images = torch.ones(4, 6)
    loss = IWAE_ELBO(K=2)

    def both(seed: int) -> tuple[float, list[float]]:
        log_p = vae.log_marginal(network, images, 5, seed=seed)
        return vae.mean_bound(network, images, loss, seed=seed), log_p.tolist()

    torch.manual_seed(10)
    first = both(0)
    torch.manual_seed(11)
    assert both(0) == first
    assert both(1) != first


def test_vae_learns(tmp_path: Path) -> None:
    argv = ["-M", "2", "-K", "4", "--epochs", "4", "--train-size", "400", "--test-size", "100"]
    argv += ["--learning-rate", "3e-3", "--nll-particles", "20", "--out", str(tmp_path)]
    history = vae.main(argv)["history"]
    assert history[-1]["heldout_bound"] > history[0]["heldout_bound"] + 0.5
    assert history[-1]["train_bound"] > history[0]["train_bound"] + 0.5


def test_binary_images_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "binarize", lambda *_: pytest.fail("binarised twice"))
    rng = np.random.default_rng(0)
    packed = {f"{part}_images": rng.integers(0, 256, (25, 98), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "binarized_mnist.npz", **packed)
    argv = ["--data", "binarized-mnist", "--data-dir", str(tmp_path), "--smoke"]
    metrics = vae.main([*argv, "--out", str(tmp_path / "out")])
    assert finite(metrics["results"])
    assert metrics["settings"]["heldout_images"] == 25


@pytest.mark.parametrize("max_rows", [1, 70, 10_000])
def test_log_marginal_against_quadrature(max_rows: int) -> None:
    """A one-dimensional z, so that p(x) is an integral on a grid; ragged chunks included."""
    torch.manual_seed(0)
    network = vae.VAE(4, latent=1, hidden=5).double()
    with torch.no_grad():
        network.decoder[-1].weight.mul_(3)
    images = torch.bernoulli(torch.full((6, 4), 0.5, dtype=torch.float64))
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        probabilities = network.decoder(z).sigmoid()
    likelihood = torch.where(images[:, None] == 1, probabilities, 1 - probabilities).prod(-1)
    prior = (-(z[:, 0] ** 2) / 2).exp() / math.sqrt(2 * math.pi)
    exact = torch.trapezoid(likelihood * prior, z[:, 0]).log()

    # One particle a chunk; 36 chunks of 11 and a ragged one of 7; all in one chunk.
    num_particles = 43 if max_rows == 1 else 403
    estimates = vae.log_marginal(network, images, num_particles, seed=1, max_rows=max_rows)
    assert estimates.shape == (6,)
    # The guide is untrained but close to the prior, so weights vary mildly.
    torch.testing.assert_close(estimates, exact, rtol=0, atol=0.5 if max_rows == 1 else 0.2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-M", "0"], "-M: must be at least 1"),
        (["-K", "-2"], "-K: must be at least 1"),
        (["-K", "1.5"], "-K: invalid"),
        (["--beta", "1.2"], r"must lie in \[0, 1\]"),
        (["--nll-particles", "0"], "--nll-particles: must be at least 1"),
        (["--learning-rate", "nan"], "must be positive"),
        (["--data", "imagenet"], "invalid choice"),
        (["--loss", "vimco"], "invalid choice"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_bad_arguments(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        vae.main([*argv, "--smoke", "--out", str(tmp_path)])
    assert re.search(message, capsys.readouterr().err)


def test_unknown_loss() -> None:
    with pytest.raises(ValueError, match="miwae"):
        options.make_loss("vimco")


# The demo


def test_demo_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = demo.main(["--smoke", "--out", str(tmp_path)])
    assert set(metrics) == set(demo.LOSSES)
    for name in (*PICTURES, "comparison.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    lines = table.splitlines()
    assert len(lines) == 2 + len(demo.LOSSES)
    assert {line.count("|") for line in lines} == {1 + len(demo.HEADER)}
    results = json.loads((tmp_path / "comparison.json").read_text())
    assert all(finite(numbers) for numbers in results.values())
    assert all(demo.COMMON_BOUND in metrics[loss]["history"][0] for loss in demo.LOSSES)


def drawing(seed: int) -> np.ndarray:
    """Black strokes on white, 105 × 105, as Omniglot has them."""
    ink = np.random.default_rng(seed).random((15, 15)) < 0.2
    return np.where(np.kron(ink, np.ones((7, 7), bool)), 0, 255).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def area_mean(ink: np.ndarray) -> np.ndarray:
    """Means over 28 × 28 equal areas of 105 × 105 pixels: of 15 × 15 quarters of a pixel's side."""
    return np.kron(ink, np.ones((4, 4))).reshape(28, 15, 28, 15).mean((1, 3))


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("below", ["omniglot-py", "."])
def test_omniglot_as_torchvision_keeps_it(archived: bool, below: str, tmp_path: Path) -> None:
    seed = 0
    for stem, alphabets in {
        "images_background": ("Greek", "Latin"),
        "images_evaluation": ("Tengwar",),
    }.items():
        files = {}
        for alphabet in alphabets:
            for character in ("character01", "character02"):
                for drawer in (1, 2):
                    files[f"{stem}/{alphabet}/{character}/{seed:04d}_{drawer:02d}.png"] = png(drawing(seed))
                    seed += 1
        root = tmp_path / below
        root.mkdir(exist_ok=True)
        if archived:
            with zipfile.ZipFile(root / f"{stem}.zip", "w") as archive:
                for name, content in reversed(files.items()):
                    archive.writestr(name, content)
        else:
            for name, content in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
    data = datasets.load("omniglot", tmp_path)
    assert data.train.shape == (8, 28, 28)
    assert data.test.shape == (4, 28, 28)
    assert data.train_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert data.test_labels.tolist() == [4, 4, 5, 5]
    assert not data.binary
    for index, image in enumerate([*data.train, *data.test]):
        expected = area_mean((drawing(index) == 0).astype(float))
        np.testing.assert_allclose(image.numpy(), expected, atol=0.51 / 255)


def test_omniglot_that_is_damaged_or_half_there(tmp_path: Path) -> None:
    (tmp_path / "images_background").mkdir()
    with pytest.raises(FileNotFoundError, match="images_background and images_evaluation, as folders or"):
        datasets.load("omniglot", tmp_path)
    (tmp_path / "images_background").rmdir()
    (tmp_path / "images_background.zip").write_bytes(b"no archive")
    (tmp_path / "images_evaluation").mkdir()
    with pytest.raises(ValueError, match=r"images_background\.zip is no .zip file"):
        datasets.load("omniglot", tmp_path)
    (tmp_path / "images_background.zip").unlink()
    (tmp_path / "images_background" / "Greek" / "character01").mkdir(parents=True)
    drawn = tmp_path / "images_background" / "Greek" / "character01" / "0001_01.png"
    drawn.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0001_01\.png is no image"):
        datasets.load("omniglot", tmp_path)
    drawn.write_bytes(png(drawing(0)))
    with pytest.raises(ValueError, match=r"images_evaluation holds no alphabet/character/\*\.png"):
        datasets.load("omniglot", tmp_path)

"""Pictures of the adversarial autoencoders' example: what they show, and what they say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aae
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from shared import pictures
from shared.aae import pictures as aae_pictures


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those saved from now on, and drawn."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def noted(self: Figure, *args: Any, **keywords: Any) -> None:
        saved.append(self)
        savefig(self, *args, **keywords)

    monkeypatch.setattr(Figure, "savefig", noted)
    return saved


def test_losses_are_named_and_have_units(tmp_path: Path, figures: list[Figure]) -> None:
    history = [
        {"epoch": e, "seconds": 1.0, "reconstruction": 5.0, "discriminator_z": 1.3, "guide_z": 0.8}
        for e in (1.0, 2.0)
    ]
    aae_pictures.save_losses(history, tmp_path / "a.png")
    left, right = figures[0].axes
    assert left.get_ylabel() == "−log p(x | code) [nats per image]"
    assert (right.get_title(), right.get_ylabel()) == ("Discriminators and guide", "loss [nats per code]")
    for axes in (left, right):
        assert all(tick == round(tick) for tick in axes.get_xticks())
    levels = {
        line.get_label(): line.get_ydata()[0] for line in right.lines if "apart" in str(line.get_label())
    }
    assert levels == {
        "cannot be told apart:\ndiscriminator at 2 log 2": pytest.approx(1.38629, abs=1e-5),
        "cannot be told apart:\nguide at log 2": pytest.approx(0.69315, abs=1e-5),
    }
    aae_pictures.save_losses(
        [{**record, "supervised": 1.0, "penalty": 0.3} for record in history], tmp_path / "a.png"
    )
    left, right = figures[1].axes
    assert right.get_title() == "Discriminators, guide and labels"
    assert right.get_ylabel() == "loss [nats per code; labels: nats per image]"
    assert left.get_ylabel() == "[nats per image]"
    assert {line.get_label(): line.get_ydata()[0] for line in left.lines} == {
        "−log p(x | code)": 5.0,
        "beside it: penalty on heads too close": 0.3,
    }


def test_held_out_errors_have_axes_of_their_own(tmp_path: Path, figures: list[Figure]) -> None:
    history = [
        {"epoch": e, "seconds": 1.0, "reconstruction": 5.0, "guide_z": 0.8, "error": 0.1 / e}
        for e in (1.0, 2.0)
    ]
    aae_pictures.save_losses(history, tmp_path / "a.png")
    _, right, last = figures[0].axes
    assert last.get_ylabel() == "classification error [%]"
    assert last.lines[0].get_ydata() == pytest.approx([10, 5])
    assert "error" not in {line.get_label() for line in right.lines}


def test_plane_shows_all_heads(tmp_path: Path, figures: list[Figure]) -> None:
    codes, labels = torch.rand(20, 2), torch.arange(20) % 3
    centres = torch.tensor([[0.5, 0.5], [9.0, 0.2], [0.1, -4.0]])
    names = ["0", aae_pictures.EMPTY, "2"]
    aae_pictures.save_embedding(codes, labels, centres, names, "their classes", tmp_path / "a.png")
    axes = figures[0].axes[0]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < 0 < 9.0 < right < 11
    assert -6 < low < -4.0 < 1 < high
    assert axes.get_aspect() == 1
    assert (axes.get_xlabel()[-5:], axes.get_ylabel()[-5:]) == ("dim 1", "dim 2")
    assert "–: the head has none" in axes.get_title()
    assert {text.get_text() for text in axes.texts} == set(names)
    aae_pictures.save_embedding(codes, labels, centres, ["0", "1", "2"], "x", tmp_path / "a.png")
    assert "none" not in figures[1].axes[0].get_title()


def test_codes_of_one_dim_are_a_histogram(tmp_path: Path, figures: list[Figure]) -> None:
    codes, prior = torch.randn(300, 1), 2 * torch.randn(500, 1)
    labels = torch.arange(300) % 3
    aae_pictures.save_codes(codes, labels, prior, None, tmp_path / "a.png")
    limit = 1.05 * max(abs(codes).max().item(), abs(prior).max().item())
    for axes, values, parts in zip(figures[0].axes, (codes, prior), (3, 1), strict=True):
        bars = [patch.get_height() for patch in axes.patches]
        heights = np.sum(np.reshape(bars, (parts, -1)), 0)
        expected, _ = np.histogram(values.numpy(), 40, (-limit, limit), density=True)
        assert heights == pytest.approx(expected, abs=1e-6)
        assert axes.get_xlim() == pytest.approx((-limit, limit))
    colours = [patch.get_facecolor() for patch in figures[0].axes[0].patches[::40]]
    assert colours == [aae_pictures.COLOURS(c) for c in range(3)]


@pytest.mark.parametrize(("latent", "shown"), [(2, ""), (5, " (dims 1 and 2 of 5)")])
def test_codes_say_which_dims(latent: int, shown: str, tmp_path: Path, figures: list[Figure]) -> None:
    codes = torch.randn(20, latent)
    aae_pictures.save_codes(codes, torch.arange(20) % 3, codes, None, tmp_path / "a.png")
    titles = [axes.get_title() for axes in figures[0].axes]
    assert titles == [f"Codes of the held-out images{shown}", f"Draws from the prior{shown}"]
    assert [axes.get_xlabel() for axes in figures[0].axes] == ["code, dim 1"] * 2
    assert figures[0].axes[0].get_ylabel() == "code, dim 2"
    for axes in figures[0].axes:
        np.testing.assert_array_equal(axes.collections[0].get_offsets(), codes[:, :2].numpy())


def test_grid_in_colour_has_white_lines() -> None:
    images = torch.rand(3, 2, 4, 3)
    images[2] = torch.nan
    grid = pictures.tile(images, 2)
    assert grid.shape == (7, 11, 3)
    assert torch.equal(grid[1:3, 6:10], images[1])
    white = grid.clone()
    white[1:3, 1:5] = white[1:3, 6:10] = 1
    assert torch.equal(white, torch.ones_like(white))


@pytest.mark.parametrize(
    ("argv", "row", "column", "rows"),
    [
        (["--latent", "2"], "second coordinate", "first coordinate", 0),
        (["--prior", "swiss-roll"], "part of the prior", "position along the part", 10),
        (["--mode", "steered"], "class", "position along the part", 10),
    ],
)
def test_manifold_says_what_rows_and_columns_are(
    argv: list[str], row: str, column: str, rows: int, tmp_path: Path, figures: list[Figure]
) -> None:
    args = aae.parse_args([*argv, "--hidden", "8", "--train-size", "400", "--test-size", "24"])
    data = aae.load_data(args, 0)
    history = [{"epoch": 1.0, "seconds": 1.0, "reconstruction": 2.0, "guide_z": 3.0}]
    pair = aae.make_pair(args, (8, 8))
    aae_pictures.save_all(pair, data, history, plane=False, seed=0, folder=tmp_path)
    axes = figures[-1].axes[0]
    assert axes.get_ylabel().startswith(row)
    assert axes.get_xlabel().startswith(column)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [str(i) for i in range(rows)]


def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, int]]:
    """The images of every grid drawn from now on, and the columns they are laid out in."""
    grids: list[tuple[torch.Tensor, int]] = []
    original = pictures.tile

    def noted(images: torch.Tensor, columns: int) -> torch.Tensor:
        grids.append((images.clone(), columns))
        return original(images, columns)

    for module in (pictures, aae_pictures):
        monkeypatch.setattr(module, "tile", noted)
    return grids


def test_clusters_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Figure]) -> None:
    grids = captured(monkeypatch)
    heads, images = torch.rand(3, 2, 2), torch.rand(6, 2, 2)
    chosen = torch.tensor([2, 0, 2, 2, 0, 2])
    aae_pictures.save_clusters(heads, images, chosen, ["7", "none", "1"], tmp_path / "a.png", columns=3)
    rows = grids[0][0].reshape(3, grids[0][1], 2, 2)
    assert torch.equal(rows[:, 0], heads)
    assert rows[:, 1].isnan().all()
    assert torch.equal(rows[0, 2:4], images[[1, 4]])
    assert torch.equal(rows[2, 2:], images[[0, 2, 3]])  # the fourth has no place
    assert rows[1, 2:].isnan().all()
    axes = figures[0].axes[0]
    assert "first 3 held-out members" in axes.get_title()
    assert axes.get_ylabel() == "class by majority of the training images"
    aae_pictures.save_clusters(heads, images, chosen, ["7", "–", "1"], tmp_path / "a.png")
    assert "–: the head has none" in figures[1].axes[0].get_ylabel()


def test_a_style_a_row_and_a_class_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = captured(monkeypatch)
    args = aae.parse_args(["--mode", "semi-supervised", "--hidden", "8", "--test-size", "24"])
    data = aae.load_data(args, 0)
    pair = aae.make_pair(args, (8, 8))
    seen = []
    code = pair.decoder.code
    pair.decoder.code = lambda y, z: seen.append((y, z)) or code(y, z)  # type: ignore[method-assign]
    history = [{"epoch": 1.0, "seconds": 1.0, "reconstruction": 2.0, "guide_z": 3.0}]
    aae_pictures.save_all(pair, data, history, plane=False, seed=0, folder=tmp_path)
    grid, columns = grids[-1]
    assert columns == 10
    y, z = seen[-1]
    assert torch.equal(y, torch.eye(10).expand(10, 10, 10))
    assert torch.equal(z, z[:, :1].expand(10, 10, 3))
    with torch.no_grad():
        torch.testing.assert_close(grid.reshape(10, 10, 64)[2, 7], pair.images(code(y[2, 7], z[2, 7])))


def test_images_of_draws_and_of_the_manifold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = captured(monkeypatch)
    args = aae.parse_args(
        ["--prior", "swiss-roll", "--hidden", "8", "--train-size", "100", "--test-size", "24"]
    )
    data = aae.load_data(args, 0)
    pair = aae.make_pair(args, (8, 8))
    shown = []
    save_codes = aae_pictures.save_codes
    monkeypatch.setattr(aae_pictures, "save_codes", lambda *a: shown.append(a) or save_codes(*a))
    history = [{"epoch": 1.0, "seconds": 1.0, "reconstruction": 2.0, "guide_z": 3.0}]
    aae_pictures.save_all(pair, data, history, plane=False, seed=0, folder=tmp_path)
    codes, labels, draws, parts, _ = shown[0]
    assert parts is None
    assert torch.equal(labels, data.heldout_labels)
    with torch.no_grad():
        pair.eval()
        assert torch.equal(codes, pair.encoder(data.heldout))
        for (images, columns), latents, width in zip(
            grids[1:], (draws[:100], pair.prior.manifold(16)), (10, 16), strict=True
        ):
            assert columns == width
            torch.testing.assert_close(images.flatten(1), pair.images(latents))
    # Originals above their reconstructions, twelve a row.
    images = grids[0][0].flatten(1)
    assert torch.equal(images[:12], data.heldout[:12])
    with torch.no_grad():
        torch.testing.assert_close(images[12:24], pair.images(codes[:12]))

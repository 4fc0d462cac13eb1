"""The table of finished runs: paired by image and by seed, against sums by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import compare_runs
import deep_vae
import numpy as np
import pytest

from shared.deep.networks import Layer

TINY = [
    "--train-size",
    "30",
    "--test-size",
    "12",
    "--nll-particles",
    "5",
    "--epochs-scale",
    "0.0011",
    "-K",
    "2",
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_vae, "layer_widths", lambda layers: [Layer(6, 8), Layer(4, 5)][:layers])
    monkeypatch.setattr(deep_vae, "save_pictures", lambda *_: None)


def train(folder: Path, *more: str) -> str:
    deep_vae.main([*TINY, *more, "--out", str(folder)])
    return str(folder)


def log_p(folder: str) -> np.ndarray:
    with np.load(Path(folder) / "heldout.npz") as arrays:
        return arrays["log_p"].astype(float)


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elbo = train(tmp_path / "elbo", "--loss", "elbo")
    two = train(tmp_path / "two", "--loss", "miwae", "-M", "3", "--layers", "2")
    capsys.readouterr()
    lines = compare_runs.main([elbo, two, "--out", str(tmp_path / "out")])
    first, second = lines
    assert (first["difference"], first["error"]) == (0, 0)
    difference = log_p(elbo) - log_p(two)  # of the NLLs, hence the other way round
    assert second["difference"] == pytest.approx(difference.mean())
    n = len(difference)
    assert n == 12
    variance = ((difference - difference.mean()) ** 2).sum() / (n - 1)
    assert second["error"] == pytest.approx(math.sqrt(variance / n))
    assert second["nll"] == pytest.approx(-log_p(two).mean())
    metrics = json.loads((Path(two) / "metrics.json").read_text())
    for name in ("iwae_bound", "minus_kl", "ess", "active_units"):
        assert second[name] == metrics["results"][name]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == lines
    assert (tmp_path / "out" / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith(f"| ELBO(2) | {first['nll']:.2f} |  |")
    assert table[3].startswith(
        f"| MIWAE(3, 2), 2 layers | {second['nll']:.2f} | {second['difference']:+.2f} ± "
    )
    assert "\n".join(table[:4]) == (tmp_path / "out" / "comparison.md").read_text().rstrip()


def test_seeds_make_one_line(tmp_path: Path) -> None:
    elbo = [train(tmp_path / f"elbo-{i}", "--loss", "elbo", "--seed", str(i)) for i in range(3)]
    iwae = [train(tmp_path / f"iwae-{i}", "--loss", "iwae", "--seed", str(i)) for i in (2, 0, 1)]
    lines = compare_runs.main([*elbo, *iwae, "--epochs-only", "--out", str(tmp_path / "out")])
    assert [line["name"] for line in lines] == ["ELBO(2)", "IWAE(2)"]
    assert [line["seeds"] for line in lines] == [[0, 1, 2], [2, 0, 1]]
    means = [(log_p(elbo[i]) - log_p(iwae[(1, 2, 0)[i]])).mean() for i in range(3)]
    assert lines[1]["difference"] == pytest.approx(np.mean(means))
    assert lines[1]["error"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    one = train(tmp_path / "one")
    other_images = train(tmp_path / "images", "--test-size", "11")
    other_seed = train(tmp_path / "seed", "--seed", "1", "--loss", "elbo")

    def refused(message: str, *folders: str) -> None:
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            compare_runs.main([*folders, "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()

    refused("different images", one, other_images)
    refused("no seed in common", one, other_seed)
    refused("repeats .*one", one, one)
    refused("no finished run", one, str(tmp_path))
    path = Path(one) / "heldout.npz"
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    refused("no finished run", one)
    np.savez(path, log_p=log_p(other_seed))
    refused("of different runs", one)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"loss": "iwae"}, "IWAE(6)"),
        ({"loss": "ciwae", "beta": 0.25}, "CIWAE(6, β = 0.25)"),
        ({"loss": "vr", "alpha": -1.0}, "VR(6, α = -1)"),
        ({"loss": "piwae", "layers": 3}, "PIWAE(2, 3), 3 layers"),
        ({"loss": "elbo", "switch_to": "iwae"}, "elbo → IWAE(6)"),
        ({"loss": "iwae", "estimator": "dreg"}, "IWAE(6), dreg"),
    ],
)
def test_names(settings: dict[str, Any], name: str) -> None:
    settings = {"M": 2, "K": 3, "layers": 1, "estimator": "auto", "switch_to": None, **settings}
    assert compare_runs.Run(Path(), settings, {}, [], np.zeros(1)).name == name

"""How the examples end: smoke runs apart, one line for what goes wrong, what is saved when."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import demo
import eight_schools
import mk_grid
import pyro
import pyro.distributions as dist
import pytest
import torch
import vae
from pyro.infer import SVI, Trace_ELBO

from pyro_iw._support.progress import progress_bar
from shared import checkpoint, pictures, running
from shared.running import Diverged, in_one_line, step

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "folder"),
    [
        ("vae", "vae-digits-miwae"),
        ("conv_vae", "conv-vae-digits-miwae"),
        ("mk_grid", "mk-grid-digits"),
        ("snr", "snr"),
        ("eight_schools", "eight-schools"),
    ],
)
def test_a_smoke_run_writes_apart(module: str, folder: str) -> None:
    parse_args = importlib.import_module(module).parse_args
    assert parse_args([]).out == Path("results") / folder
    assert parse_args(["--smoke"]).out == Path("results/smoke") / folder
    assert parse_args(["--smoke", "--out", f"results/{folder}"]).out == Path("results") / folder


@pytest.mark.parametrize(
    ("module", "folder"),
    [
        ("two_roads", "two-roads"),
        ("dmm", "dmm"),
        ("flow_guide", "flow-guide"),
        ("regression", "regression"),
        ("missing_data", "missing-data"),
        ("pixel_vae", "pixel-vae"),
        ("semi_supervised", "semi-supervised"),
        ("demo", "demo"),
    ],
)
def test_so_do_those_that_parse_and_run_at_once(
    module: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example, seen = importlib.import_module(module), []

    def look(args, *_, **__):
        seen.append(args.out)

    monkeypatch.setattr(example, "run" if module == "demo" else "finish", look)
    for argv in ([], ["--smoke"], ["--smoke", "--out", f"results/{folder}"]):
        example.main(argv)
    assert seen == [Path("results") / folder, Path("results/smoke") / folder, Path("results") / folder]


@pytest.mark.parametrize("module", ["memory", "step_time", "time_to_nll"])
def test_so_do_benchmarks(module: str) -> None:
    parse_args = importlib.import_module(module).parse_args
    assert parse_args([]).out == Path("results/bench")
    assert parse_args(["--smoke"]).out == Path("results/smoke/bench")


def test_runs_of_other_settings_stop_the_grid_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mk_grid.main(["--smoke", "--seeds", "1", "--out", str(tmp_path)])
    runs = sorted((tmp_path / "runs").iterdir())
    runs[0].unlink()
    monkeypatch.setattr(mk_grid, "train_and_measure", lambda *_: pytest.fail("trained before it looked"))
    with pytest.raises(SystemExit, match=r"is a run with another .*: choose another --out"):
        mk_grid.main(
            ["--smoke", "--seeds", "1", "--epochs", "1", "--batch-size", "7", "--out", str(tmp_path)]
        )


@pytest.mark.parametrize("broken", ["save_samples", "evaluate"])
def test_the_model_is_saved_before_all_else(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    target = (pictures, "save_images") if broken == "save_samples" else (vae, "evaluate")
    monkeypatch.setattr(*target, full)
    with pytest.raises(SystemExit, match=r"error: .*No space left"):
        vae.main(["--smoke", "--out", str(tmp_path)])
    state = checkpoint.read_torch(tmp_path / "vae.pt")["state_dict"]
    assert "decoder.0.weight" in state
    assert (tmp_path / "metrics.json").exists() == (broken == "save_samples")


@pytest.mark.parametrize("rate", ["1e9", "1e4"])
def test_a_training_that_diverges(rate: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        vae.main(["--smoke", "--epochs", "1", "--learning-rate", rate, "--out", str(tmp_path)])
    message = str(caught.value)
    assert message.startswith("error: training diverged")
    assert message.endswith(f"Lower --learning-rate, which is {float(rate):g}.")
    assert "\n" not in message


def test_an_error_in_the_first_step_is_no_divergence() -> None:
    def model(x: torch.Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    pyro.clear_param_store()
    svi = SVI(model, lambda x: None, pyro.optim.SGD({"lr": 1e3}), loss=Trace_ELBO())
    with pytest.raises(ValueError, match="invalid values") as caught:
        step(svi, (torch.full((2,), torch.nan),), 1e3, 0)
    assert not isinstance(caught.value, Diverged)
    pyro.clear_param_store()
    step(svi, (torch.full((2,), 3.0),), 1e3, 0)
    pyro.param("scale").data.fill_(-1.0)
    with pytest.raises(Diverged, match=r"diverged after 1 steps \(Expected parameter scale"):
        step(svi, (torch.full((2,), 3.0),), 1e3, 1)


@pytest.fixture
def default_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    # A process that was started in the background may ignore it.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, interrupt)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("example", "part"), [(demo, "train_one"), (eight_schools, "run"), (mk_grid, "run")])
def test_a_signal_ends_in_one_line(
    example: object,
    part: str,
    signum: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(example, part, lambda *_, **__: os.kill(os.getpid(), signum))
    with pytest.raises(SystemExit) as caught:
        example.main(["--smoke", "--out", str(tmp_path)])
    assert caught.value.code == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("interrupted: ")


def test_second_signal_is_as_usual() -> None:
    # A process that was started in the background may ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with running.stop_signals() as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert received == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for example in (demo, eight_schools):
        with pytest.raises(SystemExit, match=r"error: .*file"):
            example.main(["--smoke", "--out", str(tmp_path / "file")])


def test_errors_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), in_one_line():
        1 / 0  # noqa: B018


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with running.progress_bar(100, "training") as bar:
        for _ in range(100):
            bar.set_postfix_str("bound", refresh=False)
            bar.update()
    assert bool(progress_bar(range(3), show=True).disable) == (not terminal)
    assert progress_bar(range(3), show=False).disable
    assert bool(stream.getvalue()) == terminal


@pytest.mark.slow
def test_a_log_file_has_no_bars(tmp_path: Path) -> None:
    command = [sys.executable, "examples/vae.py", "--smoke", "--epochs", "1", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""

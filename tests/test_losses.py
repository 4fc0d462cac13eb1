"""The losses' constructors: what help, completion and type checkers see, and what a typo says."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_iw import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, TVO_ELBO, VR_ELBO, ImportanceWeightedELBO
from pyro_iw.elbo import Keywords

LOSSES = {
    IWAE_ELBO: {"K": 2},
    MIWAE_ELBO: {"M": 2, "K": 3},
    CIWAE_ELBO: {"K": 2, "beta": 0.5},
    PIWAE_ELBO: {"M": 2, "K": 3},
    VR_ELBO: {"alpha": 0.5, "K": 3},
    TVO_ELBO: {"K": 3, "partitions": 2},
}


def keyword_only(kind: type) -> list[inspect.Parameter]:
    parameters = inspect.signature(kind).parameters.values()
    return [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def test_type_checkers_and_signature_know_the_same_keywords() -> None:
    base = inspect.signature(ImportanceWeightedELBO.__init__).parameters.values()
    given = {p.name: p.annotation for p in base if p.kind is p.KEYWORD_ONLY}
    assert given == {name: hint.__forward_arg__ for name, hint in Keywords.__annotations__.items()}


@pytest.mark.parametrize("kind", LOSSES)
def test_keywords_are_spelled_out(kind: type) -> None:
    assert list(inspect.signature(kind).parameters)[: len(LOSSES[kind])] == list(LOSSES[kind])
    assert keyword_only(kind) == keyword_only(ImportanceWeightedELBO)
    assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(kind).parameters.values())
    # They arrive.
    loss = kind(**LOSSES[kind], chunk_size=2, estimator="dreg")
    assert loss.chunk_size == 2
    assert loss.estimator == "dreg"


@pytest.mark.parametrize("kind", LOSSES)
def test_a_typo_names_the_class_and_what_was_meant(kind: type) -> None:
    with pytest.raises(
        TypeError, match=rf"{kind.__name__}\(\) got .* 'chunksize'. Did you mean 'chunk_size'\?"
    ):
        kind(**LOSSES[kind], chunksize=2)
    first = next(iter(LOSSES[kind]))
    with pytest.raises(TypeError, match=r"'num_particles'. The particles are counted by (M \* )?K\."):
        kind(**LOSSES[kind], num_particles=2)
    with pytest.raises(TypeError, match=rf"{kind.__name__}\(\) got .* 'xyz'. It takes {first}, .*compile"):
        kind(**LOSSES[kind], xyz=2)


@pytest.mark.slow
def test_type_checkers_see_a_typo(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(
        "from pyro_iw import IWAE_ELBO\n"
        "IWAE_ELBO(K=2, estimator='dreg')\n"
        "IWAE_ELBO(K=2, chunksize=3)\n"
        "IWAE_ELBO(K=2, chunk_size='three')\n"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--config-file=", str(script)]
    found = subprocess.run(
        [*command, "--ignore-missing-imports"], cwd=root, capture_output=True, text=True, check=False
    )
    assert 'script.py:3: error: Unexpected keyword argument "chunksize" for "IWAE_ELBO"' in found.stdout
    assert 'script.py:4: error: Argument "chunk_size" to "IWAE_ELBO" has incompatible type' in found.stdout
    assert "script.py:2" not in found.stdout

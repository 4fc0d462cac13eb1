"""Random pairs agree with a reference that runs one particle at a time, or are refused by name."""

import pytest
from fuzzing.__main__ import main
from fuzzing.checks import check

PAIRS, PARTS = 200, 8


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_random_pairs_agree_with_the_reference_or_are_refused_by_name(part):
    outcomes = [check(seed) for seed in range(part, PAIRS, PARTS)]
    failed = [line for outcome in outcomes for line in outcome.failed]
    assert not failed, "\n".join(failed)
    # So that it does not pass by refusing everything.
    agreed = sum(outcome.agreed for outcome in outcomes)
    others = sum(len(outcome.refused) + len(outcome.warned) for outcome in outcomes)
    assert agreed >= 0.6 * (agreed + others)


def test_one_pair_from_the_command_line(capsys):
    assert not main(["--seed", "1", "--jobs", "0"])
    assert "2 checks of 1 pairs" in capsys.readouterr().out

"""Guides that enumerate discrete sites: values and gradients against loops over values and particles."""

import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from helpers.enumerated import CASES, Masked, Upstream, gradients, hand_written, per_particle
from pyro_iw import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, TVO_ELBO, VR_ELBO

M, K = 2, 3
LOSSES = {
    "ELBO": lambda **kw: MIWAE_ELBO(M=M * K, K=1, **kw),
    "IWAE": lambda **kw: IWAE_ELBO(K=M * K, **kw),
    "MIWAE": lambda **kw: MIWAE_ELBO(M=M, K=K, **kw),
    "CIWAE": lambda **kw: CIWAE_ELBO(K=M * K, beta=0.3, **kw),
    "PIWAE": lambda **kw: PIWAE_ELBO(M=M, K=K, **kw),
    "VR": lambda **kw: VR_ELBO(alpha=0.3, K=M * K, **kw),
    "TVO": lambda **kw: TVO_ELBO(K=M * K, partitions=(0.0, 0.2, 0.7, 1.0), **kw),
}
RUNS = {
    "one_pass": ({}, [M * K]),
    "one_by_one": ({"vectorize_particles": False}, [None] * (M * K)),
    "chunks": ({"chunk_size": 4}, [4, 2]),
}


def assert_same(found, truth, case):
    value, grads, _ = found
    loss, theta, phi = truth
    assert value == pytest.approx(loss, rel=1e-9)
    for name, grad in {**theta, **phi}.items():
        if grad is None:
            assert grads[name] is None or not grads[name].any()
        else:
            torch.testing.assert_close(grads[name], grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_outside_the_logarithm(case, name, run):
    case, (keywords, sizes) = case(), RUNS[run]
    found = gradients(LOSSES[name](**keywords), case)
    draws = found[2][: len(found[2]) // 2] if run == "chunks" else found[2]
    noise = per_particle(draws, M * K, sizes)
    assert_same(found, hand_written(name, case, noise, M, K), case)


@pytest.mark.parametrize("case", [case for case in CASES if case is not Masked])
def test_one_particle_is_pyros_enumerated_elbo(case):
    """Pyro counts entries of a masked guide site once for each value, so that it is left out."""
    case = case()
    nesting = 1
    theirs = gradients(TraceEnum_ELBO(max_plate_nesting=nesting), case)
    ours = gradients(IWAE_ELBO(K=1), case)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case is not Masked])
def test_particles_outside_are_pyros_enumerated_elbo(case):
    case = case()
    theirs = TraceEnum_ELBO(max_plate_nesting=1, num_particles=5, vectorize_particles=True)
    theirs, ours = gradients(theirs, case), gradients(MIWAE_ELBO(M=5, K=1), case)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*is not trained")
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", [case for case in CASES if case is not Masked])
def test_inside_the_logarithm(case, name, run):
    case, (keywords, sizes) = case(), RUNS[run]
    found = gradients(LOSSES[name](stratified=True, **keywords), case)
    draws = found[2][: len(found[2]) // 2] if run == "chunks" else found[2]
    noise = per_particle(draws, M * K, sizes)
    assert_same(found, hand_written(name, case, noise, M, K, inside=True), case)


def test_where_one_density_is_for_all_particles():
    for case in CASES:
        case = case()
        gradients(IWAE_ELBO(K=4), case)
        values = IWAE_ELBO(K=4).particles(case.model, case.guide).values
        assert values.is_free == (not isinstance(case, Upstream))

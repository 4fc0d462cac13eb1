"""Processes that share a task: what they learn of one another, and that they stop together."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from helpers.ranks import run_on_ranks
from pyro_iw.ranks.group import Group, RankError


def gathers(rank):
    group = Group("particle_group", dist.group.WORLD)
    with group.meeting("a step") as brought:
        brought.append((2,))
    return group.gather(torch.tensor([rank, 10.0 * rank])).tolist()


def test_gathers_in_order_of_ranks():
    assert run_on_ranks(gathers, 4) == [[[0, 0], [1, 10], [2, 20], [3, 30]]] * 4


def one_fails(rank):
    group = Group("particle_group", dist.group.WORLD)
    for step in range(3):
        with group.meeting("a step"):
            if rank == 1 and step == 2:
                raise ValueError("site 'z' is NaN")


def test_one_that_fails_stops_all():
    first, second = run_on_ranks(one_fails, 2, expect_errors=True)
    assert second == ("ValueError", "site 'z' is NaN")
    assert first == ("RankError", "a step: rank 1 raised ValueError: site 'z' is NaN")


def other_shapes(rank):
    with Group("particle_group", dist.group.WORLD).meeting("a step") as brought:
        brought.append((8, 3 + rank))


def test_ranks_that_bring_other_things_stop_all():
    for name, message in run_on_ranks(other_shapes, 2, expect_errors=True):
        assert name == "RankError"
        assert "rank 0 has ('a step', (8, 3)); rank 1 has ('a step', (8, 4))" in message


def meshes(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "particles"))
    group = Group("particle_group", mesh["particles"])
    with pytest.raises(ValueError, match=r"2 dimensions. Pass one of them: mesh\['particles'\]"):
        Group("particle_group", mesh)
    return group.world_ranks, group.rank, group.gather(torch.tensor(rank)).tolist()


def test_one_dimension_of_a_mesh():
    got = run_on_ranks(meshes, 4)
    assert got == [([0, 1], 0, [0, 1]), ([0, 1], 1, [0, 1]), ([2, 3], 0, [2, 3]), ([2, 3], 1, [2, 3])]


def test_needs_processes_that_know_of_one_another():
    with pytest.raises(ValueError, match=r"Start the script by torchrun"):
        Group("particle_group", None)
    assert issubclass(RankError, RuntimeError)

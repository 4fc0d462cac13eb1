"""A function run on several processes at a time, which know of one another by torch.distributed (gloo)."""

import datetime
import multiprocessing
import os
import re
import tempfile
import traceback
from pathlib import Path

__all__ = ["names_lost", "run_on_ranks"]

_CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, in the server that all processes are forked from: each then starts in milliseconds. The first
# ones of these PyTorch imports at a call, of torch.broadcast_shapes, torch.testing.assert_close, and when an
# optimiser is made.
_CONTEXT.set_forkserver_preload(
    [
        "torch.fx.experimental.symbolic_shapes",
        "torch.distributed.tensor",
        "torch._dynamo",
        "pyro.infer",
        "pyro_iw",
    ]
)


def run_on_ranks(function, size, *args, timeout=20, expect_errors=False):
    """Call ``function(rank, *args)`` on ``size`` ranks of the default process group.

    Arguments:
        function: a function of a module (no local one: it is found by its name); returns what can be pickled,
            tensors as numbers or numpy arrays.
        size: the number of processes.
        args: further arguments, the same on every rank.
        timeout: seconds that a collective operation waits for the other ranks.
        expect_errors: return a rank's error as ``(name of its class, its message)`` and not raise it.

    Returns:
        The results, by rank; None for a rank that ended without a word.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_run, args=(theirs, function, rank, size, str(Path(folder) / "store"), timeout, args)
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results = [_answer(pipe) for pipe in pipes]
        for process in processes:
            process.join(timeout)
            process.kill()
    failed = [(rank, trace) for rank, (_, error, trace) in enumerate(results) if error is not None]
    if failed and not expect_errors:
        raise AssertionError("\n".join(f"rank {rank}:\n{trace}" for rank, trace in failed))
    return [result if error is None else error for result, error, _ in results]


def names_lost(message, rank):
    """Whether an error names a rank that is gone, or, on a PyTorch that does not tell, all it may be."""
    import torch.distributed as dist

    if hasattr(dist.ProcessGroup, "get_group_store"):
        return re.match(rf"Rank (\d+, )*{rank}\b.* did not come to an exchange with rank", message)
    return re.match(rf"(Rank|One of the ranks) (\d+, )*{rank}\b.* has ended or does not answer", message)


def _answer(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return None, None, None


def _run(pipe, function, rank, size, store, timeout, args):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import pyro
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    pyro.set_rng_seed(rank)
    try:
        answer = (function(rank, *args), None, None)
    except Exception as error:
        answer = (None, (type(error).__name__, str(error)), traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    dist.destroy_process_group()

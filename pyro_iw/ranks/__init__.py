"""Several processes on one task, on :mod:`torch.distributed` alone: who takes part, and how they agree."""

r"""From log-weights to gradients: estimators, and the ways to spend less time or memory on one.

All of it works on what :mod:`pyro_iw.tracing` has read and on the weights that :mod:`pyro_iw.bounds` gives.
"""

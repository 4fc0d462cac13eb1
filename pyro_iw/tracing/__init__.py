r"""Running a pair of model and guide, and reading off it what the bounds need.

:mod:`~pyro_iw.tracing.traces` runs a pair once, :mod:`~pyro_iw.tracing.runner` runs it on S particles,
:mod:`~pyro_iw.tracing.sites` reads its sample sites, and :mod:`~pyro_iw.tracing.particles` sums their
densities into log-weights per cell.
"""

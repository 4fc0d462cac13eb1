"""Importance-weighted variational bounds for any Pyro model/guide pair."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._support.version import __version__ as __version__

if TYPE_CHECKING:
    from .adversarial import AdversarialLosses, AdversarialSVI
    from .bounds import Bound
    from .checking import PairCheck, SiteCheck, check
    from .elbo import ImportanceWeightedELBO
    from .gradients.snr import GradientSNR, gradient_snr
    from .hierarchical import LocallyEnhancedELBO
    from .losses import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, TVO_ELBO, VR_ELBO
    from .optim import FusedOptim
    from .posterior.aggregated import aggregated_posterior
    from .posterior.annealed import AnnealedImportanceSampler, AnnealedSamples
    from .posterior.evaluation import RateDistortion, active_units, bound_curve, rate_distortion
    from .posterior.evidence import Evidence, LogMarginal
    from .posterior.hierarchical_samples import HierarchicalSamples
    from .posterior.leave_one_out import LeaveOneOut
    from .posterior.sampler import ImportanceSampler
    from .posterior.samples import ImportanceSamples
    from .posterior.sandwich import Sandwich, sandwich
    from .posterior.two_samples import TwoSamples
    from .ranks.group import RankError
    from .sequences.evaluation import ParticleFilter
    from .sequences.filtered import FilteredSequences
    from .sequences.fivo import FIVO_ELBO
    from .tracing.levels import TwoLevels
    from .tracing.particles import Particles

__all__ = [
    "CIWAE_ELBO",
    "FIVO_ELBO",
    "IWAE_ELBO",
    "MIWAE_ELBO",
    "PIWAE_ELBO",
    "TVO_ELBO",
    "VR_ELBO",
    "AdversarialLosses",
    "AdversarialSVI",
    "AnnealedImportanceSampler",
    "AnnealedSamples",
    "Bound",
    "Evidence",
    "FilteredSequences",
    "FusedOptim",
    "GradientSNR",
    "HierarchicalSamples",
    "ImportanceSampler",
    "ImportanceSamples",
    "ImportanceWeightedELBO",
    "LeaveOneOut",
    "LocallyEnhancedELBO",
    "LogMarginal",
    "PairCheck",
    "ParticleFilter",
    "Particles",
    "RankError",
    "RateDistortion",
    "Sandwich",
    "SiteCheck",
    "TwoLevels",
    "TwoSamples",
    "active_units",
    "aggregated_posterior",
    "bound_curve",
    "check",
    "gradient_snr",
    "rate_distortion",
    "sandwich",
]

# Where each name lives. A module is imported when a name of it is first asked for: a program that trains by
# one loss does not wait for adversaries, filters and chains.
_HOMES = {
    "adversarial": ("AdversarialLosses", "AdversarialSVI"),
    "bounds": ("Bound",),
    "checking": ("PairCheck", "SiteCheck", "check"),
    "elbo": ("ImportanceWeightedELBO",),
    "gradients.snr": ("GradientSNR", "gradient_snr"),
    "hierarchical": ("LocallyEnhancedELBO",),
    "losses": ("CIWAE_ELBO", "IWAE_ELBO", "MIWAE_ELBO", "PIWAE_ELBO", "TVO_ELBO", "VR_ELBO"),
    "optim": ("FusedOptim",),
    "posterior.aggregated": ("aggregated_posterior",),
    "posterior.annealed": ("AnnealedImportanceSampler", "AnnealedSamples"),
    "posterior.evaluation": ("RateDistortion", "active_units", "bound_curve", "rate_distortion"),
    "posterior.hierarchical_samples": ("HierarchicalSamples",),
    "posterior.leave_one_out": ("LeaveOneOut",),
    "posterior.sampler": ("ImportanceSampler",),
    "posterior.evidence": ("Evidence", "LogMarginal"),
    "posterior.samples": ("ImportanceSamples",),
    "posterior.sandwich": ("Sandwich", "sandwich"),
    "posterior.two_samples": ("TwoSamples",),
    "ranks.group": ("RankError",),
    "sequences.evaluation": ("ParticleFilter",),
    "sequences.filtered": ("FilteredSequences",),
    "sequences.fivo": ("FIVO_ELBO",),
    "tracing.levels": ("TwoLevels",),
    "tracing.particles": ("Particles",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
# Modules that are reached as attributes without an import of their own.
_MODULES = {home.partition(".")[0] for home in _HOMES} | {
    "bound",
    "compiling",
    "logmean",
    "nn",
    "plots",
    "psis",
    "resampling",
    "running",
}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})

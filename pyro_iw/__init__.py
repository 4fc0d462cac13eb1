"""Importance-weighted variational bounds for any Pyro model/guide pair."""

from ._support.version import __version__ as __version__
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
from .posterior.hierarchical_samples import HierarchicalSamples
from .posterior.leave_one_out import LeaveOneOut
from .posterior.sampler import Evidence, ImportanceSampler, LogMarginal
from .posterior.samples import ImportanceSamples
from .posterior.sandwich import Sandwich, sandwich
from .posterior.two_samples import TwoSamples
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

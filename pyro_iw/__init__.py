"""Importance-weighted variational bounds for any Pyro model/guide pair."""

from .bounds import Bound
from .diagnostics import GradientSNR, gradient_snr
from .elbo import ImportanceWeightedELBO
from .losses import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, TVO_ELBO, VR_ELBO
from .particles import Particles

__all__ = [
    "CIWAE_ELBO",
    "IWAE_ELBO",
    "MIWAE_ELBO",
    "PIWAE_ELBO",
    "TVO_ELBO",
    "VR_ELBO",
    "Bound",
    "GradientSNR",
    "ImportanceWeightedELBO",
    "Particles",
    "gradient_snr",
]
__version__ = "0.1.0"

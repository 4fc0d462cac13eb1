r"""Adversarial autoencoders: a discriminator in place of the KL term."""

from .svi import AdversarialLosses, AdversarialSVI

__all__ = ["AdversarialLosses", "AdversarialSVI"]

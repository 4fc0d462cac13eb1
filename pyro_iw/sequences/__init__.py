"""Sequences: particle filters over models and guides of Pyro's SMC protocol, and the bounds that they
give."""

"""Small things that all of the package leans on, and that know nothing of bounds or of Pyro's traces."""

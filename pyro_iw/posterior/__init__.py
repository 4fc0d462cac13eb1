r"""What a fitted pair says of the posterior and of the evidence: sampling, diagnostics, prediction, ArviZ."""

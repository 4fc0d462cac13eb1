"""Parts that several example programs share: data, networks, training, evaluation, files and options."""

"""Parts of ``aae.py``: the adversarial autoencoders of Makhzani et al. (1511.05644)."""

"""Parts of ``deep_vae.py``: networks and schedule of Burda et al. (1509.00519), and runs that resume."""

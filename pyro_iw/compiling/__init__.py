r"""The compiled step, behind ``compile=True``, and all that stands on PyTorch's private names."""

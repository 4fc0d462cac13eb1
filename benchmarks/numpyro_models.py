"""The models of :mod:`models` in NumPyro, over the same weights; needs the packages of ``pyro-iw[bench]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from torch import nn

__all__ = ["make_pair"]

Layers = list[tuple[str, Any]]


def _as_arrays(module: nn.Module) -> Any:
    """The weights of a module as a tree of arrays; dense ones are ``[in, out]``."""
    if isinstance(module, nn.Linear):
        return {"w": _array(module.weight.T), "b": _array(module.bias)}
    if isinstance(module, nn.ConvTranspose2d):
        # As a convolution of the spread-out input: taps reversed, channels swapped.
        return {"w": _array(module.weight.flip(-2, -1).transpose(0, 1)), "b": _array(module.bias)}
    if isinstance(module, nn.Conv2d):
        return {"w": _array(module.weight), "b": _array(module.bias)}
    return {name: _as_arrays(child) for name, child in module.named_children()}


def _array(tensor: Any) -> Array:
    return jnp.array(tensor.detach().cpu().contiguous().numpy())


def _apply(module: nn.Module, weights: Any, x: Array) -> Any:
    """The module's function in JAX. Only its structure is read off the module, while JAX traces."""
    if isinstance(module, nn.Sequential):
        for name, child in module.named_children():
            x = _apply(child, weights[name], x)
        return x
    if isinstance(module, models.Gaussian):
        h = _apply(module.trunk, weights["trunk"], x)
        return _apply(module.loc, weights["loc"], h), _apply(module.log_scale, weights["log_scale"], h)
    if isinstance(module, nn.Linear):
        return x @ weights["w"] + weights["b"]
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return _convolve(module, weights, x)
    if isinstance(module, nn.Tanh):
        return jnp.tanh(x)
    if isinstance(module, nn.ReLU):
        return jax.nn.relu(x)
    if isinstance(module, nn.Flatten):
        return x.reshape(*x.shape[:-3], -1)
    if isinstance(module, nn.Unflatten):
        return x.reshape(*x.shape[:-1], *module.unflattened_size)
    raise NotImplementedError(f"no translation of {type(module).__name__} to JAX")


def _convolve(module: nn.Conv2d | nn.ConvTranspose2d, weights: Any, x: Array) -> Array:
    stride, kernel, padding = module.stride, module.kernel_size[0], module.padding[0]
    if isinstance(module, nn.ConvTranspose2d):
        space = {
            "window_strides": (1, 1),
            "lhs_dilation": stride,
            "padding": [(kernel - 1 - padding,) * 2] * 2,
        }
    else:
        space = {"window_strides": stride, "padding": [(padding, padding)] * 2}
    y = lax.conv_general_dilated(x, weights["w"], **space, dimension_numbers=("NCHW", "OIHW", "NCHW"))
    return y + weights["b"][:, None, None]


def _normal(parameters: tuple[Array, Array]) -> dist.Distribution:
    loc, log_scale = parameters
    return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)


def _standard_normal(width: int) -> dist.Distribution:
    return dist.Normal(jnp.zeros(width), jnp.ones(width)).to_event(1)


def make_pair(vae: models.VAE) -> tuple[Callable, Callable]:
    """Model and guide for NumPyro, that start from the weights of ``vae`` and run one particle."""
    start = {name: _as_arrays(getattr(vae, name)) for name in ("encoder", "decoder")}
    two_layers = isinstance(vae, models.TwoLayerVAE)

    def model(x: Array) -> None:
        weights = numpyro.param("decoder", start["decoder"])
        with numpyro.plate("data", len(x)):
            if two_layers:
                z = numpyro.sample("z2", _standard_normal(vae.latent[1]))
                z = numpyro.sample("z1", _normal(_apply(vae.decoder[0], weights["0"], z)))
                logits = _apply(vae.decoder[1], weights["1"], z)
            else:
                z = numpyro.sample("z", _standard_normal(vae.latent))
                logits = _apply(vae.decoder, weights, z)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Array) -> None:
        weights = numpyro.param("encoder", start["encoder"])
        with numpyro.plate("data", len(x)):
            if two_layers:
                z = numpyro.sample("z1", _normal(_apply(vae.encoder[0], weights["0"], x)))
                numpyro.sample("z2", _normal(_apply(vae.encoder[1], weights["1"], z)))
            else:
                numpyro.sample("z", _normal(_apply(vae.encoder, weights, x)))

    return model, guide

r"""Does the aggregated posterior fit the prior: paired samples of both.

A guide proposes codes datapoint by datapoint; over the data they come from the aggregated posterior

.. math:: q_\phi(z) = \frac1N \sum_{n=1}^N q_\phi(z \mid x_n).

Where it differs from the prior, draws from the prior reach the decoder at places it has never seen, or leave
out some that it has. Samples are all that is compared, so guides without a density (deterministic or implicit
ones, see ``AdversarialSVI``) stand beside those of the ELBO, IWAE or MIWAE.

References:
    | Adversarial Autoencoders (Makhzani et al., 2015), https://arxiv.org/abs/1511.05644
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor

from .._support.arguments import check_loader, read_batch
from .._support.progress import progress_bar
from ..tracing.messages import is_auxiliary, is_latent, sample_sites, unmasked
from ..tracing.minibatches import OneMinibatch
from .two_samples import TwoSamples

__all__ = ["aggregated_posterior"]


def aggregated_posterior(
    model: Callable,
    guide: Callable,
    batches: Iterable[Any],
    sites: Sequence[str] | None = None,
    *,
    to_args: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> dict[str, TwoSamples]:
    r"""Draws from the aggregated posterior, each beside one from the prior.

    One code a datapoint by the guide, and one draw a datapoint by the model itself, on the same arguments and
    the same minibatch, so that any prior will do: a mixture, a discrete one, one that depends on the
    arguments. All batch dims of a site count as datapoints, all event dims are flattened; ids (of a
    Categorical) become floats. Masked cells are left out. No density is evaluated and there are no gradients.
    Networks run as they are: put them into eval mode first. The random state advances.

    References:
        | Adversarial Autoencoders (Makhzani et al., 2015), https://arxiv.org/abs/1511.05644
        | ELBO surgery (Hoffman & Johnson, 2016),
          http://approximateinference.org/accepted/HoffmanJohnson2016.pdf

    Arguments:
        model: the model.
        guide: the guide, of which samples are all that is needed.
        batches: a ``DataLoader`` or another iterable of what model and guide take: a tensor, or a tuple that
            is unpacked into several arguments, as in :meth:`ImportanceSampler.log_marginal_dataset`.
        sites: the latent sites to look at; by default all of the guide's that are not auxiliary.
        to_args: as there.
        progress: whether to show a progress bar, if it takes more than two seconds.

    Returns:
        The two samples of each site, by name.

    Raises:
        ValueError: if there is no batch; a site is in only one of model and guide, in neither, observed, or
            in no plate; its values are shaped differently in model and guide, or a mask does not fit; every
            cell is masked; or a value is NaN or infinite. The site is named.

    Example:
        >>> loader = torch.utils.data.DataLoader(torch.randn(1000) * 2**0.5, batch_size=100)
        >>> both = aggregated_posterior(model, guide, loader)["z"]  # Normal(0.3 x, 0.7) against Normal(0, 1)
        >>> both
        TwoSamples(N=1000, D=1)
        >>> bool(both.guide.std() < 0.9 < both.prior.std())
        True
    """
    if isinstance(sites, str):
        raise ValueError(f"sites must be a sequence of names, such as [{sites!r}]")
    check_loader(batches)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    num_batches = 0
    for batch in progress_bar(batches, show=progress, desc="aggregated posterior"):
        num_batches += 1
        args, kwargs = read_batch(batch, to_args)
        with torch.no_grad(), OneMinibatch():
            nodes = {
                "guide": _sample_sites(guide, args, kwargs),
                "model": _sample_sites(model, args, kwargs),
            }
        for name in _chosen(nodes["guide"], sites):
            _check_site(name, nodes)
            found.setdefault(name, []).append(_cells(name, nodes["guide"][name], nodes["model"][name]))
    if not found:
        what = "The guide has no latent site" if num_batches else "No batch was given"
        raise ValueError(f"{what}, so there is nothing to compare.")
    result = {}
    for name, parts in found.items():
        codes, draws = (list(values) for values in zip(*parts, strict=True))
        widths = sorted({values.shape[1] for values in codes})
        if len(widths) > 1:
            raise ValueError(
                f"Site {name!r} has values of {widths} elements, differently from batch to batch."
            )
        if not sum(map(len, codes)):
            raise ValueError(f"Every cell of site {name!r} is masked, so there is nothing to compare.")
        try:
            result[name] = TwoSamples(torch.cat(codes), torch.cat(draws))
        except ValueError as error:
            raise ValueError(f"Site {name!r}: {error}") from None
    return result


def _sample_sites(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The sample sites of one run, by name, those of subsampling aside."""
    return sample_sites(poutine.trace(fn).get_trace(*args, **kwargs))


def _chosen(guide: dict[str, Any], sites: Sequence[str] | None) -> list[str]:
    if sites is not None:
        return list(dict.fromkeys(sites))
    return [name for name, site in guide.items() if is_latent(site) and not is_auxiliary(site)]


def _check_site(name: str, nodes: dict[str, dict[str, Any]]) -> None:
    """Refuse what is no latent of both."""
    has = [role for role in ("guide", "model") if name in nodes[role]]
    latent = sorted(
        other
        for other, site in nodes["guide"].items()
        if not site["is_observed"] and not nodes["model"].get(other, {"is_observed": True})["is_observed"]
    )
    if not has:
        raise ValueError(
            f"There is no sample site {name!r}; model and guide share the latent sites {latent}."
        )
    if has == ["guide"]:
        reason = "the guide has it and the model has not, so it has no prior to compare with"
    elif has == ["model"]:
        reason = "the guide leaves it out, so there is no aggregated posterior of it"
    elif nodes["model"][name]["is_observed"] or nodes["guide"][name]["is_observed"]:
        role = "model" if nodes["model"][name]["is_observed"] else "guide"
        reason = f"it is observed in the {role}, so there is nothing to be inferred"
    else:
        return
    raise ValueError(
        f"Site {name!r} cannot be compared: {reason}. Model and guide share the latents {latent}."
    )


def _cells(name: str, guide: Any, model: Any) -> tuple[Tensor, Tensor]:
    """Values ``[cells, elements]`` of both, without the masked cells."""
    shapes = [(tuple(site["fn"].batch_shape), tuple(site["fn"].event_shape)) for site in (guide, model)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Site {name!r} has batch shape {shapes[0][0]} and event shape {shapes[0][1]} in the guide, but "
            f"{shapes[1][0]} and {shapes[1][1]} in the model. Declare the same plates and .to_event() "
            "(of a Delta: event_dim=) in both."
        )
    batch, event = shapes[0]
    if not batch:
        raise ValueError(f"Site {name!r} lies in no plate, so it has no aggregated posterior over the data.")
    values = []
    for site in (guide, model):
        value = site["value"].detach().expand(batch + event)
        kept = unmasked(name, torch.Size(batch), (guide, model), value.device)
        value = (value if kept is None else value[kept]).reshape(-1, math.prod(event))
        values.append(value if value.is_floating_point() else value.to(torch.get_default_dtype()))
    return values[0], values[1]

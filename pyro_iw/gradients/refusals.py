r"""What would make a gradient wrong, refused.

Most functions take the guide sites in question and the name of the estimator, and raise a ``ValueError`` that
says which sites, why, and what to do instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..tracing.paths import class_name
from ..tracing.sites import Site

__all__ = [
    "listed",
    "refuse_another_density",
    "refuse_baselines",
    "refuse_choice_of_values",
    "refuse_enumerated",
    "refuse_expected",
    "refuse_hidden_draws",
    "refuse_inside_sums",
    "refuse_late_parameters",
    "refuse_missing_paths",
    "refuse_moving_supports",
]


def listed(sites: Iterable[Site]) -> str:
    """The sites' names, each once."""
    return ", ".join(dict.fromkeys(repr(site.name) for site in sites))


def refuse_another_density(again: Tensor, before: Tensor, message: str) -> None:
    """Refuse particles that have another density when they are drawn or run again, beyond rounding.

    Arguments:
        again: the log density now.
        before: what it was.
        message: what to say.
    """
    if not torch.allclose(again.detach(), before.detach(), rtol=1e-2, atol=1e-2, equal_nan=True):
        raise ValueError(message)


def refuse_baselines(sites: Iterable[Site]) -> None:
    """Refuse sites that ask for a baseline, which would go unused."""
    for site in sites:
        if "baseline" in site.message["infer"]:
            raise ValueError(
                f"Guide site {site.name!r} asks for a baseline by infer={{'baseline': ...}}, which the "
                "estimators here do not use: they take their control variates from the other particles. "
                "Remove it."
            )


def refuse_choice_of_values(enumerated: Sequence[Site]) -> None:
    """Refuse sites whose values the guide enumerates, where particles are chosen by weight."""
    if enumerated:
        raise NotImplementedError(
            f"backward_particles chooses particles, and of site(s) {listed(enumerated)} the guide enumerates "
            "all values. Use chunk_size to save memory instead, or sample them (without "
            "infer={'enumerate': 'parallel'})."
        )


def refuse_missing_paths(sites: Sequence[Site], name: str) -> None:
    """Refuse sites without a path, or with a biased one that nobody has asked for; see :mod:`.paths`."""
    refuse_hidden_draws(sites, name)
    if not sites:
        return
    biased = [site for site in sites if site.has_biased_path]
    reason = ""
    if biased:
        kinds = dict.fromkeys(class_name(site.message["fn"]) for site in biased)
        reason = (
            f" The rsample of {', '.join(kinds)} has a gradient that is not that of its draws. To take it on "
            f"purpose, biased as it is, pass infer={{'biased_path': True}} at {listed(biased)}."
        )
    raise ValueError(
        f"Guide site(s) {listed(sites)} cannot be reparameterised, so estimator={name!r} would leave out the "
        "gradient of their parameters without a word. Pass estimator='vimco' (K > 1) or 'score'; particles "
        "on one level also have 'rws' (wake-wake) and, with IWAE, MIWAE, PIWAE or VR and K > 1, 'ovis'. Or "
        "use a continuous distribution with an exact rsample at these sites, in model and guide."
        f"{reason}"
    )


def refuse_hidden_draws(sites: Iterable[Site], name: str) -> None:
    """Refuse factors that claim to be densities of draws without a path.

    Of draws hidden from Pyro, they would need a score; as functions of the guide's own draws, which do not
    vary with them, they must not have one. Which of the two cannot be seen.
    """
    factors = [site for site in sites if site.is_factor]
    if factors:
        raise ValueError(
            f"Factor(s) {listed(factors)} of the guide (pyro.factor with has_rsample=False) depend on "
            f"parameters, and whether they need a score, which estimator={name!r} would have to give them, "
            "cannot be seen. Where the value follows from the guide's own sample sites and parameters, pass "
            "has_rsample=True: no draw depends on it, so its derivative is all there is to it, whatever the "
            "sites are. Where it is the density of draws made outside of pyro.sample, make them inside."
        )


def refuse_enumerated(sites: Iterable[Site], name: str) -> None:
    """Refuse sites that the guide enumerates, where it climbs no bound that they could be summed out of."""
    sites = list(sites)
    if sites:
        raise NotImplementedError(
            f"Site(s) {listed(sites)} are enumerated in the guide, and estimator={name!r} climbs log q of "
            "what was drawn. Remove their infer={'enumerate': 'parallel'} to have them sampled, or use "
            "estimator='reparam' ('score' or 'vimco' where other sites have no path)."
        )


def refuse_expected(sites: Iterable[Site], name: str) -> None:
    """Refuse sites without a path that are drawn for each of several values, whose costs are summed over."""
    found = [site for site in sites if site.message.get("is_expected")]
    if found:
        raise NotImplementedError(
            f"Guide site(s) {listed(found)} have no path, and are drawn for each value of a site that the "
            "guide enumerates outside of the plates that have importance weights, so there is no cost for "
            f"each value, which estimator={name!r} needs. Pass stratified=True, enumerate {listed(found)} as "
            "well, or sample the enumerated site: remove its infer={'enumerate': 'parallel'}."
        )


def refuse_inside_sums(sites: Iterable[Site], name: str) -> None:
    """Refuse draws that are made for each value of an enumerated site, and summed over inside the logarithm.

    What each of them weighs along its path is another number for each value.
    """
    sites = list(sites)
    if sites:
        raise NotImplementedError(
            f"Guide site(s) {listed(sites)} are drawn for each value of an enumerated site, and summed over "
            f"inside the logarithm by stratified=True, which estimator={name!r} has no weights for. Use "
            "estimator='reparam', or leave out stratified=True."
        )


def refuse_late_parameters(sites: Iterable[Site], name: str) -> None:
    """Refuse sites whose densities depend on parameters other than as a distribution that was sampled.

    At stopped values the derivative of such a density is no score: a transformation by parameters of a draw
    without any (AutoStructured), a point estimate (AutoDelta), a factor or an observed site.
    """
    late = [site for site in sites if site.has_late_parameters]
    if late:
        raise ValueError(
            f"Guide site(s) {listed(late)} depend on parameters after sampling (a Delta of parameters, as in "
            "AutoDelta, AutoStructured and hand-made transformations of noise, or a factor or observed site "
            "with parameters), so their density at fixed values has no score, which "
            f"estimator={name!r} needs. Use estimator='reparam' ('score' where other sites have no path), or "
            "sample these sites from a distribution with the parameters (TransformedDistribution)."
        )


def refuse_moving_supports(sites: Iterable[Site], name: str) -> None:
    """Refuse sites whose score has another expectation than 0; see :mod:`.supports`."""
    moving = [site for site in sites if site.has_moving_support]
    if moving:
        raise ValueError(
            f"The support of guide site(s) {listed(moving)} has ends that move with parameters (as that of "
            "Uniform(0, b) does with b), so the expectation of its score is not 0, on which "
            f"estimator={name!r} relies. Sample from a distribution with rsample under estimator='reparam' "
            "('score' where other sites have no path), which go along with the ends; or from one whose "
            "support stays where it is, such as a Beta or a Normal."
        )

"""Random pairs, each from one integer."""

from __future__ import annotations

import random

import torch

from .families import BUILD, CONTINUOUS, DISCRETE, ENUMERABLE, EVENT_DIM, OBSERVED, PRIORS
from .pairs import ABOVE_ZERO, ON_THE_LINE, Pair, Plate, Site

AUTO = ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "list"]


def make_pair(seed: int) -> Pair:
    """The pair of this seed."""
    r = random.Random(seed)
    pair = Pair(seed, dtype=torch.float32 if r.random() < 0.15 else torch.float64)
    pair.v = torch.tensor([r.uniform(-1, 1) for _ in range(r.randint(2, 3))], dtype=pair.dtype)
    minibatches = r.random() < 0.4
    for i in range(r.choice([0, 1, 1, 1, 2, 2, 3])):
        size = r.choice([1, 2, 2, 3])
        subsample = r.randint(1, size) if minibatches and r.random() < 0.6 else None
        pair.plates.append(Plate(f"p{i}", size, subsample, -1 - i))
    r.shuffle(pair.plates)
    # Most sites lie in these, so that there are cells; some pairs have sites elsewhere.
    everywhere = tuple(i for i in range(len(pair.plates)) if r.random() < 0.7)
    strays = r.random() < 0.35
    discrete = r.random() < 0.4
    enumerate_some = r.random() < 0.2
    latents = r.choice([1, 1, 2, 2, 3, 3, 4, 5, 6])
    for i in range(latents + r.choice([1, 1, 2, 3])):
        more = [j for j in range(len(pair.plates)) if j not in everywhere and r.random() < 0.5]
        where = tuple(sorted(more if strays and r.random() < 0.4 else {*everywhere, *more}))
        site = Site(f"z{i}" if i < latents else f"x{i}", "", where)
        known = [s for s in pair.sites if s.role in ("latent", "enumerated") and set(s.plates) <= set(where)]
        site.parents = tuple(s.name for s in known if r.random() < 0.6)
        pair.sites.append(site)
        (_latent if i < latents else _observed)(r, pair, site, discrete, enumerate_some)
    _guide(r, pair)
    _handlers(r, pair)
    _oddities(r, pair)
    _numbers(r, pair)
    return pair


def _latent(r, pair, site, discrete, enumerate_some):
    site.family = r.choice(DISCRETE + CONTINUOUS if discrete else CONTINUOUS)
    chain = [s for s in pair.sites if s.role == "enumerated"]
    nested = all(set(site.plates) <= set(s.plates) or set(s.plates) <= set(site.plates) for s in chain)
    if enumerate_some and len(chain) < 2 and nested and r.random() < 0.6:
        site.family, site.role = r.choice(ENUMERABLE), "enumerated"
        return
    site.guide_family = r.choice(PRIORS[site.family])
    if site.family == "onehot" and r.random() < 0.15:
        site.guide_family = "through"
    if site.family in (*ABOVE_ZERO, *ON_THE_LINE) and r.random() < 0.12:
        site.auxiliary, site.guide_family = True, r.choice(["normal", "laplace"])


def _observed(r, pair, site, discrete, enumerate_some):
    site.role, site.family = "observed", r.choice(OBSERVED)
    if r.random() < 0.2 and site.parents:
        site.role, site.family = r.choice(["factor", "deterministic"]), "normal"


def _guide(r, pair):
    """The guide's sites in an order of their own, and what each depends on; or a guide of Pyro's own."""
    latents = [s for s in pair.sites if s.role == "latent"]
    if not latents:  # all of them enumerated
        latents = [Site("z", "normal", pair.sites[0].plates, guide_family="normal")]
        pair.sites.insert(0, latents[0])
    r.shuffle(latents)
    pair.guide_order = [site.name for site in latents]
    for i, site in enumerate(latents):
        known = [s for s in latents[:i] if set(s.plates) <= set(site.plates)]
        site.guide_parents = tuple(s.name for s in known if r.random() < 0.5)
        site.shared = r.random() < 0.15
    plain = all(s.family in CONTINUOUS for s in latents)
    if plain and not any(p.subsample for p in pair.plates) and r.random() < 0.2:
        pair.auto = r.choice(AUTO)


def _handlers(r, pair):
    tempered = not pair.enumerated and r.random() < 0.1
    for site in pair.sites:
        shape = pair.shape(site)
        if site.role == "observed" and site.family in ON_THE_LINE and r.random() < 0.15:
            site.obs_mask = _bits(r, shape)
            if not pair.auto:
                site.guide_family = "normal"
                pair.guide_order.append(site.name)
            elif pair.auto != "AutoNormal" and not site.obs_mask.all():
                pair.improper[""] = f"'{site.name}_unobserved' is masked in the model alone"
        elif (site.role == "latent" and not pair.auto) or site.role in ("observed", "factor"):
            site.mask = _bits(r, shape) if r.random() < 0.12 else None
        if tempered and site.role != "enumerated" and r.random() < 0.4:
            number = r.choice([0.5, 2.0])
            scale = number if r.random() < 0.7 else torch.full(shape, number, dtype=pair.dtype)
            site.scales["model"] = scale
            if r.random() < 0.5 and not pair.auto:
                site.scales["guide"] = scale
    if r.random() < 0.12:
        pair.scale = r.choice([0.5, 3.0])
    elif pair.plates and not pair.enumerated and r.random() < 0.05:
        _scale_cells(r, pair)


def _bits(r, shape):
    return torch.tensor([r.random() < 0.6 for _ in range(torch.Size(shape).numel())]).reshape(shape)


def _scale_cells(r, pair):
    """A scale over one plate around the whole pair, which is wrong where a site lies outside."""
    i = r.randrange(len(pair.plates))
    plate = pair.plates[i]
    if plate.subsample is None:
        shape = [plate.size] + [1] * (-plate.dim - 1)
        pair.scale = torch.tensor([r.choice([0.5, 1.0, 2.0]) for _ in range(plate.size)], dtype=pair.dtype)
        pair.scale = pair.scale.reshape(shape)
        outside = [s.name for s in pair.sites if i not in s.plates and s.role != "deterministic"]
        if plate.size > 1 and (outside or pair.auto not in ("", "AutoNormal")):
            pair.improper[""] = f"the scale over {plate.name!r} counts {outside or pair.auto} several times"


def _oddities(r, pair):
    """What the package has to refuse or warn of, and has not always."""
    latents = [s for s in pair.sites if s.role == "latent"]
    odd = r.random()
    if pair.auto:
        return
    site = r.choice(latents)
    if odd < 0.015:
        pair.extra, pair.improper[""] = "mixture", "the guide is a mixture"
    elif odd < 0.03:
        pair.extra = "observed"
    elif odd < 0.06:
        pair.extra = r.choice(["factor", "factor_none"])
    elif any(pair.plates[i].subsample for i in site.plates):
        return  # a minibatch may be one where nothing is odd, and is not of all of a value's shape
    elif odd < 0.075 and site.family in ("normal", "student") and pair.dtype == torch.float64:
        pair.conditioned, pair.improper[""] = site.name, f"the model conditions {site.name!r} away"
    elif odd < 0.09 and site.mask is not None and not site.mask.all():
        site.masked_in = (r.choice(["model", "guide"]),)
        pair.improper[""] = f"{site.name!r} is masked on one side"
    elif odd < 0.11 and site.family == "normal" and not site.auxiliary:
        site.guide_family = "interval"
        pair.improper |= dict.fromkeys(["stl", "dreg"], f"the support of {site.name!r} moves")
    elif odd < 0.14 and site.family in ("normals", "mvn") and pair.shape(site) and len(pair.shape(site)) == 1:
        pair.left = site.name
    if r.random() < 0.05:
        pair.validate = False


def _numbers(r, pair):
    """Parameters' initial values, what varies over the cells, and data."""

    def numbers(shape):
        count = torch.Size(shape).numel()
        return torch.tensor([r.gauss(0, 0.7) for _ in range(count)], dtype=pair.dtype).reshape(shape)

    pair.values["guide.extra"] = r.gauss(0, 0.5)
    for site in pair.sites:
        shape = pair.shape(site)
        for role, parents in (("model", site.parents), ("guide", site.guide_parents)):
            prefix = f"{role}.{site.name}"
            pair.offsets[prefix] = numbers(shape)
            pair.values |= {f"{prefix}.b": r.gauss(0, 0.5), f"{prefix}.s": r.uniform(-0.7, 0.2)}
            pair.values |= {f"{prefix}.{parent}": r.gauss(0, 0.7) for parent in parents}
        if site.role == "observed":
            with torch.random.fork_rng():
                torch.manual_seed(r.randrange(2**31))
                one = torch.ones((), dtype=pair.dtype)
                site.data = BUILD[site.family](numbers(shape), one, pair.v).sample()
            masked = site.mask if site.mask is not None else site.obs_mask
            if masked is not None and site.family in (*ON_THE_LINE, "normals") and r.random() < 0.3:
                bad = ~masked.reshape([*shape, *[1] * EVENT_DIM.get(site.family, 0)])
                site.data = site.data.masked_fill(bad, float("nan"))
                pair.validate = r.random() < 0.3  # which refuses them

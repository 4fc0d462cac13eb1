"""One run of a model or a guide on given values, with Pyro's own handlers."""

import math

import pyro.distributions as dist
import pyro.poutine as poutine
import torch


class Fix(poutine.messenger.Messenger):
    """Gives latent sites and minibatches their values, along the sites' paths or as they are."""

    def __init__(self, values, along_path=False, stop_parameters=False):
        self.values, self.along_path, self.stop_parameters = values, along_path, stop_parameters

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and not msg["is_observed"]:
            value = self.values[msg["name"]]
            if callable(value):
                value = value(msg["fn"])
            elif type(msg["fn"]).__name__ != "_Subsample":
                value = value.reshape(value.shape[max(0, value.dim() - len(msg["fn"].shape())) :])
                value = path(msg["fn"], value) if self.along_path else value
            msg["value"], msg["done"] = value, True

    def _pyro_post_param(self, msg):
        msg["value"] = msg["value"].detach() if self.stop_parameters else msg["value"]


def run(fn, *args, **kwargs):
    """The sites that carry a density."""
    with Fix(*args, **kwargs):
        nodes = poutine.trace(fn).get_trace().nodes
    skip = ("_Subsample",)
    found = {n: s for n, s in nodes.items() if s["type"] == "sample" and type(s["fn"]).__name__ not in skip}
    return {n: s for n, s in found.items() if not s["infer"].get("_deterministic")}


def proposal(guide, *args, **kwargs):
    """The guide's sites whose density is that of what it draws: those it observes are not drawn."""
    sites = run(guide, *args, **kwargs)
    factors = {n for n, s in sites.items() if type(s["fn"]).__name__ == "Unit"}
    return {n: s for n, s in sites.items() if n in factors or not s["is_observed"]}


def plates(site):
    return {frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized}


def subsampling(site, names=None):
    chosen = [frame for name, frame in plates(site).items() if names is None or name in names]
    return math.prod(frame.full_size / frame.size for frame in chosen if frame.full_size)


def own_scale(site):
    return site["scale"] / subsampling(site)


def log_prob(site, masks):
    value = site["value"]
    if site["is_observed"] and value is not None and site["mask"] is not None:
        value = torch.where(value.isnan(), torch.full_like(value, 0.5), value)  # where it is masked
    result = site["fn"].log_prob(value)
    for mask in masks:
        result = result if mask is None else torch.where(torch.as_tensor(mask), result, 0.0)
    return result


def path(fn, z):
    """The value z with its derivative along the path by the parameters of fn; as it is if there is none."""
    if type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        return path(fn.base_dist, z)
    if isinstance(fn, dist.Delta):
        return fn.v
    if isinstance(fn, torch.distributions.TransformedDistribution):
        x = z
        for transform in reversed(fn.transforms):
            x = transform.inv(x)
        new = path(fn.base_dist, x)
        for transform in fn.transforms:
            new = transform(new)
    elif isinstance(fn, (dist.Normal, dist.Laplace, dist.StudentT)):
        new = fn.loc + fn.scale * ((z - fn.loc) / fn.scale).detach()
    elif isinstance(fn, dist.MultivariateNormal):
        noise = torch.linalg.solve_triangular(fn.scale_tril, (z - fn.loc).unsqueeze(-1), upper=False)
        new = fn.loc + (fn.scale_tril @ noise.detach()).squeeze(-1)
    elif isinstance(fn, dist.Uniform):
        new = fn.low + (fn.high - fn.low) * ((z - fn.low) / (fn.high - fn.low)).detach()
    elif isinstance(fn, dist.Exponential):
        new = (z * fn.rate).detach() / fn.rate
    elif isinstance(fn, dist.Gamma):
        s, c = (z * fn.rate).detach(), fn.concentration
        new = (s + torch._standard_gamma_grad(c.detach(), s) * (c - c.detach())) / fn.rate
    elif isinstance(fn, dist.Beta):
        both = torch.stack([fn.concentration1, fn.concentration0], -1)
        return path(dist.Dirichlet(both, validate_args=False), torch.stack([z, 1 - z], -1))[..., 0]
    elif isinstance(fn, dist.Dirichlet):
        c = fn.concentration
        total = c.detach().sum(-1, keepdim=True).expand_as(c).contiguous()
        moved = torch._dirichlet_grad(z.contiguous(), c.detach().contiguous(), total) * (c - c.detach())
        new = moved - z * moved.sum(-1, keepdim=True)
    else:
        return z
    return z + (new - new.detach())


def has_path(fn):
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return not getattr(fn.support, "is_discrete", False)

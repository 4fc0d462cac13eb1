"""Bound and gradients of a pair at given particles, one particle at a time; shares no code with the package.

A *cell* is an index into the plates around all sites. A particle's density is summed within each cell, apart
from what all sites are scaled by, which multiplies the bound.
"""

import itertools
import math

import pyro.distributions as dist
import pyro.poutine as poutine
import torch


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


class Fix(poutine.messenger.Messenger):
    """Gives latent sites and minibatches their values; stops what the caller asks to."""

    def __init__(self, values, along_path=False, stop_parameters=False):
        self.values, self.along_path, self.stop_parameters = values, along_path, stop_parameters

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and not msg["is_observed"]:
            value = self.values[msg["name"]]
            if callable(value):
                value = value(msg["fn"])
            elif type(msg["fn"]).__name__ != "_Subsample":
                value = value.reshape(value.shape[value.dim() - len(msg["fn"].shape()) :])
                value = path(msg["fn"], value) if self.along_path else value
            msg["value"], msg["done"] = value, True

    def _pyro_post_param(self, msg):
        if self.stop_parameters:
            msg["value"] = msg["value"].detach()


def trace(fn, *args, **kwargs):
    with Fix(*args, **kwargs):
        nodes = poutine.trace(fn).get_trace().nodes
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and type(node["fn"]).__name__ != "_Subsample"
        if not node["infer"].get("_deterministic")
    }


def plates(node):
    return {f.name: f for f in node["cond_indep_stack"] if f.vectorized}


def subsampling(node, names=None):
    found = plates(node)
    chosen = [found[name] for name in (found if names is None else names) if name in found]
    return math.prod(f.full_size / f.size for f in chosen if f.full_size)


def log_prob(node, masks=()):
    value, fn = node["value"], node["fn"]
    if node["is_observed"] and value is not None and value.is_floating_point() and node["mask"] is not None:
        value = torch.where(value.isnan(), 0.5, value)
    result = fn.log_prob(value)
    for mask in masks:
        result = result if mask is None else torch.where(torch.as_tensor(mask), result, 0.0)
    return result


class Refuse(Exception):
    """The pair has no bound of this kind: the package has to say so."""


class Reference:
    """Log densities of a pair at particles, each given as a dict of latent values and minibatches."""

    def __init__(self, model, guide, particles, enumerated=None, kl_weight=1.0, linear=False, keep=None):
        self.model, self.guide, self.enumerated = model, guide, enumerated or {}
        self.kl_weight, self.linear, self.keep, self.kept = kl_weight, linear, keep, None
        parts = [self.particle(values) for values in particles]
        self.terms = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        self.log_w = (self.terms["p"] - self.terms["q"]).detach()

    def particle(self, values):
        drawn = trace(self.guide, values, along_path=True)
        z = {**values, **{name: node["value"] for name, node in drawn.items() if not node["is_observed"]}}
        stopped = {name: value.detach() for name, value in z.items()}
        again, live = trace(self.guide, stopped), self.runs(stopped)
        moving = self.runs(z, stop_parameters=True)
        if self.kept is None:
            self.lay_out(drawn, next(iter(live.values())))
        discrete = {name: node for name, node in drawn.items() if not has_path(node["fn"])}
        return {
            "p": self.sum_out(live),  # gradients of the model's parameters alone
            "path": self.sum_out(moving),  # and along the path alone
            "q": self.total(drawn, "guide"),
            "score": self.total(again, "guide"),
            "wake": self.total(again, "guide", plain=True),
            "discrete": self.total(discrete, "guide", plain=True, masked=False),
        }

    def runs(self, values, **options):
        """The model's traces at every combination of the enumerated sites' values."""
        found = {}
        for combination in itertools.product(*(range(size) for size in self.enumerated.values())):
            chosen = {
                name: lambda fn, index=index: fn.enumerate_support()[index]
                for name, index in zip(self.enumerated, combination, strict=True)
            }
            found[combination] = trace(self.model, {**values, **chosen}, **options)
        return found

    def lay_out(self, guide, model):
        """The kept plates, the masks of both sides, and the scale that all sites share."""
        nodes = [*guide.values(), *model.values()]
        common = [name for name in plates(nodes[0]) if all(name in plates(node) for node in nodes)]
        frames = {name: frame for node in nodes for name, frame in plates(node).items()}
        kept = common if self.keep is None else self.keep
        self.kept = sorted((frames[name] for name in kept), key=lambda frame: frame.dim)
        self.lost = [name for name in frames if name not in kept]
        for name in self.lost:
            if frames[name].full_size not in (None, frames[name].size) and not self.linear:
                raise Refuse(f"plate {name!r} is subsampled and not kept")
        self.rank = max([-frame.dim for frame in frames.values()], default=0)
        self.masks = {n: [side[n]["mask"] for side in (guide, model) if n in side] for n in {**guide, **model}}
        own = [torch.as_tensor(self.own_scale(node), dtype=torch.float64) for node in nodes]
        widest = max(own, key=torch.Tensor.dim)
        within = any(n > 1 and i - widest.dim() not in self.dims() for i, n in enumerate(widest.shape))
        self.shared = not within and all(torch.allclose(one.expand_as(widest), widest) for one in own)
        self.scale = math.prod(f.full_size / f.size for f in self.kept if f.full_size)
        if self.shared:
            self.scale = self.scale * (self.cells(widest) if widest.dim() else widest)

    def dims(self):
        return [frame.dim for frame in self.kept]

    def own_scale(self, node):
        return node["scale"] / subsampling(node)

    def reduce(self, tensor, keep):
        """Summed over all batch dims but some, which stay in place."""
        tensor = tensor.reshape((1,) * (self.rank - tensor.dim()) + tensor.shape)
        drop = [dim for dim in range(-tensor.dim(), 0) if dim not in keep]
        return tensor.sum(drop, keepdim=True) if drop else tensor

    def cells(self, tensor):
        tensor = self.reduce(tensor, self.dims())
        shape = [frame.size for frame in self.kept]
        return tensor.reshape([tensor.shape[dim] for dim in self.dims()]).expand(shape)

    def density(self, name, node, role, plain=False, masked=True):
        masks = [node["mask"]] if node["is_observed"] else self.masks[name]
        value = log_prob(node, masks if masked else ())
        if not plain:
            value = value * (subsampling(node, self.lost) * (1.0 if self.shared else self.own_scale(node)))
            prior = role == "guide" or not (node["is_observed"] or name in self.enumerated)
            value = value * self.kl_weight if prior else value
        return value

    def total(self, nodes, role, **options):
        zero = torch.zeros([frame.size for frame in self.kept])
        return sum((self.cells(self.density(n, node, role, **options)) for n, node in nodes.items()), zero)

    def sum_out(self, runs):
        """log p with the enumerated sites summed out, those in the most plates first."""
        first = next(iter(runs.values()))
        where = {name: frozenset(plates(first[name])) for name in self.enumerated}
        levels = sorted({*where.values(), frozenset()}, key=len, reverse=True)
        dims = {n: f.dim for node in first.values() for n, f in plates(node).items()}
        kept = {key: torch.zeros(()) for key in runs}  # by the values of the sites that are left
        left = list(self.enumerated)
        for level in levels:
            keep = {*self.dims(), *(dims[name] for name in level)}
            mine = [n for n in first if level == next(x for x in levels if x <= frozenset(plates(first[n])))]
            summed = {}
            for key, value in kept.items():
                nodes = runs[tuple(key[left.index(n)] if n in left else 0 for n in self.enumerated)]
                value = self.reduce(value, keep)
                value = value + sum(self.reduce(self.density(n, nodes[n], "model"), keep) for n in mine)
                rest = tuple(i for i, n in zip(key, left, strict=True) if where[n] != level)
                summed.setdefault(rest, []).append(value)
            left = [n for n in left if where[n] != level]
            kept = {key: torch.logsumexp(torch.stack(torch.broadcast_tensors(*values)), 0) for key, values in summed.items()}
        return self.cells(kept[()])

    def loss(self, bound):
        return -(self.scale * bound.value(self.grouped(bound))).sum()

    def grouped(self, bound):
        return self.log_w.reshape(bound.M, bound.K, *self.log_w.shape[1:])

    def gradients(self, bound, estimator, leaves):
        l, t = self.grouped(bound), self.terms
        a, _ = derivatives(bound.value, l)
        b, curvature = derivatives(bound.guide_value, l)
        if estimator == "rws":
            weighted = a * 0 + torch.softmax(l, 1) / bound.M
            guide = weighted.reshape(self.log_w.shape) * t["wake"]
        else:
            c = (b - self.kl_weight * curvature if estimator == "dreg" else b).reshape(self.log_w.shape)
            guide = c * (t["path"] - t["q"])
            if estimator in ("stl", "dreg"):
                guide = guide + c * t["score"]
            elif estimator in ("score", "vimco"):
                guide = guide + signal(bound, l, estimator).reshape(self.log_w.shape) * t["discrete"]
        total = -(self.scale * (a.reshape(self.log_w.shape) * t["p"] + guide)).sum()
        found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def derivatives(value, l):
    """First derivatives by the log-weights and the diagonal of the second ones."""
    l = l.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(l).sum(), l, create_graph=True)
    second = torch.zeros_like(l)
    for index in itertools.product(range(l.shape[0]), range(l.shape[1])):
        if first.requires_grad:
            second[index] = torch.autograd.grad(first[index].sum(), l, retain_graph=True)[0][index]
    return first.detach(), second


def signal(bound, l, estimator):
    """The guide's bound less its value with a particle's log-weight replaced by what the others suggest."""
    value, result = bound.guide_value(l), torch.empty_like(l)
    for m, k in itertools.product(range(bound.M), range(bound.K)):
        changed = l.clone()
        others = [l[m, j] for j in range(bound.K) if j != k] if bound.K > 1 else []
        if estimator == "score" and (bound.linear or bound.K == 1):
            others = [l[n, j] for n in range(bound.M) for j in range(bound.K) if (n, j) != (m, k)]
        if others:
            others = torch.stack(others)
            mean = torch.logsumexp(others, 0) - math.log(len(others))
            changed[m, k] = others.mean(0) if estimator == "vimco" or bound.linear else mean
        result[m, k] = value - (bound.guide_value(changed) if len(others) else 0.0)
    return result

"""Bound and gradients of a pair at given particles, one particle at a time; shares no code with the package.

A *cell* is an index into the plates around all sites, in which a particle's density is summed. What all
sites are scaled by, a minibatch or a common ``poutine.scale``, multiplies the bound.
"""

import itertools
import math
from functools import partial

import torch

from .bounds import derivatives, signal
from .replay import has_path, log_prob, own_scale, plates, proposal, run, subsampling


class Refuse(Exception):
    """The pair has no bound of this kind: the package has to say so."""


class Reference:
    """Log densities ``[S, *cells]`` of a pair at particles, each a dict of latent values and minibatches."""

    def __init__(self, pair, particles, kl_weight=1.0, linear=False, keep=None):
        self.model, self.guide, self.enumerated = pair.model, pair.guide, pair.enumerated
        self.kl_weight, self.linear, self.keep, self.kept = kl_weight, linear, keep, None
        parts = [self.particle(values) for values in particles]
        self.terms = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        self.log_w = (self.terms["p"] - self.terms["q"]).detach()

    def particle(self, values):
        drawn = proposal(self.guide, values, along_path=True)
        z = {**values, **{name: site["value"] for name, site in drawn.items() if not site["is_observed"]}}
        live = self.runs(stopped := {name: value.detach() for name, value in z.items()})
        if self.kept is None:
            self.lay_out(drawn, next(iter(live.values())))
        p, q = self.sum_out(live), self.total(drawn, "guide")
        if not torch.is_grad_enabled():
            return {"p": p, "q": q}
        again, moving = proposal(self.guide, stopped), self.runs(z, stop_parameters=True)
        discrete = {name: site for name, site in drawn.items() if not has_path(site["fn"])}
        return {
            "p": p,  # its gradient is that of the model's parameters alone
            "path": self.sum_out(moving),  # and this one's, that of the path alone
            "q": q,
            "score": self.total(again, "guide"),
            "wake": self.total(again, "guide", plain=True),
            "discrete": self.total(discrete, "guide", plain=True, masked=False),
        }

    def runs(self, values, **options):
        """The model's sites at every combination of the enumerated sites' values."""
        found, names = {}, [*self.enumerated]
        for key in itertools.product(*(range(size) for size in self.enumerated.values())):
            chosen = {n: lambda fn, i=i: fn.enumerate_support()[i] for n, i in zip(names, key, strict=True)}
            found[key] = run(self.model, {**values, **chosen}, **options)
        return found

    def lay_out(self, guide, model):
        """The kept plates, the masks of both sides, and the scale that all sites share."""
        sites = [*guide.values(), *model.values()]
        frames = {name: frame for site in sites for name, frame in plates(site).items()}
        common = [name for name in frames if all(name in plates(site) for site in sites)]
        if not {*(self.keep or ())} <= {*common}:
            raise Refuse(f"not all sites lie in the plates {self.keep}")
        names = common if self.keep is None else self.keep
        self.kept = sorted((frames[name] for name in names), key=lambda frame: frame.dim)
        self.dims, self.sizes = [f.dim for f in self.kept], [f.size for f in self.kept]
        self.lost = [name for name in frames if name not in names]
        for name in self.lost:
            if frames[name].full_size not in (None, frames[name].size) and not self.linear:
                raise Refuse(f"plate {name!r} is subsampled and not kept")
        self.rank = max([-frame.dim for frame in frames.values()], default=0)
        both = {n: [side[n]["mask"] for side in (guide, model) if n in side] for n in guide | model}
        self.masks = {n: both.get(n.removesuffix("_unconstrained"), both[n]) for n in both}
        own = [torch.as_tensor(own_scale(site), dtype=torch.float64) for site in sites]
        widest = max(own, key=torch.Tensor.dim)
        within = any(n > 1 and i - widest.dim() not in self.dims for i, n in enumerate(widest.shape))
        self.shared = not within and all(torch.allclose(one, widest) for one in own)
        self.scale = math.prod(frame.full_size / frame.size for frame in self.kept if frame.full_size)
        if self.shared:
            self.scale = self.scale * (self.cells(widest) if widest.dim() else widest)
        self.guide_scale = 1.0 if self.shared or self.linear else own_scale(next(iter(guide.values())))

    def reduce(self, tensor, keep):
        """Summed over all batch dims but some; all stay in place."""
        tensor = tensor.reshape((1,) * (self.rank - tensor.dim()) + tensor.shape)
        drop = [dim for dim in range(-tensor.dim(), 0) if dim not in keep]
        return tensor.sum(drop, keepdim=True) if drop else tensor

    def cells(self, tensor):
        tensor = self.reduce(tensor, self.dims)
        return tensor.reshape([tensor.shape[dim] for dim in self.dims]).expand(self.sizes)

    def density(self, name, site, role, plain=False, masked=True, level=frozenset()):
        masks = [site["mask"]] if site["is_observed"] else self.masks[name]
        value = log_prob(site, masks if masked else ())
        if plain:
            return value
        value = value * subsampling(site, set(self.lost) - level) * (1.0 if self.shared else own_scale(site))
        prior = role == "guide" or not (site["is_observed"] or name in self.enumerated)
        return value * self.kl_weight if prior else value

    def total(self, sites, role, **options):
        found = [self.cells(self.density(name, site, role, **options)) for name, site in sites.items()]
        return sum(found, torch.zeros(self.sizes))

    def sum_out(self, runs):
        """log p with the enumerated sites summed out, those in the most plates first."""
        sites = next(iter(runs.values()))
        where = {name: frozenset(plates(sites[name])) for name in self.enumerated}
        levels = sorted({*where.values(), frozenset()}, key=len, reverse=True)
        left, found = list(self.enumerated), {key: torch.zeros(()) for key in runs}
        frames = {name: frame for site in sites.values() for name, frame in plates(site).items()}
        for level, above in zip(levels, [*levels[1:], frozenset()], strict=True):
            keep = {*self.dims, *(frames[name].dim for name in level)}
            scale = math.prod(frames[n].full_size / frames[n].size for n in level - above if n in self.lost)
            mine = [n for n in sites if level == next(x for x in levels if x <= plates(sites[n]).keys())]
            summed = {}
            for key, value in found.items():
                at = runs[tuple(key[left.index(n)] if n in left else 0 for n in self.enumerated)]
                terms = [value, *(self.density(n, at[n], "model", level=level) for n in mine)]
                value = sum(self.reduce(term, keep) for term in terms)
                rest = tuple(i for i, n in zip(key, left, strict=True) if where[n] != level)
                summed.setdefault(rest, []).append(value)
            left = [n for n in left if where[n] != level]
            stacked = {key: torch.stack(torch.broadcast_tensors(*v)) for key, v in summed.items()}
            found = {key: scale * torch.logsumexp(terms, 0) for key, terms in stacked.items()}
        return self.cells(found[()])

    def loss(self, bound):
        return -(self.scale * bound.value(self.log_w.reshape(bound.M, bound.K, *self.sizes))).sum()

    def gradients(self, bound, estimator, leaves):
        """Gradients of the loss as the estimator defines them."""
        log_w, t = self.log_w.reshape(bound.M, bound.K, *self.sizes), self.terms
        flat = partial(torch.reshape, shape=self.log_w.shape)
        a, _ = derivatives(bound.value, log_w)
        b, curvature = derivatives(bound.guide_value, log_w)
        b = b - self.kl_weight * self.guide_scale * curvature if estimator == "dreg" else b
        guide = flat(b) * (t["path"] - t["q"])
        if estimator in ("stl", "dreg"):
            guide = guide + flat(b) * t["score"]
        elif estimator in ("score", "vimco", "ovis"):
            guide = guide + flat(signal(bound, log_w, estimator)) * t["discrete"]
        elif estimator == "rws":
            guide = flat(torch.softmax(log_w, 1) / bound.M) * t["wake"]
        total = -(self.scale * (flat(a) * t["p"] + guide)).sum()
        total = total + sum(0 * leaf.sum() for leaf in leaves)  # of which there may be nothing to learn
        return list(torch.autograd.grad(total, leaves)) if leaves else []

"""Bound and gradients of a pair at particles on two levels, one local particle at a time.

Sites in a local plate have densities for each pair (s, l) of a particle and a local one, in *cells*: the
plate's indices, those of plates around it at all of its sites, and of those that have an outer bound each.
"""

import itertools
import math

import torch

from .bounds import replacement
from .replay import Fix, has_path, log_prob, plates, proposal, run, subsampling


class Levels:
    """Log densities of both levels, ``[S, *cells]`` and ``[S, L, *cells]``, as functions of nothing else."""

    def __init__(self, pair, over, particles, kl_weight):
        self.pair, self.over, self.kl_weight = pair, over, kl_weight
        self.top, self.local = [], []
        for s, row in enumerate(particles):
            terms = [self.terms(values) for values in row]
            if s == 0:
                self.lay_out(*terms[0]["all"])
            self.top.append(self.reduced(terms[0], False))
            self.local.append([self.reduced(term, True) for term in terms])

        def at(key):
            top = torch.stack([term[key] for term in self.top])
            return top, torch.stack([torch.stack([term[key] for term in row]) for row in self.local])

        self.densities = {key: at(key) for key in self.top[0]}
        (p, local_p), (q, local_q) = self.densities["p"], self.densities["q"]
        self.log_w = (p - q).detach(), (local_p - local_q).detach()

    def terms(self, values):
        """Sites by role and how their values and parameters were stopped, for one particle of each level."""
        model, guide = self.pair.model, self.pair.guide
        drawn = proposal(guide, values, along_path=True)
        z = {**values, **{name: site["value"] for name, site in drawn.items() if not site["is_observed"]}}
        stopped = {name: value.detach() for name, value in z.items()}
        inside = {name for name, site in drawn.items() if self.over in plates(site)}
        half = {name: value.detach() if name in inside else value for name, value in z.items()}
        live = run(model, stopped)
        found = {"all": (drawn, live), "p": ("model", live), "q": ("guide", drawn)}
        if torch.is_grad_enabled():
            discrete = {name: site for name, site in drawn.items() if not has_path(site["fn"])}
            found |= {
                "path": ("model", run(model, z, stop_parameters=True)),
                "from above": ("model", run(model, half, stop_parameters=True)),
                "score": ("guide", proposal(guide, stopped)),
                "score given above": ("guide", self.given_above(values, half, inside)),
                "discrete": ("guide", discrete),
            }
        return found

    def given_above(self, values, half, inside):
        """The guide's densities of stopped local values, given the live ones above."""
        fixed = {n: half[n] for n in inside}
        rest = {n: value for n, value in values.items() if n not in inside}
        with Fix(fixed):
            return proposal(self.pair.guide, rest, along_path=True)

    def lay_out(self, guide, model):
        sites = [*guide.values(), *model.values()]
        frames = {name: frame for site in sites for name, frame in plates(site).items()}
        inside = [site for site in sites if self.over in plates(site)]
        self.kept = [n for n in frames if n != self.over and all(n in plates(site) for site in sites)]

        def is_around(name):
            orders = [list(plates(site)) for site in inside]  # the outermost first
            return all(name in o and o.index(name) <= o.index(self.over) for o in orders)

        cells = [n for n in frames if n in self.kept or is_around(n)]
        by_dim = lambda names: sorted(names, key=lambda name: frames[name].dim)  # noqa: E731
        self.kept, self.cells, self.frames = by_dim(self.kept), by_dim(cells), frames
        self.rank = max([-frame.dim for frame in frames.values()], default=0)
        self.scale = self.full(self.kept) * (1.0 if self.pair.scale is None else self.pair.scale)
        self.cell_scale = self.full([n for n in self.cells if n not in self.kept])
        both = {n: [side[n]["mask"] for side in (guide, model) if n in side] for n in guide | model}
        self.masks = {n: both.get(n.removesuffix("_unconstrained"), both[n]) for n in both}

    def full(self, names):
        """N / B of these plates."""
        frames = [self.frames[name] for name in names]
        return math.prod(frame.full_size / frame.size for frame in frames if frame.full_size)

    def reduced(self, terms, inside):
        found = {}
        for key in terms.keys() - {"all"}:
            role, sites = terms[key]
            names = self.cells if inside else self.kept
            sizes = [self.frames[name].size for name in names]
            total = torch.zeros(sizes, dtype=self.pair.dtype)
            for name, site in sites.items():
                if (self.over in plates(site)) == inside:
                    total = total + self.density(name, site, role, key, names).expand(sizes)
            found[key] = total
        return found

    def density(self, name, site, role, key, cells):
        masks = [site["mask"]] if site["is_observed"] else self.masks[name]
        plain = key == "discrete"
        value = log_prob(site, () if plain else masks)
        if not plain:
            value = value * subsampling(site, set(plates(site)) - set(cells))
            if role == "guide" or not site["is_observed"]:
                value = value * self.kl_weight
        value = value.reshape((1,) * (self.rank - value.dim()) + value.shape)
        dims = [self.frames[cell].dim for cell in cells]
        drop = [dim for dim in range(-value.dim(), 0) if dim not in dims]
        value = value.sum(drop, keepdim=True) if drop else value
        return value.reshape([value.shape[dim] for dim in dims])

    def total(self, inner, top, local):
        """Log-weights of the particles, ``[S, *kept]``, from those of both levels."""
        U = torch.stack([inner.value(row.reshape(inner.M, inner.K, *row.shape[1:])) for row in local])
        drop = [1 + i for i, name in enumerate(self.cells) if name not in self.kept]
        return top + self.cell_scale * (U.sum(drop) if drop else U)

    def value(self, outer_value, outer, inner, top, local):
        total = self.total(inner, top, local)
        return outer_value(total.reshape(outer.M, outer.K, *total.shape[1:])).sum()

    def loss(self, outer, inner):
        return -self.scale * self.value(outer.value, outer, inner, *self.log_w)

    def gradients(self, outer, inner, estimator, leaves):
        """Gradients of the loss as the estimator defines them."""
        first, _ = self.derivatives(outer.value, outer, inner)
        second, curvature = self.derivatives(outer.guide_value, outer, inner)
        d, total = self.densities, 0.0
        for level, (a, b) in enumerate(zip(first, second, strict=True)):
            at = {key: pair[level] for key, pair in d.items()}
            guide = b * (at["path"] - at["q"])
            if estimator == "stl" or (estimator == "dreg" and level == 0 and outer.linear):
                guide = guide + b * at["score"]
            elif estimator == "dreg" and level == 1:
                c = b - self.kl_weight * curvature
                # Along the local latents, and along those above that the model sees without them.
                guide = c * (at["path"] - at["from above"]) + b * at["from above"]
                guide = guide - c * (at["q"] - at["score given above"])
            elif estimator in ("score", "vimco", "ovis"):
                guide = guide + self.signal(level, outer, inner, estimator) * at["discrete"]
            total = total - self.scale * (a * at["p"] + guide).sum()
        total = total + sum(0 * leaf.sum() for leaf in leaves)
        return list(torch.autograd.grad(total, leaves)) if leaves else []

    def derivatives(self, outer_value, outer, inner):
        """First derivatives by the log-weights of both levels, and second ones by each local one."""
        log_w = [part.clone().requires_grad_() for part in self.log_w]
        value = self.value(outer_value, outer, inner, *log_w)
        first = torch.autograd.grad(value, log_w, create_graph=True, materialize_grads=True)
        second = torch.zeros_like(log_w[1])
        if first[1].requires_grad:
            for index in itertools.product(*map(range, second.shape)):
                (row,) = torch.autograd.grad(
                    first[1][index], log_w[1], retain_graph=True, materialize_grads=True
                )
                second[index] = row[index]
        return [part.detach() for part in first], second

    def signal(self, level, outer, inner, estimator):
        """The bound less its value without a particle of a level, for each of that level's cells."""
        top, local = self.log_w
        total = self.total(inner, top, local)
        rows = total.reshape(outer.M, outer.K, *total.shape[1:])
        value = outer.guide_value(rows)
        if level == 0 or inner.M * inner.K == 1:
            kind = "score" if outer.K == 1 or level == 1 else estimator
            result = torch.empty_like(total)
            for s in range(len(total)):
                m, k = divmod(s, outer.K)
                other, changed = replacement(outer, rows, m, k, kind), rows.clone()
                if other is not None:
                    changed[m, k] = other
                result[s] = value - (outer.guide_value(changed) if other is not None else 0.0)
            if level == 0:
                return result
            for i, name in enumerate(self.cells):
                result = result if name in self.kept else result.unsqueeze(1 + i)
            return result.unsqueeze(1).expand(local.shape)
        result = torch.empty_like(local)
        kind = "score" if inner.K == 1 else estimator
        for index in itertools.product(*map(range, local.shape)):
            s, k, *cell = index
            changed, row = local.clone(), local[s].reshape(inner.M, inner.K, *local.shape[2:])
            changed[index] = replacement(inner, row, *divmod(k, inner.K), kind)[tuple(cell)]
            without = self.value(outer.guide_value, outer, inner, top, changed)
            result[index] = value.sum() - without
        return result


def local_particles(recorded, S, L):
    """Values of each pair of a particle and a local one, from a run on all of them."""
    particles = []
    for s, k in itertools.product(range(S), range(L)):
        values = {}
        for name, (value, is_minibatch) in recorded.items():
            if not is_minibatch and S * L > 1:
                value = value[s if len(value) > 1 else 0]
                value = value[k if len(value) > 1 else 0]
            values[name] = value
        particles.append(values)
    return [particles[s * L : (s + 1) * L] for s in range(S)]

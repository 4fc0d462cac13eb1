r"""
Hierarchical models
===================

A population with a mean and a spread, and an effect for each of its members: global
latents, and a local one for each index of a plate. One importance weight for everything
fails as the plate grows. A weight for each local latent, given the global ones, does not.
"""

# %%
# Two hundred small groups
# ------------------------
#
# Each member has three observations; the spread ``tau`` of the effects is what one wants to
# know.

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import ClippedAdam

from pyro_iw import IWAE_ELBO, MIWAE_ELBO, ImportanceSampler, LocallyEnhancedELBO
from pyro_iw.bounds import IWAE

pyro.set_rng_seed(0)
effects = 1.0 + 0.5 * torch.randn(200)
y = effects[:, None] + torch.randn(200, 3)
positive = dist.constraints.positive


def data(y, mean, tau, size=None):
    with pyro.plate("member", len(y), size, dim=-1) as rows:
        effect = pyro.sample("effect", dist.Normal(mean, tau))
        observed = (
            dist.Normal(effect[..., None], 1.0).expand((*effect.shape, 3)).to_event(1)
        )
        pyro.sample("y", observed, obs=y[rows])


def model(y, size=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(-1.0, 1.0))
    data(y, mean, tau, size)


# %%
# A guide for members alike
# -------------------------
#
# One rule for all members, from the average of their data to their effect. It does not know
# ``mean`` and ``tau``, as most amortised guides do not, so it cannot be the conditional
# posterior.


def members(y, size=None):
    weight, offset = (
        pyro.param("weight", torch.tensor(0.5)),
        pyro.param("offset", torch.tensor(0.0)),
    )
    width = pyro.param("width", torch.tensor(0.5), constraint=positive)
    with pyro.plate("member", len(y), size, dim=-1) as rows:
        pyro.sample("effect", dist.Normal(offset + weight * y[rows].mean(-1), width))


def guide(y, size=None):
    loc = pyro.param("loc", torch.zeros(2))
    scale = pyro.param("scale", 0.2 * torch.ones(2), constraint=positive)
    pyro.sample("mean", dist.Normal(loc[0], scale[0]))
    pyro.sample("tau", dist.LogNormal(loc[1], scale[1]))
    members(y, size)


# %%
# One weight for all
# ------------------
#
# Training with the ELBO, with the joint IWAE, and on two levels: ``local=IWAE(16)`` gives
# each member 16 particles of its own. The last works on minibatches too; here, of 50
# members.


def fit(loss, *size, steps=800):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.02, "lrd": 0.998}), loss=loss)
    for _ in range(steps):
        svi.step(y, *size)
    return {name: value.clone() for name, value in pyro.get_param_store().items()}


fits = {
    "ELBO": fit(MIWAE_ELBO(M=4, K=1)),
    "joint IWAE(16)": fit(IWAE_ELBO(K=16)),
    "two levels": fit(LocallyEnhancedELBO(local=IWAE(16), over="member"), 50),
}

# %%
# The spread of the population
# ----------------------------
#
# With the effects integrated out by hand, the posterior of ``mean`` and ``tau`` can be had
# on a grid, and compared with the guide of each fit.

grid = torch.linspace(0.2, 0.9, 200)
means = torch.linspace(0.6, 1.4, 81)
average, marginal = y.mean(-1), (grid**2 + 1 / 3).sqrt()
log_joint = dist.Normal(means[:, None], marginal).log_prob(average[:, None, None]).sum(0)
log_joint = (
    log_joint
    + dist.Normal(0.0, 2.0).log_prob(means)[:, None]
    + dist.LogNormal(-1.0, 1.0).log_prob(grid)
)
posterior = log_joint.logsumexp(0).softmax(0) / (grid[1] - grid[0])

fig, ax = plt.subplots()
ax.fill_between(grid, posterior, color="0.85", label="posterior")
for name, params in fits.items():
    log_tau = dist.LogNormal(params["loc"][1], params["scale"][1]).log_prob(grid)
    ax.plot(grid, log_tau.exp().detach(), label=name)
ax.axvline(0.5, color="black", linestyle=":", linewidth=1, label="true value")
ax.set(xlabel="tau", ylabel="density", ylim=(0, None))
ax.legend()
plt.show()

# %%
# Why the joint weight fails
# --------------------------
#
# It is a product over all members. Here ``mean`` and ``tau`` are held at their true values,
# so that there is nothing else to weigh: the ESS of 1000 particles with one weight for all
# members, and with a weight for each. This guide fits well, and still 200 members leave a
# tenth; what each of them takes away is a factor.

pyro.clear_param_store()
for name, value in fits["two levels"].items():
    constraint = positive if name in {"scale", "width"} else dist.constraints.real
    pyro.param(name, value.detach(), constraint=constraint)


def known(y):
    data(y, 1.0, 0.5)


numbers, joint, own = (1, 2, 5, 10, 20, 50, 100, 200), [], []
for n in numbers:
    joint.append(
        ImportanceSampler(known, members, num_particles=1000, plates=())(y[:n]).ess
    )
    own.append(ImportanceSampler(known, members, num_particles=1000)(y[:n]).ess.mean())

fig, ax = plt.subplots()
ax.loglog(numbers, joint, "o-", label="one weight for all")
ax.loglog(numbers, own, "o-", label="a weight for each member")
ax.set_xticks(numbers, numbers)
ax.minorticks_off()
ax.set(xlabel="members", ylabel="ESS of 1000", ylim=(0.9, 1300))
ax.legend(loc="lower left")
plt.show()

# %%
# Shrinkage
# ---------
#
# ``local=`` gives the sampler local particles too: 16 for each member and each of 1000
# draws of ``mean`` and ``tau``. Posterior means of the effects come from the same weights.
# They lie between a member's own average and the population's.

samples = ImportanceSampler(model, guide, num_particles=1000, local={"member": 16})(y)
estimate = samples.expectation("effect")
fig, ax = plt.subplots(figsize=(4.4, 4))
ax.scatter(average, estimate, s=8, alpha=0.7)
ax.plot([-1, 3], [-1, 3], color="black", linestyle=":", linewidth=1, label="no shrinkage")
ax.axhline(samples.expectation("mean"), color="C1", linewidth=1, label="population mean")
ax.set(
    xlabel="average of the member's data",
    ylabel="posterior mean of the effect",
    aspect="equal",
)
ax.legend()
plt.show()
for name, value in {"averages": average, "posterior means": estimate}.items():
    print(f"rms error of {name:15s} {(value - effects).square().mean().sqrt():.3f}")

# %%
# More in :doc:`../hierarchical`, among it several plates side by side and what to do when
# minibatches do not cover a group.

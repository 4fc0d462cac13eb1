r"""
From an ELBO to MIWAE in ten minutes
====================================

One model and one guide in Pyro, trained with the ELBO and then with ``MIWAE_ELBO``: one
line changes. The model is small enough for its :math:`\log p(x)` to be written down, so
that what each loss does to it can be seen.
"""

# %%
# Two causes of one effect
# ------------------------
#
# Every datapoint has two hidden causes, and is the sum of both, measured three times.
# Learned are the ``strength`` of the causes and the ``noise`` of the measurements.

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_iw import IWAE_ELBO, MIWAE_ELBO, ImportanceSampler

pyro.set_rng_seed(0)
causes = torch.randn(400, 2)
x = 1.0 * causes.sum(-1, keepdim=True) + 0.5 * torch.randn(400, 3)  # strength 1, noise 0.5
positive = dist.constraints.positive


def model(x):
    strength = pyro.param("strength", torch.tensor(0.7), constraint=positive)
    noise = pyro.param("noise", torch.tensor(0.7), constraint=positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        effect = strength * z.sum(-1, keepdim=True)
        pyro.sample(
            "x",
            dist.Normal(effect.expand((*effect.shape[:-1], 3)), noise).to_event(1),
            obs=x,
        )


# %%
# A guide that is too simple
# --------------------------
#
# The usual one: independent normals, whose means are a function of the data. But if the sum
# is known and one cause is large, the other must be small, so the posterior is correlated.
# No setting of the guide's parameters can say that.


def guide(x):
    slope = pyro.param("slope", 0.3 * torch.ones(2))
    width = pyro.param("width", 0.5 * torch.ones(2), constraint=positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x.mean(-1, keepdim=True), width).to_event(1))


# %%
# Training
# --------
#
# An ordinary loop. Which bound it climbs is the argument ``loss``.


def train(loss, steps=500):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi, path = SVI(model, guide, Adam({"lr": 0.02}), loss=loss), []
    for _ in range(steps):
        svi.step(x)
        path.append((pyro.param("strength").item(), pyro.param("noise").item()))
    return torch.tensor(path)


paths = {
    "ELBO": train(
        Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    )
}
elbo_params = pyro.get_param_store().get_state()

# %%
# The one line
# ------------
#
# ``MIWAE_ELBO(M=8, K=8)`` has 64 particles too. It averages the weights of ``K = 8`` inside
# the logarithm, which tightens the bound, and does so ``M = 8`` times, which keeps the
# noise of the guide's gradient down:
#
# .. math::
#     \frac1M \sum_{m=1}^M \log \frac1K \sum_{k=1}^K
#     \frac{p_\theta(x, z_{mk})}{q_\phi(z_{mk} \mid x)}
#
# ``IWAE_ELBO(K=64)`` has all of them inside.

paths["MIWAE(8, 8)"] = train(MIWAE_ELBO(M=8, K=8))
miwae_params = pyro.get_param_store().get_state()
paths["IWAE(64)"] = train(IWAE_ELBO(K=64))

# %%
# What each loss makes of the model
# ---------------------------------
#
# The dotted lines are the maximum of :math:`\log p(x)` itself. The ELBO weakens the causes
# and blames the noise: weaker causes have a posterior that is less correlated, which suits
# the guide. That is a bias of the bound, and no amount of data or training takes it away.

within = x.var(-1).mean()
between = (x.mean(-1).square().mean() - within / 3) / 2
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2))
for i, (ax, name, best) in enumerate(
    zip(axes, ("strength", "noise"), (between, within), strict=True)
):
    for label, path in paths.items():
        ax.plot(path[:, i], label=label)
    ax.axhline(best.sqrt(), color="black", linestyle=":", linewidth=1.2)
    ax.set(xlabel="step", title=name)
axes[1].legend()
plt.show()

# %%
# Where the guide ends
# --------------------
#
# One datapoint: its posterior under each model, and the guide that goes with it, at two
# standard deviations. The ELBO's guide fits into the posterior, since draws outside cost
# much, and the posterior has come to meet it: it is rounder. With several weights inside
# the logarithm a draw that misses costs little, so the guide covers the posterior and the
# model need not care.


def ellipse(mean, covariance, ax, **kwargs):
    angle = torch.linspace(0, 6.2832, 100)
    circle = 2 * torch.stack([angle.cos(), angle.sin()])
    ax.plot(*(mean[:, None] + torch.linalg.cholesky(covariance) @ circle), **kwargs)


one = x[x.mean(-1).argmax()].mean()
fig, axes = plt.subplots(1, 2, figsize=(7, 3.4), sharex=True, sharey=True)
for ax, (name, state) in zip(
    axes, {"ELBO": elbo_params, "MIWAE(8, 8)": miwae_params}.items(), strict=True
):
    pyro.get_param_store().set_state(state)
    strength, noise, slope, width = (
        pyro.param(parameter).detach()
        for parameter in ("strength", "noise", "slope", "width")
    )
    covariance = torch.linalg.inv(
        torch.eye(2) + 3 * strength**2 / noise**2 * torch.ones(2, 2)
    )
    mean = covariance @ torch.ones(2) * 3 * strength / noise**2 * one
    ellipse(mean, covariance, ax, color="black", label="posterior")
    ellipse(slope * one, width.square().diag(), ax, label="guide")
    ax.set(title=name, xlabel="first cause", aspect="equal")
axes[0].set_ylabel("second cause")
axes[0].legend()
plt.show()

# %%
# One measure for both
# --------------------
#
# Losses of different bounds do not compare: a lower one may be a better model, or a tighter
# bound of the same. :math:`\log \hat p(x)` from many particles judges models alike,
# whatever they were trained with.

for name, state in (("ELBO", elbo_params), ("MIWAE", miwae_params)):
    pyro.get_param_store().set_state(state)
    samples = ImportanceSampler(model, guide, num_particles=2000)(x)
    strength, noise = pyro.param("strength"), pyro.param("noise")
    covariance = 2 * strength**2 * torch.ones(3, 3) + noise**2 * torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    estimate, truth = samples.log_marginal.mean(), exact.mean()
    print(f"{name:6s} log p(x) per datapoint {estimate:.3f}, exact {truth:.3f}")

# %%
# Where next: :doc:`../which_bound` compares all losses, and :doc:`is_my_fit_any_good` asks
# of a single fit what the table above asked of two.

r"""
A bound of your own
===================

A bound is a function of log-weights. Written in a few lines of PyTorch it has gradients, plates, minibatches
and estimators at once. The example is the jackknife of IWAE (Nowozin, 2018), which takes out the leading term
of the bias:

.. math:: V = K\, L_K - (K - 1)\, \frac1K \sum_{i=1}^K L_{K - 1}^{(-i)}

with :math:`L_K` the logarithm of the mean of K weights, and :math:`L^{(-i)}` the same without the i-th.
"""

# %%
# The formula
# -----------
#
# ``log_w`` has shape ``[M, K, *cells]``; the first two dims go. The mean without one weight is the whole sum
# less that weight; ``log1p`` keeps it exact where one weight is almost everything.

import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from pyro_iw import IWAE_ELBO, Bound, ImportanceWeightedELBO
from pyro_iw.bounds import IWAE


class Jackknife(Bound):
    def __init__(self, K):
        super().__init__(K=K)

    def value(self, log_w):
        K = self.K
        total = log_w.logsumexp(1, keepdim=True)
        others = total + torch.log1p(-(log_w - total).exp().clamp(max=1 - 1e-6))
        whole = (total - math.log(K)).squeeze(1)
        without = (others - math.log(K - 1)).mean(1)
        return (K * whole - (K - 1) * without).mean(0)


# %%
# Does it do what it says?
# ------------------------
#
# On weights with a known mean. A log-normal weight :math:`w = e^{\sigma \epsilon - \sigma^2 / 2}` has mean 1,
# so the truth is 0 and what is left is bias.

pyro.set_rng_seed(0)
Ks, sigma, draws = (2, 4, 8, 16, 32, 64), 0.7, 400_000
bias = {"IWAE": [], "jackknife": []}
for K in Ks:
    log_w = sigma * torch.randn(1, K, draws, dtype=torch.float64) - sigma**2 / 2
    bias["IWAE"].append(-IWAE(K).value(log_w).mean())
    bias["jackknife"].append(-Jackknife(K).value(log_w).mean())

fig, ax = plt.subplots()
for name, values in bias.items():
    ax.loglog(Ks, torch.stack(values).abs(), "o-", label=name)
for power, style in ((1, ":"), (2, "--")):
    guide_line = [bias[("IWAE", "jackknife")[power - 1]][3].abs() * (16 / K) ** power for K in Ks]
    ax.loglog(Ks, guide_line, color="grey", linestyle=style, linewidth=1, label=f"slope -{power}")
ax.set(xlabel="K", ylabel="distance from the truth [nats]")
ax.legend()
plt.show()

# %%
# A model
# -------
#
# A normal mean of each datapoint, seen through noise; the guide is too wide and off to one side.


def model(x):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    weight = pyro.param("weight", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight * x, 1.0))


x = math.sqrt(1 + 2.0**2) * torch.randn(500)  # scale 2
exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).mean().item()

# %%
# As a loss
# ---------
#
# ``ImportanceWeightedELBO`` takes the bound; from there on it is a loss like all others.

pyro.clear_param_store()
for K in (4, 16, 64):
    for loss in (IWAE_ELBO(K=K), ImportanceWeightedELBO(Jackknife(K))):
        values = torch.tensor([-loss.loss(model, guide, x) / len(x) for _ in range(50)])
        print(f"{loss!s:45s} {values.mean() - exact:+.4f} +- {values.std() / 50**0.5:.4f}")

# %%
# Training with it
# ----------------
#
# The particle weights come from autograd, and so does ``estimator="dreg"``, which needs second derivatives as
# well. The guide's width is fixed and wrong, so that IWAE with few particles settles on a scale of the model
# that is too small.


def train(loss, steps=400):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi, scales = SVI(model, guide, Adam({"lr": 0.02}), loss=loss), []
    for _ in range(steps):
        svi.step(x)
        scales.append(pyro.param("scale").item())
    return scales


fig, ax = plt.subplots()
for name, loss in (
    ("IWAE(4)", IWAE_ELBO(K=4)),
    ("jackknife(4)", ImportanceWeightedELBO(Jackknife(4))),
    ("jackknife(4), dreg", ImportanceWeightedELBO(Jackknife(4), estimator="dreg")),
):
    scales = train(loss)
    ax.plot(scales, label=name)
    print(f"{name:20s} scale {sum(scales[-100:]) / 100:.3f}")
best = (x.square().mean() - 1).sqrt().item()
ax.axhline(best, color="black", linestyle=":", linewidth=1, label="maximum likelihood")
ax.set(xlabel="step", ylabel="scale of the model")
ax.legend()
plt.show()
print(f"{'maximum likelihood':20s} scale {best:.3f}")

# %%
# Not a bound, to be honest
# -------------------------
#
# What is corrected for its bias may lie above :math:`\log p(x)`, and a guide can make use of that: it climbs
# :math:`V` whether or not :math:`V` still means anything. Keep such a formula for evaluation, or give the
# guide another one to climb: the property ``guide_bound``, see :doc:`../your_own_bound`.


class Honest(Jackknife):
    @property
    def guide_bound(self):
        return IWAE(self.K)


scales = train(ImportanceWeightedELBO(Honest(4)))
print(f"guide climbs IWAE(4): scale {sum(scales[-100:]) / 100:.3f}, weight {pyro.param('weight').item():.2f}")

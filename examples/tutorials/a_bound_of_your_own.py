r"""
A bound of your own
===================

A bound is a function of log-weights. Written in a few lines of PyTorch it has gradients,
plates, minibatches and estimators at once. The example is the jackknife of IWAE (Nowozin,
2018), which takes out the leading term of the bias:

.. math:: V = K\, L_K - (K - 1)\, \frac1K \sum_{i=1}^K L_{K - 1}^{(-i)}

with :math:`L_K` the logarithm of the mean of K weights, and :math:`L^{(-i)}` the same
without the i-th.
"""

# %%
# The formula
# -----------
#
# ``log_w`` has shape ``[M, K, *cells]``; the first two dims go. The mean without one weight
# is the whole sum less that weight; ``log1p`` keeps it exact where one weight is almost
# everything.

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
# On weights with a known mean. A log-normal weight :math:`w = e^{\sigma \epsilon - \sigma^2
# / 2}` has mean 1, so the truth is 0 and what is left is bias. (The mean weight less 1 has
# expectation 0 and most of the noise: it is taken off.)

pyro.set_rng_seed(0)
Ks, sigma = (4, 8, 16, 32, 64), 0.7
bias = {"IWAE": [], "jackknife": []}
for K in Ks:
    log_w = sigma * torch.randn(1, K, 200_000, dtype=torch.float64) - sigma**2 / 2
    noise = log_w.exp().mean((0, 1)) - 1
    bias["IWAE"].append((IWAE(K).value(log_w) - noise).mean().abs())
    bias["jackknife"].append((Jackknife(K).value(log_w) - noise).mean().abs())

fig, ax = plt.subplots()
for (name, values), power in zip(bias.items(), (1, 2), strict=True):
    (line,) = ax.loglog(Ks, values, "o-", label=name)
    slope = [values[0] * (Ks[0] / K) ** power for K in Ks]
    ax.loglog(Ks, slope, ":", color=line.get_color(), linewidth=1, label=f"slope -{power}")
ax.set_xticks(Ks, Ks)
ax.minorticks_off()
ax.set(xlabel="K", ylabel="distance from the truth [nats]")
ax.legend()
plt.show()

# %%
# As a loss
# ---------
#
# ``ImportanceWeightedELBO`` takes the bound; from there on it is a loss like all others.
# The model is a normal seen through noise, with a scale to be learned, and the guide's
# family contains its posterior.


def model(x):
    scale = pyro.param("scale", torch.tensor(1.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    weight = pyro.param("weight", torch.tensor(0.5))
    width = pyro.param("width", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight * x, width))


x = math.sqrt(1 + 2.0**2) * torch.randn(300)  # scale 2


def above_log_p(loss, num_draws=50):
    exact = (
        dist.Normal(0.0, (1 + pyro.param("scale").detach() ** 2).sqrt()).log_prob(x).mean()
    )
    return (
        -sum(loss.loss(model, guide, x) for _ in range(num_draws)) / num_draws / len(x)
        - exact
    )


guide(x), model(x)  # makes the parameters
for K in (4, 16, 64):
    for loss in (IWAE_ELBO(K=K), ImportanceWeightedELBO(Jackknife(K))):
        print(f"{loss!s:42s} above log p(x): {above_log_p(loss):+.4f} nats per datapoint")

# %%
# Training with it goes wrong
# ---------------------------
#
# The particle weights of :math:`V` come from autograd, and nothing else is needed to train.
# But what is corrected for its bias is no lower bound any more. The guide climbs :math:`V`
# whether or not that is good for anything, and finds out that ever wider proposals make it
# exceed :math:`\log p(x)`.


def train(loss, steps=300):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi, widths = SVI(model, guide, Adam({"lr": 0.02}), loss=loss), []
    for _ in range(steps):
        svi.step(x)
        widths.append(pyro.param("width").item())
    scale, above = pyro.param("scale").item(), above_log_p(loss)
    print(f"{loss!s:42s} scale {scale:.2f}, above log p(x): {above:+.3f}")
    return widths


widths = {
    "IWAE(4)": train(IWAE_ELBO(K=4)),
    "jackknife(4)": train(ImportanceWeightedELBO(Jackknife(4))),
}

# %%
# Another objective for the guide
# -------------------------------
#
# The property ``guide_bound`` names what the guide climbs instead. Model and guide then
# have a set of weights each, in one backward pass. Estimators go with it as with any bound.


class Sober(Jackknife):
    @property
    def guide_bound(self):
        return IWAE(self.K)


widths["jackknife(4), guide IWAE"] = train(
    ImportanceWeightedELBO(Sober(4), estimator="dreg")
)

fig, ax = plt.subplots()
for (name, path), style in zip(widths.items(), ("-", "-", "--"), strict=True):
    ax.plot(path, style, label=name)
best = x.square().mean() - 1
ax.axhline(
    (best / (1 + best)).sqrt(), color="black", linestyle=":", linewidth=1, label="posterior"
)
ax.set(xlabel="step", ylabel="width of the guide")
ax.legend()
plt.show()
print(f"maximum likelihood: scale {best.sqrt():.2f}")

# %%
# Five lines made an objective with gradients, and one figure showed not to climb it.
# :doc:`../your_own_bound` has the tests that a formula should pass before it is trusted.

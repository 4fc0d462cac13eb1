r"""
Discrete latents
================

A discrete latent has no path for a gradient to take. What there is instead, on a model
small enough for the exact answer: a binary factor analysis, in which four switches decide
which patterns an image is the sum of.
"""

# sphinx_gallery_thumbnail_number = 2

# %%
# Images that are sums of patterns
# --------------------------------

import itertools
import math
import textwrap

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

from pyro_iw import IWAE_ELBO, gradient_snr

pyro.set_rng_seed(0)
patterns = (torch.rand(4, 16) < 0.4).float() * 2
x = (torch.rand(500, 4) < 0.4).float() @ patterns + 0.5 * torch.randn(500, 16)
states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))

fig, axes = plt.subplots(1, 6, figsize=(8, 1.7))
for ax, image in zip(axes, x, strict=False):
    ax.imshow(image.reshape(4, 4), cmap="gray")
    ax.axis("off")
fig.suptitle("six of 500 images")
plt.show()

# %%
# Model, guide and the truth
# --------------------------
#
# There are :math:`2^4 = 16` states of the switches, so :math:`\log p(x)` is a sum that can
# be written out, and every way of training judged by it.


class Switches(nn.Module):
    def __init__(self):
        super().__init__()
        self.patterns = nn.Parameter(0.5 * torch.randn(4, 16))
        self.prior = nn.Parameter(torch.zeros(4))
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))

    def model(self, x):
        pyro.module("switches", self)
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Normal(b @ self.patterns, 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("switches", self)
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=self.encoder(x)).to_event(1))

    @torch.no_grad()
    def log_p(self, x):
        joint = dist.Bernoulli(logits=self.prior).log_prob(states).sum(-1)
        of_x = dist.Normal(states @ self.patterns, 0.5)
        joint = joint + of_x.log_prob(x[:, None]).sum(-1)
        return joint.logsumexp(-1).mean()


best = Switches()
with torch.no_grad():
    best.patterns.copy_(patterns)
    best.prior.fill_(math.log(0.4 / 0.6))
print(f"log p(x) of the model that made the data: {best.log_p(x):.2f}")

# %%
# Estimators
# ----------
#
# With ``estimator="auto"``, the default, a guide without a path is refused by name: a
# gradient that is silently zero would be worse. The error lists what there is.

try:
    IWAE_ELBO(K=8).loss_and_grads(Switches().model, Switches().guide, x)
except ValueError as error:
    print(textwrap.fill(str(error), 84))

# %%
# Noise of the gradient
# ---------------------
#
# ``"score"`` multiplies the score of the guide by the bound, ``"vimco"`` takes off what the
# other particles expect, ``"ovis"`` takes off the best linear control, and ``"rws"`` fits
# the guide by weighted draws instead. Their signal-to-noise ratio at the same parameters,
# for the guide:

pyro.clear_param_store()
pyro.set_rng_seed(1)
start = Switches()
for estimator in ("score", "vimco", "ovis", "rws"):
    loss = IWAE_ELBO(K=8, estimator=estimator)
    ratio = gradient_snr(loss, start.model, start.guide, x[:100], num_draws=100).guide
    print(f"{estimator:6s} {ratio.norm:.2f}")

# %%
# Training
# --------
#
# The first three climb the same bound. With eight particles and four switches their
# controls matter little, and the curves lie on one another. Wake-wake's gradient is the
# least noisy, but of another objective for the guide.

curves = {}
for estimator in ("score", "vimco", "ovis", "rws"):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    pair = Switches()
    svi = SVI(
        pair.model, pair.guide, Adam({"lr": 0.02}), loss=IWAE_ELBO(K=8, estimator=estimator)
    )
    curves[estimator] = []
    for step in range(400):
        if step % 20 == 0:
            curves[estimator].append(pair.log_p(x).item())
        svi.step(x[torch.randint(len(x), (100,))])
    curves[estimator].append(pair.log_p(x).item())

fig, ax = plt.subplots()
for (estimator, curve), style in zip(curves.items(), ("-", "--", ":", "-."), strict=True):
    ax.plot(range(0, 401, 20), curve, style, label=estimator)
ax.axhline(best.log_p(x), color="black", linewidth=0.8, label="what made the data")
ax.set(xlabel="step", ylabel=r"exact $\log p(x)$ [nats per image]", ylim=(-40, -13))
ax.legend()
plt.show()

# %%
# Summing out instead
# -------------------
#
# A site of the model that is enumerated needs no guide at all: it is summed out for each
# particle. Here the four switches are made sites of their own, all of them enumerated, and
# training is exact. It pays as long as the sum can be afforded.


class Enumerated(Switches):
    def model(self, x):
        pyro.module("switches", self)
        with pyro.plate("data", len(x)):
            mean = 0.0
            for i in range(4):
                switch = dist.Bernoulli(logits=self.prior[i])
                b = pyro.sample(f"b{i}", switch, infer={"enumerate": "parallel"})
                mean = mean + b[..., None] * self.patterns[i]
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)

    def guide(self, x):
        pass


pyro.clear_param_store()
pyro.set_rng_seed(1)
exact = Enumerated()
svi = SVI(exact.model, exact.guide, Adam({"lr": 0.02}), loss=IWAE_ELBO(K=1))
for _ in range(400):
    svi.step(x[torch.randint(len(x), (100,))])
for name, value in {
    **{name: curve[-1] for name, curve in curves.items()},
    "summed out": exact.log_p(x),
}.items():
    print(f"{name:10s} log p(x) {value:.2f}")

# %%
# The patterns
# ------------
#
# What the data were made of (above) and what was learned (below), each beside the one it
# resembles most.

with torch.no_grad():
    order = torch.cdist(patterns, exact.patterns).argmin(1)
fig, axes = plt.subplots(2, 4, figsize=(5.6, 2.9))
for column in range(4):
    axes[0, column].imshow(patterns[column].reshape(4, 4), cmap="gray")
    axes[1, column].imshow(
        exact.patterns[order[column]].detach().reshape(4, 4), cmap="gray"
    )
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
axes[0, 0].set_ylabel("made of")
axes[1, 0].set_ylabel("learned")
plt.show()

# %%
# :doc:`../which_estimator` says which estimator when; :doc:`../porting` has mixtures,
# chains and sites that the guide enumerates.

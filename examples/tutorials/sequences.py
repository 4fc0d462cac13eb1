r"""
Sequences
=========

The importance weight of a sequence is a product over its steps, and with every step fewer
particles count. A particle filter drops those that have come to weigh nothing and copies
the others; ``FIVO_ELBO`` trains with what it estimates.
"""

# %%
# A walk seen through noise
# -------------------------
#
# Model and guide are objects with ``init`` and ``step``, as for Pyro's ``SMCFilter``. The
# walk pulls back to zero by a factor that is to be learned, and the guide corrects each
# prediction by the next observation.

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from pyro_iw import FIVO_ELBO, ParticleFilter
from pyro_iw.sequences.plots import plot_ess_over_time, plot_filtering_mean

positive = dist.constraints.positive


class Model:
    def init(self, state):
        state["z"] = torch.zeros(())

    def step(self, state, x):
        pull = pyro.param("pull", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            state["z"] = pyro.sample("z", dist.Normal(pull * state["z"], 1.0))
            pyro.sample("x", dist.Normal(state["z"], 1.0), obs=x)


class Guide:
    def init(self, state):
        pass

    def step(self, state, x):
        pull, gain = (
            pyro.param("guide_pull", torch.tensor(0.5)),
            pyro.param("gain", torch.tensor(0.2)),
        )
        width = pyro.param("width", torch.tensor(1.0), constraint=positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pull * state["z"] + gain * x, width))


def simulate(steps, sequences, pull=0.9):
    z, walk = torch.zeros(sequences), []
    for _ in range(steps):
        z = pull * z + torch.randn(sequences)
        walk.append(z)
    walk = torch.stack(walk)
    return walk, walk + torch.randn(steps, sequences)


pyro.set_rng_seed(0)
walk, x = simulate(25, 30)

# %%
# The truth, by a Kalman filter
# -----------------------------


def kalman(x, pull):
    mean, variance, log_p = torch.zeros(x.shape[1]), torch.tensor(0.0), 0.0
    for row in x:
        mean, variance = pull * mean, pull**2 * variance + 1
        log_p = log_p + dist.Normal(mean, (variance + 1).sqrt()).log_prob(row)
        gain = variance / (variance + 1)
        mean, variance = mean + gain * (row - mean), (1 - gain) * variance
    return log_p


# %%
# The length decides
# ------------------
#
# The same untrained pair, 16 particles, sequences of growing length. ``ess_threshold=0``
# never resamples, which is IWAE. With 80 steps it is 40 nats short of the truth, FIVO 3.

lengths, gaps = (5, 10, 20, 40, 80), {"IWAE": [], "FIVO": []}
_, long = simulate(80, 50)
pyro.clear_param_store()
for T in lengths:
    truth = kalman(long[:T], 0.5).sum().item()
    for name, loss in (
        ("IWAE", FIVO_ELBO(K=16, ess_threshold=0)),
        ("FIVO", FIVO_ELBO(K=16)),
    ):
        gaps[name].append((truth + loss.loss(Model(), Guide(), long[:T])) / 50)

fig, ax = plt.subplots()
for name, gap in gaps.items():
    ax.loglog(lengths, gap, "o-", label=name)
ax.set_xticks(lengths, lengths)
ax.minorticks_off()
ax.set(xlabel="length T", ylabel=r"$\log p(x)$ - bound [nats per sequence]")
ax.legend()
plt.show()

# %%
# Training
# --------
#
# The gap of a bound depends on the parameters, and so moves them: the ELBO settles on too
# small a factor, while FIVO ends at maximum likelihood.


def train(loss, steps=120):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi, pulls = SVI(Model(), Guide(), Adam({"lr": 0.04}), loss=loss), []
    for _ in range(steps):
        svi.step(x)
        pulls.append(pyro.param("pull").item())
    return pulls


candidates = torch.linspace(0.5, 1.0, 51)
best = candidates[
    torch.stack([kalman(x, pull).sum() for pull in candidates]).argmax()
].item()
fig, ax = plt.subplots()
for name, loss in (
    ("ELBO", FIVO_ELBO(K=1, ess_threshold=0)),
    ("IWAE(16)", FIVO_ELBO(K=16, ess_threshold=0)),
    ("FIVO(16)", FIVO_ELBO(K=16)),
):
    ax.plot(train(loss), label=name)
ax.axhline(best, color="black", linestyle=":", linewidth=1, label="maximum likelihood")
ax.set(xlabel="step", ylabel="pull of the walk")
ax.legend()
plt.show()
print(f"maximum likelihood: {best:.2f}, FIVO: {pyro.param('pull').item():.2f}")

# %%
# Judging the trained pair
# ------------------------
#
# ``ParticleFilter`` estimates :math:`\log p(x)` of each sequence with its Monte Carlo
# error, and knows the states.

filtered = ParticleFilter(Model(), Guide(), num_particles=200, num_filters=4)(x)
truth = kalman(x, pyro.param("pull").item()).detach()
off = (filtered.log_marginal - truth).detach()
print(
    f"log p(x) per sequence: {filtered.log_marginal.mean():.3f}, exact {truth.mean():.3f}"
)
expected = filtered.monte_carlo_error.mean()
print(f"errors of single sequences: {off.std():.3f}, as foretold: {expected:.3f}")

# %%
# What the filter knows of the walk
# ---------------------------------

fig, axes = plt.subplots(2, 1, figsize=(6.4, 4.6), sharex=True)
plot_filtering_mean(filtered, "z", axes[0], label="filter")
axes[0].plot(walk[:, 0], color="black", linewidth=1, linestyle=":", label="true walk")
axes[0].legend()
plot_ess_over_time(filtered, axes[1])
axes[0].set_xlabel("")
plt.show()

# %%
# :doc:`../sequences` has masks for unequal lengths, the bias of the gradient, and doubly
# reparameterised steps.

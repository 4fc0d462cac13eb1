"""Small models built as two of Pyro's examples, whose guides enumerate a label that is not known."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import nn


def joined(*parts):
    """Inputs side by side, broadcast over what is enumerated and over particles."""
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], -1)


class M2(nn.Module):
    """A semi-supervised autoencoder (Kingma et al., 2014): q(y | x), q(z | x, y)."""

    def __init__(self, pixels=6, labels=3, latents=2):
        super().__init__()
        self.labels, self.latents = labels, latents
        self.encoder_y = nn.Linear(pixels, labels)
        self.encoder_z = nn.Sequential(nn.Linear(pixels + labels, 8), nn.Tanh(), nn.Linear(8, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents + labels, 8), nn.Tanh(), nn.Linear(8, pixels))

    def model(self, xs, ys=None):
        pyro.module("m2", self)
        with pyro.plate("data", len(xs)):
            zs = pyro.sample("z", dist.Normal(xs.new_zeros(len(xs), self.latents), 1.0).to_event(1))
            prior = xs.new_ones(len(xs), self.labels) / self.labels
            ys = pyro.sample("y", dist.OneHotCategorical(prior), obs=ys)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(joined(zs, ys))).to_event(1), obs=xs)

    def guide(self, xs, ys=None):
        with pyro.plate("data", len(xs)):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(logits=self.encoder_y(xs)))
            loc, log_scale = self.encoder_z(joined(xs, ys)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def model_classify(self, xs, ys=None):
        pyro.module("m2", self)
        with pyro.plate("data", len(xs)):
            if ys is not None:
                with poutine.scale(scale=50.0):
                    pyro.sample("y_aux", dist.OneHotCategorical(logits=self.encoder_y(xs)), obs=ys)

    def guide_classify(self, xs, ys=None):
        pass


class SCANVI(nn.Module):
    """Transcriptomics (Xu et al., 2021): q(u | x), q(y | u), q(z | u, y), and a loss of the classifier's own.

    ``has_rsample`` is that of the guide's factor.
    """

    def __init__(self, genes=5, labels=3, latents=2, has_rsample=True):
        super().__init__()
        self.labels, self.latents, self.has_rsample = labels, latents, has_rsample
        self.u_decoder = nn.Sequential(nn.Linear(latents + labels, 8), nn.Tanh(), nn.Linear(8, 2 * latents))
        self.x_decoder = nn.Linear(latents, genes)
        self.encoder = nn.Linear(genes, 2 * latents + 2)
        self.classifier = nn.Linear(latents, labels)
        self.z_encoder = nn.Sequential(nn.Linear(latents + labels, 8), nn.Tanh(), nn.Linear(8, 2 * latents))
        self.scale = 0.05

    def model(self, x, y=None):
        pyro.module("scanvi", self)
        dispersion = pyro.param("dispersion", x.new_ones(x.shape[-1]), constraint=dist.constraints.positive)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale):
            z = pyro.sample("z", dist.Normal(0, x.new_ones(self.latents)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(self.labels)), obs=y)
            loc, log_scale = self.u_decoder(joined(z, y)).chunk(2, -1)
            u = pyro.sample("u", dist.Normal(loc, log_scale.exp()).to_event(1))
            size = pyro.sample("l", dist.LogNormal(1.0, x.new_ones(1)).to_event(1))
            rate = size * torch.softmax(self.x_decoder(u), -1)
            logits = rate.log() - dispersion.log()
            counts = dist.NegativeBinomial(total_count=dispersion, logits=logits)
            pyro.sample("x", counts.to_event(1), obs=x)

    def guide(self, x, y=None):
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale):
            loc, log_scale = self.encoder(torch.log1p(x)).chunk(2, -1)
            pyro.sample("l", dist.LogNormal(loc[..., -1:], log_scale[..., -1:].exp()).to_event(1))
            u = pyro.sample("u", dist.Normal(loc[..., :-1], log_scale[..., :-1].exp()).to_event(1))
            labels = dist.OneHotCategorical(logits=self.classifier(u))
            if y is None:
                y = pyro.sample("y", labels)
            else:
                loss = -0.1 * labels.log_prob(y)
                pyro.factor("classification", loss, has_rsample=self.has_rsample)
            loc, log_scale = self.z_encoder(joined(u, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

"""A conjugate hierarchy of normals, and what is known of it in closed form.

g ~ N(0, 1), z_n ~ N(g, 1), x_n ~ N(z_n, sigma^2): all are jointly normal.
"""

import pyro
import pyro.distributions as dist
import torch


class Conjugate:
    """The pair, on some data.

    Arguments:
        count: the number N of observations.
        sigma: the scale of their noise.
        seed: that of the data.
        wider: the scales of the guide, in those of the posterior (of g, and of z_n given g).
        bias: what the guide's z_n are off by.
    """

    def __init__(self, count=5, sigma=1.0, seed=0, wider=(1.2, 1.1), bias=0.0):
        self.count, self.sigma, self.wider, self.bias = count, sigma, wider, bias
        generator = torch.Generator().manual_seed(seed)
        self.x = 0.7 + (1 + sigma**2) ** 0.5 * torch.randn(count, generator=generator, dtype=torch.float64)

    @property
    def kept(self):
        """How much of x_n is in the posterior mean of z_n given g."""
        return 1 / (1 + self.sigma**2)

    def model(self):
        g = pyro.sample("g", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", self.count):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, self.sigma), obs=self.x)

    def guide(self):
        mean, variance = self.of_g
        g = pyro.sample("g", dist.Normal(mean, self.wider[0] * variance**0.5))
        with pyro.plate("data", self.count):
            loc = self.kept * self.x + (1 - self.kept) * g + self.bias
            pyro.sample("z", dist.Normal(loc, self.wider[1] * self.sigma * self.kept**0.5))

    @property
    def covariance(self):
        """Of x."""
        return (1 + self.sigma**2) * torch.eye(self.count).double() + 1.0

    @property
    def log_evidence(self):
        return dist.MultivariateNormal(torch.zeros(self.count).double(), self.covariance).log_prob(self.x)

    @property
    def posterior(self):
        """Mean and covariance of (g, z_1, ..., z_N) given x."""
        size = self.count + 1
        precision = torch.zeros(size, size).double()
        precision[0, 0] = 1.0 + self.count
        precision[0, 1:] = precision[1:, 0] = -1.0
        precision[1:, 1:] = (1 + 1 / self.sigma**2) * torch.eye(self.count)
        covariance = torch.linalg.inv(precision)
        linear = torch.cat([torch.zeros(1).double(), self.x / self.sigma**2])
        return covariance @ linear, covariance

    @property
    def of_g(self):
        """Mean and variance of g given x."""
        mean, covariance = self.posterior
        return mean[0], covariance[0, 0]

    @property
    def leave_one_out(self):
        """log p(x_n | all others), for each n."""
        values = []
        for n in range(self.count):
            others = [m for m in range(self.count) if m != n]
            cross = self.covariance[n, others]
            weights = torch.linalg.solve(self.covariance[others][:, others], cross)
            mean, variance = weights @ self.x[others], self.covariance[n, n] - weights @ cross
            values.append(dist.Normal(mean, variance.sqrt()).log_prob(self.x[n]))
        return torch.stack(values)

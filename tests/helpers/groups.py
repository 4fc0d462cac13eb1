"""What tests of particle groups share: a bound of the user's own, noise that is given, means over ranks."""

import math

import pyro.distributions
import torch
import torch.distributed as dist

import pyro_iw


class FromTensor(pyro.distributions.Normal):
    """A normal whose noise for all particles is read from a tensor ``[S, ...]``."""

    def __init__(self, loc, scale, noise=None, validate_args=None):
        self.noise = noise
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return FromTensor(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        alone = len(shape) < self.noise.dim()
        return self.loc + self.scale * (self.noise[0] if alone else self.noise[: shape[0]])


class Powers(pyro_iw.Bound):
    """Of no shift, and not the mean of its groups: twice the log of the mean square root of their weights."""

    def value(self, log_w):
        groups = log_w.logsumexp(1) - math.log(self.K)
        return 2 * (groups / 2).logsumexp(0) - 2 * math.log(self.M)


def averaged(gradients):
    """Gradients by name, as DistributedDataParallel would leave them."""
    for gradient in gradients.values():
        if gradient is not None:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return gradients

"""What tests of particle groups share: a bound of the user's own, the mean of gradients over ranks."""

import math

import torch.distributed as dist

import pyro_iw


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

"""Losses, their gradients on recorded noise, and the same by loops over particles and cells."""

import pyro
import torch

from helpers.truth import RecordedNormal, objectives
from pyro_iw import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, TVO_ELBO, VR_ELBO

M, K = 2, 3
LOSSES = {
    "IWAE": lambda **kw: IWAE_ELBO(K=M * K, **kw),
    "MIWAE": lambda **kw: MIWAE_ELBO(M=M, K=K, **kw),
    "CIWAE": lambda **kw: CIWAE_ELBO(K=M * K, beta=0.3, **kw),
    "PIWAE": lambda **kw: PIWAE_ELBO(M=M, K=K, **kw),
    "VR": lambda **kw: VR_ELBO(alpha=0.3, K=M * K, **kw),
    "TVO": lambda **kw: TVO_ELBO(K=M * K, partitions=(0.0, 0.2, 0.7, 1.0), **kw),
}


def gradients(loss, case, seed=0):
    """Loss and gradients by the package, and the noise they were computed on."""
    pyro.clear_param_store()
    for name in {**case.theta, **case.phi}:
        case.param(name)
    model, guide = case.model_callable, case.guide_callable
    pyro.set_rng_seed(seed)
    loss.loss(model, guide)  # the pair is probed here, so that the draws below are the loss's own
    RecordedNormal.draws.clear()
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(model, guide)
    grads = {name: value.unconstrained().grad for name, value in pyro.get_param_store().items()}
    return value, grads, list(RecordedNormal.draws)


def hand_written(name, case, noise):
    """Loss and gradients by loops: (loss, theta's gradients, phi's gradients)."""
    theta = {k: torch.tensor(v, dtype=case.dtype, requires_grad=True) for k, v in case.theta.items()}
    phi = {k: torch.tensor(v, dtype=case.dtype, requires_grad=True) for k, v in case.phi.items()}
    log_p, log_q = case.log_weights(theta, phi, noise)
    cells = range(len(log_p[0]))
    outer = torch.as_tensor(case.outer, dtype=case.dtype).expand(len(cells))
    model_side = guide_side = 0.0
    for cell in cells:
        log_w = [p[cell] - q[cell] for p, q in zip(log_p, log_q, strict=True)]
        for_theta, for_phi = objectives(name, log_w, M, K)
        model_side = model_side - outer[cell] * for_theta
        guide_side = guide_side - outer[cell] * for_phi
    theta_grads = torch.autograd.grad(model_side, list(theta.values()), retain_graph=True)
    phi_grads = torch.autograd.grad(guide_side, list(phi.values()))
    return (
        model_side.item(),
        dict(zip(theta, theta_grads, strict=True)),
        dict(zip(phi, phi_grads, strict=True)),
    )

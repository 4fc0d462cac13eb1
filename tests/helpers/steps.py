"""One gradient step of a loss, and what it leaves behind."""

import pyro.poutine as poutine


def value_and_grads(loss, model, guide, *args):
    """The loss and the gradients by parameter, which are taken away again."""
    with poutine.trace(param_only=True) as capture:
        value = loss.loss_and_grads(model, guide, *args)
    grads = {}
    for name, site in capture.trace.nodes.items():
        parameter = site["value"].unconstrained()
        grads[name], parameter.grad = parameter.grad, None
    return value, grads

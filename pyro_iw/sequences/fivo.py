r"""Filtering variational objectives: the logarithm of a particle filter's estimate, as a loss.

.. math:: \mathcal L = E[V] \le \log p(x), \qquad E[e^V] = p(x)

The gradient of V with its ancestors fixed is what FIVO, AESMC and VSMC train with. It leaves out that the
ancestors are drawn by weights that depend on the parameters, and so is biased: by the covariance of what
comes after a resampling with

.. math:: \sum_k \nabla \log \bar w_{a_k}, \qquad \bar w = \text{the normalised weights before it},

the score of the ancestors, which ``resampling_gradient=True`` adds.

**Doubly reparameterised.** Where every step begins from equal weights, its share of V is an
importance-weighted bound given the past, and the score of the step's own draws has the expectation given in
:class:`~pyro_iw.gradients.estimators.DReG`, with the state among the guide's parameters: in that share, and
in that alone, the path through the step's latents is weighted by the squares of the weights. What later steps
make of the same latents is left as it is. This needs resampling before every step: over several steps the
weights, and with them whether to resample, depend on a draw in jumps.

References:
    | Filtering Variational Objectives (Maddison et al., 2017), https://arxiv.org/abs/1705.09279
    | Auto-Encoding Sequential Monte Carlo (Le et al., 2018), https://arxiv.org/abs/1705.10306
    | Variational Sequential Monte Carlo (Naesseth et al., 2018), https://arxiv.org/abs/1705.11140
    | Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2018),
      https://arxiv.org/abs/1810.04152
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from .._support.arguments import as_plate_names, positive_integer
from .._support.warn import warn
from ..bounds import IWAE
from ..compiling.step import Compiler
from ..gradients.estimators import get_estimator
from ..gradients.refusals import listed, refuse_baselines, refuse_hidden_draws
from ..gradients.surrogate import Estimate, Term, tie
from ..logmean import softmax
from ..tracing.traces import Index, Pair, Rescored, Route
from ..training import TrainedLoss, gradient_step
from .filtering import Filter, Filtered, Moment
from .finite import check_kl_weight, first_not_finite
from .protocol import Protocol, Sequences, naming, read_sequences

if TYPE_CHECKING:
    from ..compiling.program import CompiledStep

__all__ = ["FIVO_ELBO"]

_ESTIMATORS = ("auto", "reparam", "dreg", "score")


class FIVO_ELBO(TrainedLoss):
    r"""Filtering variational objective: a particle filter's estimate of log p(x) for every sequence.

    .. math::
        \mathcal L = \sum_n \sum_t \log \sum_{k=1}^K \bar w_{n,t-1,k}\, w_{n,t,k}, \qquad
        w_{n,t,k} = \frac{p_\theta(x_{n,t}, z_{n,t,k} \mid z_{n,<t,k})}{q_\phi(z_{n,t,k} \mid z_{n,<t,k},
        x_n)}

    where the particles of a sequence are resampled by their normalised weights :math:`\bar w`, which then are
    1 / K, when their effective number is less than ``ess_threshold`` K. The variance of an importance weight
    grows exponentially with the length of a sequence; with resampling, V's grows linearly.

    Model and guide are objects with ``init(state, ...)`` and ``step(state, ...)``, as
    :class:`~pyro.infer.SMCFilter` takes them. All memory is in ``state``, a dict that the model writes and
    the guide reads. Positional arguments of the loss are sequences, with an entry for each step (a tensor has
    time on its first dim); keyword arguments go to ``init``. There is one filter for every cell of the
    plates common to all sample sites of all steps; minibatches, masks and ``poutine.scale`` are treated as by
    :class:`ImportanceWeightedELBO`.

    References:
        | Filtering Variational Objectives (Maddison et al., 2017), https://arxiv.org/abs/1705.09279
        | Auto-Encoding Sequential Monte Carlo (Le et al., 2018), https://arxiv.org/abs/1705.10306
        | Variational Sequential Monte Carlo (Naesseth et al., 2018), https://arxiv.org/abs/1705.11140

    Arguments:
        K: number of particles; an integer >= 2, or 1 with ``ess_threshold=0``, which is the ELBO.
        ess_threshold: share of K, in [0, 1], below which the effective number of particles makes a sequence
            resample: 0 never does, and is :class:`IWAE_ELBO`; 1 does before every step. In between, a CPU
            draws ancestors where a sequence is to be resampled, and an accelerator, or ``compile=True``, at
            every step, so as not to wait for the answer: there the same seed gives other particles.
        resampling: ``"systematic"`` or ``"multinomial"``, see :mod:`pyro_iw.resampling`.
        resampling_gradient: whether the gradient includes the score of the ancestors, which makes it
            unbiased, and noisy. It needs ``ess_threshold=1`` (whether to resample is a jump, which has no
            gradient) and ``resampling="multinomial"`` (systematic draws have a score of infinite variance).
        estimator: how the gradient of the guide's draws is estimated: ``"reparam"``, the total derivative
            along reparameterised particles with fixed ancestors; ``"dreg"``, doubly reparameterised within
            each step, for ``ess_threshold=1``; ``"score"``, reparam's plus the score of sites that cannot be
            reparameterised, times what V gains from their step on. ``"auto"`` is ``"reparam"``.
        plates: name or names of the plates whose cells get a filter each; ``()`` for one joint filter; None
            for the plates common to all sample sites.
        kl_weight: weight of the prior and of the guide's density, as of :class:`ImportanceWeightedELBO`.
        max_plate_nesting: number of batch dims that the plates of the pair take; found by running the pair if
            infinite.
        retain_graph: as of ``Tensor.backward``, in :meth:`loss_and_grads`.
        compile: compile gradient steps, as of :class:`ImportanceWeightedELBO`: one program of all T steps for
            each T, whose compilation takes time in proportion to T. What cannot be compiled runs eagerly,
            after a warning.
        particle_group: refused: unlike those of :class:`ImportanceWeightedELBO`, the particles of a filter
            cannot be divided among ranks.

    Raises:
        ValueError: if an argument is out of range, or two do not go together.

    Example:
        >>> class Model:  # a random walk, seen through noise
        ...     def init(self, state):
        ...         state["z"] = torch.zeros(())
        ...     def step(self, state, y):
        ...         drift = pyro.param("drift", torch.tensor(0.0))
        ...         state["z"] = pyro.sample("z", dist.Normal(state["z"] + drift, 1.0))
        ...         pyro.sample("y", dist.Normal(state["z"], 1.0), obs=y)
        >>> class Guide:
        ...     def init(self, state):
        ...         pass
        ...     def step(self, state, y):
        ...         pyro.sample("z", dist.Normal((state["z"] + y) / 2, 0.7))
        >>> svi = SVI(Model(), Guide(), Adam({"lr": 0.01}), loss=FIVO_ELBO(K=16))
        >>> loss = svi.step(torch.tensor([0.3, 0.9, 2.0, 2.2]))
    """

    def __init__(
        self,
        K: int,
        ess_threshold: float = 0.5,
        resampling: str = "systematic",
        resampling_gradient: bool = False,
        *,
        estimator: str = "auto",
        plates: str | Iterable[str] | None = None,
        kl_weight: float | Callable[[int], float] = 1.0,
        max_plate_nesting: float = math.inf,
        retain_graph: bool | None = None,
        compile: bool = False,
        particle_group: None = None,
    ) -> None:
        if particle_group is not None:
            raise ValueError(
                "FIVO_ELBO resamples its particles from one another at every step, so that they cannot be "
                "divided among the ranks of a particle_group. Divide the sequences: every rank its own, and "
                "gradients averaged over all ranks."
            )
        K = positive_integer("K", K)
        super().__init__(num_particles=K, max_plate_nesting=max_plate_nesting, vectorize_particles=True)
        self.K = K
        self.retain_graph = retain_graph
        self.plates = as_plate_names(plates)
        self._warned: set[str] = set()
        self.compile = compile
        self._compiler = Compiler()
        self._filter = Filter(
            K,
            ess_threshold,
            resampling,
            self.plates,
            max_plate_nesting,
            self._warn_once,
            looks=not compile,  # a program cannot look at a value
        )
        self.ess_threshold = ess_threshold
        self.resampling = resampling
        self.resampling_gradient = resampling_gradient
        self.estimator = estimator
        self.kl_weight = kl_weight
        self.steps = 0
        self._check()

    def _check(self) -> None:
        if not callable(self.kl_weight):
            check_kl_weight(self.kl_weight)
        if self.K == 1 and self.ess_threshold > 0:
            raise ValueError(
                "K=1 leaves nothing to resample: a filter of one particle gives the ELBO. Pass K >= 2, or "
                "ess_threshold=0 if the ELBO is meant."
            )
        if self.estimator not in _ESTIMATORS:
            raise ValueError(f"estimator must be one of {list(_ESTIMATORS)}, got {self.estimator!r}")
        if self.resampling_gradient and 0 < self.ess_threshold < 1:
            raise ValueError(
                "resampling_gradient=True gives an unbiased gradient only if whether to resample does not "
                f"depend on the particles, but with ess_threshold={self.ess_threshold} it does, in jumps "
                "that have no gradient. Pass ess_threshold=1."
            )
        if self.resampling_gradient and self.ess_threshold > 0 and self.resampling != "multinomial":
            raise ValueError(
                f"resampling_gradient=True needs ancestors that are drawn independently: the score of "
                f"resampling={self.resampling!r} has an infinite variance. Pass resampling='multinomial'."
            )
        if self.resampling_gradient and self.estimator == "dreg":
            raise ValueError(
                "resampling_gradient=True adds the score of the ancestors to the total derivative, which "
                "estimator='dreg' is not. Pass estimator='reparam', or resampling_gradient=False."
            )
        if self.estimator == "dreg" and self.ess_threshold < 1:
            raise ValueError(
                "estimator='dreg' needs steps that begin from equal weights, ess_threshold=1: whether to "
                "resample depends on a draw in jumps otherwise, and over several steps the model hands the "
                "guide values whose gradient is already weighted. Pass ess_threshold=1, or "
                "estimator='reparam'."
            )

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, in nats, without gradients.

        Arguments:
            model: the model, with ``init(state, ...)`` and ``step(state, ...)``.
            guide: the guide, with the same.
            args: sequences, of which each step gets an entry.
            kwargs: arguments of ``init``.

        Raises:
            ValueError: if the arguments are no sequences, the pair cannot be filtered, or a log-weight is
                NaN or +inf; naming the step and the site or the tensor of the state.
            KeyError: if something is read from the state that is not there.
            RuntimeError: if the guide writes to the state.
        """
        with torch.no_grad():
            filtered, estimate = self._estimate(Protocol(model, guide), read_sequences(args, kwargs), 1.0)
            loss = estimate.loss.item()
            self._check_finite(loss, filtered)
        return loss

    @gradient_step
    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, in nats, leaving gradients in the parameters' ``.grad``.

        Arguments and errors are those of :meth:`loss`; also ``ValueError`` where the estimator does not
        cover a site of the guide.
        """
        kl_weight = self._next_kl_weight()
        compiled = self._compiled_step(model, guide, args, kwargs, kl_weight)
        if compiled is not None:
            loss = compiled.loss.item()
            if math.isfinite(loss):
                compiled.accumulate()
                self._count()
                return loss
            compiled.rewind()  # the eager step on the same noise says what is wrong, and where
        sequences = read_sequences(args, kwargs)
        filtered, estimate = self._estimate(Protocol(model, guide), sequences, kl_weight)
        # Before the backward pass, so that .grad stays clean; see ImportanceWeightedELBO.
        early = is_validation_enabled() or estimate.loss.device.type == "cpu"
        if early:
            self._check_finite(estimate.loss.item(), filtered)
        if estimate.loss.requires_grad:
            estimate.loss.backward(retain_graph=self.retain_graph)
        loss = estimate.loss.item()
        if not early:
            self._check_finite(loss, filtered)
        self._count()
        return loss

    @gradient_step
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, in nats, as a scalar whose ``.backward()`` gives the gradients.

        Arguments and errors are those of :meth:`loss_and_grads`; NaN and +inf are looked for only where
        Pyro's validation is on. It can be differentiated once.
        """
        kl_weight = self._next_kl_weight()
        compiled = self._compiled_step(model, guide, args, kwargs, kl_weight)
        if compiled is not None:
            if not is_validation_enabled() or math.isfinite(compiled.loss.item()):
                self._count()
                return compiled.differentiable()
            compiled.rewind()
        sequences = read_sequences(args, kwargs)
        filtered, estimate = self._estimate(Protocol(model, guide), sequences, kl_weight)
        if is_validation_enabled():
            self._check_finite(estimate.loss.item(), filtered)
        if torch.is_grad_enabled():
            self._count()
        return estimate.loss

    def _compiled_step(
        self, model: Any, guide: Any, args: tuple, kwargs: dict[str, Any], kl_weight: float
    ) -> CompiledStep | None:
        if not (self.compile and torch.is_grad_enabled()):
            return None
        # By runs of their own, which are not to be recorded.
        self._filter.prepare(Protocol(model, guide), read_sequences(args, kwargs))
        return self._compiler.run(Pair(model, guide, args, kwargs), kl_weight, self._estimate_of)

    def _estimate_of(self, pair: Pair, kl_weight: float) -> tuple[Filtered, Estimate]:
        return self._estimate(
            Protocol(pair.model, pair.guide), read_sequences(pair.args, pair.kwargs), kl_weight
        )

    def recompile(self) -> None:
        """Forget all compiled steps, and try again to compile what could not be."""
        self._compiler.forget()

    @property
    def compile_seconds(self) -> dict[str, float]:
        """How long each compilation took, by what was compiled; empty without ``compile=True``."""
        return self._compiler.seconds

    def _estimate(self, pair: Protocol, sequences: Sequences, kl_weight: float) -> tuple[Filtered, Estimate]:
        gradients = torch.is_grad_enabled()
        views = _Views()
        doubly = gradients and self.estimator == "dreg"
        filtered = self._filter.run(pair, sequences, kl_weight, views.route if doubly else _straight)
        value = filtered.value.squeeze(0)
        loss = -(filtered.scale * value).sum()
        if gradients:
            for moment in filtered.moments:
                with naming(moment.index):
                    self._check_sites(moment)
            terms = [(density, filtered.scale * weights) for density, weights in self._terms(filtered)]
            loss = tie(loss, 1.0, [*terms, *views.corrections(filtered)])
        return filtered, Estimate(loss, value)

    def _terms(self, filtered: Filtered) -> list[Term]:
        """All densities, with their weights in the gradient."""
        terms: list[Term] = []
        moments, final = filtered.moments, filtered.value
        following = [moment.draw for moment in moments[1:]] + [None]
        reached: Tensor | float = 0.0
        for moment, draw in zip(moments, following, strict=True):
            is_last = moment is moments[-1]
            particles = moment.particles
            if self.estimator == "score" and (sites := particles.nonreparameterized_sites):
                gain = _finite(final - reached).expand_as(particles.log_p)  # of the only filter
                terms.append((particles.log_prob(sites, masked=False), gain))
            if self.estimator == "score":
                reached = filtered.estimate(moment)
            if draw is None and not is_last:
                continue
            a = _weights(filtered, moment, draw)
            b = a
            if self.estimator == "dreg":
                assert particles.log_q_stopped is not None
                b = _path_weights(filtered, moment, a, draw)
                terms.append((particles.log_q_stopped, b))
            elif self.resampling_gradient and draw is not None:
                a = b = a + _score(filtered, moment, draw, final)
            terms += [(particles.log_p, a), (-particles.log_q, b)]
        return terms

    def _check_sites(self, moment: Moment) -> None:
        """Refuse sites whose gradient would be wrong."""
        particles = moment.particles
        if self.estimator == "dreg":
            _refuse_without_path(particles.nonreparameterized_sites, self.estimator)
            get_estimator("dreg").check(particles, IWAE(self.K))
            return
        refuse_baselines(particles.guide_sites)
        if self.estimator == "score":
            refuse_hidden_draws(particles.nonreparameterized_sites, self.estimator)
        else:
            _refuse_without_path(particles.nonreparameterized_sites, "reparam")

    def _next_kl_weight(self) -> float:
        return check_kl_weight(self.kl_weight(self.steps)) if callable(self.kl_weight) else self.kl_weight

    def _check_finite(self, loss: float, filtered: Filtered) -> None:
        """Warn of a bound of -inf, refuse NaN and +inf; name the step and the site each arose at."""
        if math.isfinite(loss):
            return
        found = first_not_finite(filtered)
        if found is None:
            return
        if found.is_fatal:
            raise ValueError(
                f"{found.message} No gradient step should be taken on them: look for a NaN in the data or "
                "the parameters, a scale of 0, or too large a learning rate."
            )
        warn(f"{found.message} Those particles give no gradient.", RuntimeWarning)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)

    def _get_trace(self, model: Any, guide: Any, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError("A filter has a trace for every step, and none of all of them.")

    def __repr__(self) -> str:
        defaults = {
            "ess_threshold": 0.5,
            "resampling": "systematic",
            "resampling_gradient": False,
            "estimator": "auto",
            "plates": None,
            "kl_weight": 1.0,
            "retain_graph": None,
            "compile": False,
        }
        options = {name: getattr(self, name) for name in defaults}
        shown = "".join(f", {name}={value!r}" for name, value in options.items() if value != defaults[name])
        return f"FIVO_ELBO(K={self.K}{shown})"


def _straight(moment: int) -> Route | None:
    return None


def _weights(filtered: Filtered, moment: Moment, draw: Any) -> Tensor:
    """The weights of a moment's sums of densities in V: of the cells whose block ends here; 0 where V is
    -inf, of a sequence that no particle survived.
    """
    a = softmax(filtered.log_weights(moment), 1) * filtered.value.isfinite().unsqueeze(1)
    if draw is not None:
        a = a * draw.chosen.unsqueeze(1)
    return a.reshape(moment.particles.log_p.shape)


def _path_weights(filtered: Filtered, moment: Moment, a: Tensor, draw: Any) -> Tensor:
    """Those of the path through the step's own latents."""
    bound, particles = IWAE(filtered.num_particles), moment.particles
    estimator: Any = get_estimator("dreg")
    log_w = filtered.log_weights(moment)
    b = estimator.path_weights(bound, log_w, a.reshape(log_w.shape), particles.log_q_weight)
    b = b * filtered.value.isfinite().unsqueeze(1)
    if draw is not None:
        b = b * draw.chosen.unsqueeze(1)
    return b.reshape(a.shape)


def _score(filtered: Filtered, moment: Moment, draw: Any, final: Tensor) -> Tensor:
    """The score of the ancestors that are drawn after a moment, times what V gains from then on."""
    K = filtered.num_particles
    weights = softmax(filtered.log_weights(moment), 1)
    counts = filtered.grouped(draw.counts).to(weights.dtype)
    gain = _finite(final - filtered.estimate(moment)) * draw.chosen
    return (gain.unsqueeze(1) * (counts - K * weights)).reshape(moment.particles.log_p.shape)


def _finite(gain: Tensor) -> Tensor:
    """0 for sequences without a living particle, which give no gradient."""
    return gain.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _refuse_without_path(sites: list[Any], name: str) -> None:
    refuse_hidden_draws(sites, name)
    if sites:
        raise ValueError(
            f"Guide site(s) {listed(sites)} cannot be reparameterised, so estimator={name!r} would leave "
            "out the gradient of their parameters without a word. Pass estimator='score', or use a "
            "continuous distribution with an exact rsample at these sites, in model and guide."
        )


class _Views:
    """The values that each step's densities see, apart from those that the guide drew."""

    def __init__(self) -> None:
        self._pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def route(self, moment: int) -> Route:
        """The route that a moment's values take."""
        pairs = self._pairs.setdefault(moment, [])

        def through(value: Tensor, event_dim: int, particle: Index, site: Any) -> Tensor:
            if not value.requires_grad:
                return value
            view = value.view_as(value)
            pairs.append((value, view))
            return view

        return Route(through=through, rescored=(Rescored(),))

    def corrections(self, filtered: Filtered) -> list[Term]:
        """What takes the weight of the path through log p from that of the model's parameters to its own."""
        terms: list[Term] = []
        following = [moment.draw for moment in filtered.moments[1:]] + [None]
        for moment, draw in zip(filtered.moments, following, strict=True):
            pairs, log_p = self._pairs.get(moment.index, []), moment.particles.log_p
            if not pairs or not log_p.requires_grad or (draw is None and moment is not filtered.moments[-1]):
                continue
            a = _weights(filtered, moment, draw)
            excess = filtered.scale * (a - _path_weights(filtered, moment, a, draw))
            views = [view for _, view in pairs]
            grads = torch.autograd.grad(log_p, views, excess, retain_graph=True, allow_unused=True)
            terms += [(raw, -grad) for (raw, _), grad in zip(pairs, grads, strict=True) if grad is not None]
        return terms

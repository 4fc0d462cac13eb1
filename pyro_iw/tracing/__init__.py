r"""Running a pair of model and guide, and reading off it what the bounds need.

:mod:`~pyro_iw.tracing.traces` runs a pair once, :mod:`~pyro_iw.tracing.runner` runs it on S particles,
:mod:`~pyro_iw.tracing.sites` reads its sample sites, and :mod:`~pyro_iw.tracing.particles` sums their
densities into log-weights per cell.

.. list-table:: Private names of Pyro and of ``torch.distributions`` and ``torch.nn``
   :header-rows: 1

   * - name
     - what for
     - where it is missing
   * - ``pyro.poutine.runtime._PYRO_STACK`` (in :mod:`~pyro_iw.tracing.handlers`)
     - the handlers around a loss: for chunks drawn again in a backward pass, and so that a compiled step does
       not record them
     - the package cannot be imported
   * - ``batchnorm._BatchNorm``, ``._NormBase`` (in :mod:`~pyro_iw.tracing.batch_norm`)
     - what normalises over a batch, kinds of the user's own among it
     - PyTorch's own kinds alone are known
   * - ``_orig_mod`` (in the same)
     - looking into modules that ``torch.compile`` wraps
     - their running statistics are updated by runs that should leave them
   * - ``Tensor._pyro_dims``
     - names of the dims that Pyro's enumeration packs
     - enumerated models raise
   * - ``Distribution._validate_args``, ``._validate_sample``
     - checking the values of a Bernoulli likelihood that is computed from its logits
     - such likelihoods raise
   * - ``Transform._call``, ``._inverse``, ``._inv``, ``._cached_x_y``
     - supports of transformed distributions, past a transform's cache
     - ``_call`` and ``_inverse``: those supports raise
   * - ``MaskedDistribution._mask``, ``MixtureSameFamily._component_distribution``
     - a distribution's own mask; what a mixture is of
     - ``.mask()`` is taken for no mask; mixtures for neither continuous nor discrete
   * - ``_unquantize`` (of relaxed straight-through draws)
     - the soft value, whose density a hard one has
     - such draws are scored at their hard values
   * - ``infer["_deterministic"]``, ``infer["_enumerate_dim"]``; sites named ``*_observed``, ``*_unobserved``,
       ``*_unconstrained``
     - what Pyro makes of ``pyro.deterministic``, enumeration, ``obs_mask`` and automatic guides
     - such sites are taken for plain ones
   * - ``PyroOptim._state_waiting_to_be_consumed``, ``._get_optim_args``, ``._get_grad_clip`` (in
       :mod:`pyro_iw.optim`)
     - an optimiser of Pyro's that takes the same arguments and states
     - ``FusedOptim`` raises; ``AdversarialSVI`` forgets states that no step has taken up

``_pyro_sample``, ``_pyro_post_sample`` and ``_pyro_post_param`` are how Pyro's handlers are written,
and public in that sense.
"""

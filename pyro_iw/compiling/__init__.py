r"""The compiled step, behind ``compile=True``, and what it takes of PyTorch that is not public.

:mod:`~pyro_iw.compiling.step` decides, step by step, whether a program runs. The other modules make
programs (:mod:`~pyro_iw.compiling.program`; :mod:`~pyro_iw.compiling.chunked` where a step is taken in
chunks), and are imported when a first step is to be compiled. They get private names of PyTorch's,
Python's and Pyro's through :mod:`~pyro_iw.compiling.private`; where one is missing, that import fails, one
warning says which, and steps run eagerly.

Inductor is called as ``torch.compile`` calls it, which is public but checks all inputs at each call: 0.4 ms,
where a step takes 2 ms for one particle and 20 for 64.

.. list-table:: Private and undocumented names of PyTorch, Python and Pyro
   :header-rows: 1

   * - name
     - what for
     - where it is missing
   * - ``torch.fx.experimental.proxy_tensor``: ``make_fx``, ``extract_val``
     - recording; without a fake copy of each result, which takes most of its time
     - steps are eager
   * - ``torch._inductor.compile``
     - the compiler behind ``torch.compile``
     - steps are eager
   * - ``torch._guards``: ``TracingContext``, ``tracing``; ``torch._subclasses.FakeTensorMode``;
       ``torch.fx.experimental.symbolic_shapes.ShapeEnv``
     - Inductor's cache on disk, which asks them whether shapes may vary
     - each process compiles anew
   * - ``torch.utils._python_dispatch``: ``TorchDispatchMode``, ``_disable_current_modes``
     - seeing each operation of a recording, and reading known values unseen
     - steps are eager
   * - ``torch.multiprocessing.reductions.StorageWeakRef``
     - knowing memory again, without keeping it
     - steps are eager
   * - ``OpOverload._schema``
     - what an operation writes to
     - steps are eager
   * - ``Distribution._validate_sample``
     - no checks of values in a recording
     - steps are eager
   * - ``torch.distributions.von_mises._rejection_sample``
     - a sampler that loops, as one operation
     - steps are eager
   * - ``torch._foreach_add_``
     - adding all gradients to those that are there, in one call
     - steps are eager
   * - ``Module._parameters``, ``._buffers``, ``._modules``, ``._forward_hooks``, ``._forward_pre_hooks``,
       ``._backward_hooks``
     - guards on what a module holds, as mappings
     - steps are eager
   * - ``ParamStoreDict._params``, ``._constraints`` (Pyro)
     - guards on the param store, and messages of its parameters
     - steps are eager
   * - ``importlib._bootstrap._find_and_load`` (Python)
     - leaving imports out of what a recording watches
     - steps are eager
   * - ``Tensor._backward_hooks``, ``._post_accumulate_grad_hooks``
       (in :mod:`pyro_iw.gradients.graph`, for ``chunk_size`` too)
     - hooks of the user's on parameters: run once a step, and not for each chunk or at a recording
     - hooks see each chunk's share, and compiled steps pass them by
   * - ``Node._sequence_nr`` (in :mod:`pyro_iw.gradients.graph`, for ``chunk_size``)
     - an error with advice for tensors with a gradient from before the loss
     - PyTorch's own error
   * - ``Module._load_from_state_dict`` (in :mod:`pyro_iw.nn`)
     - ``FoldBatch`` loads what its module saved before it was wrapped
     - PyTorch names the keys as missing
"""

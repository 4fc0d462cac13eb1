"""Most tests of compiled steps run the recorded program operation by operation: no compiler's seconds.

What they check is what was recorded. Those that ask for ``inductor`` run what Inductor makes of it.
"""

import pytest

import pyro_iw.compiling.inductor as inductor_module


@pytest.fixture(autouse=True)
def _interpreted(request, monkeypatch):
    if "inductor" not in request.fixturenames:

        def interpret(graph, inputs):
            return lambda args: graph(*args)

        monkeypatch.setattr(inductor_module, "inductor", interpret)


@pytest.fixture
def inductor():
    """Run what Inductor makes of the program."""

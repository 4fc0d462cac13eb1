"""Which accelerator there is, by the names of every PyTorch from 2.4 on."""

import types

import pytest
import torch

from pyro_iw._support import devices
from pyro_iw._support.random_state import RandomState
from pyro_iw.bounds import TVO


@pytest.fixture
def before_2_6(monkeypatch):
    """PyTorch without ``torch.accelerator``."""
    monkeypatch.delattr(torch, "accelerator", raising=False)
    devices._available_before.cache_clear()
    yield monkeypatch
    devices._available_before.cache_clear()


class TestWhichThereIs:
    def test_none(self, monkeypatch):
        accelerator = types.SimpleNamespace(current_accelerator=lambda: None)
        monkeypatch.setattr(torch, "accelerator", accelerator, raising=False)
        assert devices.accelerator() is None
        assert devices.accelerator_in_use() is None
        assert devices.rng_states() == RandomState.now().devices == []

    def test_none_in_2_6(self, monkeypatch):
        def refuses():
            raise RuntimeError("Cannot access accelerator device when none is available.")

        accelerator = types.SimpleNamespace(current_accelerator=refuses)
        monkeypatch.setattr(torch, "accelerator", accelerator, raising=False)
        assert devices.accelerator() is None

    @pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
    def test_before_2_6(self, before_2_6, kind):
        owner = torch.backends.mps if kind == "mps" else getattr(torch, kind)
        before_2_6.setattr(owner, "is_available", lambda: True)
        assert devices.accelerator() == kind

    def test_one_that_rests_is_left_alone(self, monkeypatch):
        accelerator = types.SimpleNamespace(current_accelerator=lambda: torch.device("cuda"))
        monkeypatch.setattr(torch, "accelerator", accelerator, raising=False)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail("touched"))
        assert RandomState.now().devices == []


class TestRandomStates:
    def module(self, count=2):
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        return types.SimpleNamespace(
            is_initialized=lambda: True,
            device_count=lambda: count,
            get_rng_state=lambda device: generators[device].get_state(),
            set_rng_state=lambda state, device: generators[device].set_state(state),
            generators=generators,
        )

    def test_of_every_device_are_put_back(self, monkeypatch):
        module = self.module()
        monkeypatch.setattr(devices, "accelerator", lambda: "cuda")
        monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
        state = RandomState.now()
        drawn = [torch.rand(3, generator=generator) for generator in module.generators]
        assert not torch.equal(*drawn)
        state.restore()
        for generator, before in zip(module.generators, drawn, strict=True):
            assert torch.equal(torch.rand(3, generator=generator), before)

    def test_apples_takes_no_device(self, monkeypatch):
        generator = torch.Generator().manual_seed(1)
        module = types.SimpleNamespace(
            device_count=lambda: 1, get_rng_state=generator.get_state, set_rng_state=generator.set_state
        )
        monkeypatch.setattr(devices, "accelerator", lambda: "mps")
        monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        state = RandomState.now()
        drawn = torch.rand(3, generator=generator)
        state.restore()
        assert torch.equal(torch.rand(3, generator=generator), drawn)


def test_autocast_that_is_not_known_is_off(monkeypatch):
    """As of Apple's in PyTorch 2.4."""

    def refuses(kind):
        raise RuntimeError(f"unknown device type for autocast: {kind}")

    monkeypatch.setattr(torch, "is_autocast_enabled", refuses)
    assert devices.autocast_dtype("mps") is None
    assert devices.autocast_types() == []


def test_constants_of_a_bound_made_in_inference_mode_take_part_in_gradients():
    """They are made once, whoever asks first."""
    bound = TVO(3, (0.0, 0.123456, 1.0))
    log_w = torch.tensor([[0.3, -1.0, 2.0]])
    with torch.inference_mode():
        value = bound.value(log_w)
    leaf = log_w.clone().requires_grad_()
    again = bound.value(leaf)
    again.backward()
    assert again.item() == value.item()
    torch.testing.assert_close(leaf.grad, bound.weights(log_w))

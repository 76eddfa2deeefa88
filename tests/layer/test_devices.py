"""What devices say of themselves."""

from __future__ import annotations

import pytest
import torch

from epbackend.device import devices, get_device
from epbackend.errors import UnavailableError


def test_the_cpu_is_always_there():
    cpu = devices()["cpu"]
    assert cpu.unavailable() is None
    assert (cpu.collective_backend, cpu.torch_device(3)) == ("gloo", torch.device("cpu"))
    memory = cpu.memory()
    assert 0 < memory.free <= memory.total


def test_auto_tries_the_cpu_last():
    assert list(devices())[-1] == "cpu"
    usable = [each.name for each in devices().values() if not each.emulated and each.unavailable() is None]
    assert get_device("auto").name == usable[0]


def test_auto_passes_the_interpreter_by(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert get_device("auto").name != "cuda"


def test_kernel_sets_of_a_device_that_is_not_here():
    device = devices()["cuda"]
    if device.unavailable() is None:
        pytest.skip("cuda can be used here")
    with pytest.raises(UnavailableError, match="device cuda cannot be used"):
        device.kernel_set("grouped_mm")


def test_ranks_need_a_torch_with_the_devices_collectives(monkeypatch):
    assert devices()["cpu"].no_collectives() is None
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name == "gloo")
    assert "has no NCCL; install a build that has it, or run one rank" in str(
        devices()["cuda"].no_collectives()
    )


@pytest.mark.parametrize("name", ["cuda", "ascend"])
def test_a_device_without_kernels_gives_its_reason(name):
    device = devices()[name]
    reason = device.unavailable()
    if reason is None:
        pytest.skip(f"{name} can be used here")
    assert "use device cpu" in reason
    with pytest.raises(UnavailableError, match=f"device {name} cannot be used"):
        get_device(name)
    with pytest.raises(UnavailableError, match=f"device {name} cannot be used"):
        _ = device.kernels

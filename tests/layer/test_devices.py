"""What devices say of themselves."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from epbackend.device import cpu, cpu_group, devices, get_device
from epbackend.device.base import Memory
from epbackend.device.cuda import NEWEST, CudaDevice
from epbackend.errors import UnavailableError


def test_the_cpu_is_always_there():
    device = devices()["cpu"]
    assert device.unavailable() is None
    assert (device.collective_backend, device.torch_device(3)) == (cpu_group.NAME, torch.device("cpu"))
    memory = device.memory()
    assert 0 < memory.free <= memory.total


@pytest.mark.parametrize(
    "names",
    [
        ("memory.max", "memory.current", "inactive_file", "active_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"),
    ],
    ids=["cgroup v2", "cgroup v1"],
)
def test_what_a_container_has_read_from_files_counts_as_free(names, tmp_path, monkeypatch):
    limit, used, inactive, active = names
    (tmp_path / limit).write_text("4000\n")
    (tmp_path / used).write_text("3000\n")
    (tmp_path / "memory.stat").write_text(f"anon 500\n{inactive} 900\n{active} 600\n")
    monkeypatch.setattr(
        cpu, "CONTROL_GROUPS", tuple(replace(each, folder=tmp_path) for each in cpu.CONTROL_GROUPS)
    )
    assert get_device("cpu").memory() == Memory(4000, 2500)


def test_without_a_limit_all_memory_is_free(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("max")
    monkeypatch.setattr(cpu, "CONTROL_GROUPS", (replace(cpu.CONTROL_GROUPS[0], folder=tmp_path),))
    assert get_device("cpu").memory().total > 1 << 30


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


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((7, 5), "is older than Ampere"),
        ((13, 0), "compute capability 13.0.*tiles for those up to 12: update"),
    ],
)
def test_gpus_that_the_kernels_are_not_made_for_are_refused(capability, reason, monkeypatch):
    tiles = pytest.importorskip("epbackend.kernels.triton.tiles")
    assert max(tiles.FAMILIES) == NEWEST
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, found in (
        ("is_available", True),
        ("get_device_name", "a GPU"),
        ("get_device_capability", capability),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    assert re.search(reason, str(CudaDevice().unavailable()))

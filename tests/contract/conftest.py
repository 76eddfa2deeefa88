"""The devices under test."""

from __future__ import annotations

from pathlib import Path

import pytest

from epbackend.device import devices
from epbackend.kernels.reference import ReferenceKernels
from tests.helpers.layer_case import SHUFFLED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks whole layers, and among them those on several ranks and the rarer ones: for runs that leave these out."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and "ranks" in item.fixturenames:
            item.add_marker(pytest.mark.layer)
            if item.callspec.params.get("size") != 1:
                item.add_marker(pytest.mark.several_ranks)
            if item.callspec.params["device"] == "ascend" and _rare_there(item.callspec.params):
                item.add_marker(pytest.mark.slow)


def _rare_there(params: dict[str, object]) -> bool:
    """Of the combinations: dispatchers are one code for all devices, and the CPU has every one of their cases.

    The tests of kernels, rows and splits try what is Ascend's own.
    """
    other_ranks = False
    if {"size", "token_size"} <= params.keys():
        other_ranks = (params["size"], params["token_size"]) not in ((1, 1), (2, 1), (4, 2))
    other_slots = params.get("slots", SHUFFLED) != SHUFFLED
    other_way = "split" in params and params["way"] != "level2"
    return other_ranks or other_slots or other_way


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("cpu", "cuda", "ascend")],
)
def device(request):
    """Each device; skipped, with the device's own reason, where it cannot be used."""
    found = devices()[request.param]
    if reason := found.unavailable():
        pytest.skip(f"{request.param}: {reason}")
    return found


@pytest.fixture(scope="session")
def place(device):
    """The torch device of the first rank's tensors."""
    return device.torch_device(0)


@pytest.fixture(scope="session", params=["reference", "own"])
def kernels(request, device):
    """The device's own kernels, and the reference that they are held to."""
    if request.param == "own":
        return device.kernels
    if device.emulated:
        pytest.skip("the interpreter's tensors are the CPU's: the reference is tested there")
    return ReferenceKernels()

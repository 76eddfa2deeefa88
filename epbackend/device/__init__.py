"""Devices that can run experts, found by the entry point group `epbackend.devices`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from epbackend.device.ascend import AscendDevice
from epbackend.device.base import Device, Memory
from epbackend.device.cpu import CpuDevice
from epbackend.device.cuda import CudaDevice
from epbackend.errors import ConfigError, UnavailableError

__all__ = ["Device", "Memory", "devices", "get_device"]

GROUP = "epbackend.devices"
BUILT_IN: tuple[type[Device], ...] = (CudaDevice, AscendDevice, CpuDevice)


@cache
def devices() -> dict[str, Device]:
    """Every known device by name, usable or not, in the order in which "auto" tries them; the CPU comes last."""
    built_in = {cls.name: cls() for cls in BUILT_IN}
    points = entry_points(group=GROUP)
    plugins = {point.name: point.load()() for point in points if point.name not in built_in}
    cpu = built_in.pop(CpuDevice.name)
    return {**built_in, **plugins, CpuDevice.name: cpu}


def get_device(name: str = "auto") -> Device:
    """The device of that name, or with "auto" the first that is real and can be used.

    Raises ConfigError for an unknown name, UnavailableError (with the reason) for a device that cannot be used here.
    """
    known = devices()
    if name == "auto":
        return next(each for each in known.values() if not each.emulated and each.unavailable() is None)
    if name not in known:
        raise ConfigError(f"device {name!r} is unknown; known are auto, {', '.join(known)}")
    if reason := known[name].unavailable():
        raise UnavailableError(f"device {name} cannot be used: {reason}")
    return known[name]

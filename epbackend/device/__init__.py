"""Devices that can run experts: those of `names.DEVICES`, and what other packages add to that table."""

from __future__ import annotations

from functools import cache

from epbackend.device.base import Device, Memory
from epbackend.errors import unknown_name
from epbackend.names import AUTO, DEVICES

__all__ = ["Device", "Memory", "devices", "get_device"]

LAST = "cpu"
"""The device that "auto" takes where there is no other."""


@cache
def devices() -> dict[str, Device]:
    """Every known device by name, usable or not, in the order in which "auto" tries them; the CPU comes last.

    Raises:
        UnavailableError: a package that adds a device does not load.
    """
    names = [name for name in DEVICES.names() if name != LAST]
    return {name: DEVICES.load(name)() for name in [*names, LAST]}


def get_device(name: str = AUTO) -> Device:
    """The device of that name, or with "auto" the first that is real and can be used.

    Raises:
        ConfigError: there is no such device.
        UnavailableError: the device cannot be used here; the error has the reason.
    """
    known = devices()
    if name == AUTO:
        return next(each for each in known.values() if not each.emulated and each.unavailable() is None)
    if name not in known:
        raise unknown_name("device", name, (AUTO, *known))
    known[name].check_available()
    return known[name]

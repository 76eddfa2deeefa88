"""Devices: what can run the experts, found by the entry point group `epbackend.devices`."""

from __future__ import annotations

from epbackend.device.base import Device
from epbackend.device.cpu import CpuDevice


def get_device(name: str = "auto") -> Device:
    return CpuDevice()

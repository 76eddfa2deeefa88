from __future__ import annotations

from abc import ABC


class Device(ABC):
    name: str

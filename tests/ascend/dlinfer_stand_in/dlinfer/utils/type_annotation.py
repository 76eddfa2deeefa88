"""What dlinfer's own experts want to know of a step."""

from __future__ import annotations

from enum import Enum, auto
from types import SimpleNamespace


class MoECommType(Enum):
    ALLGATHER = auto()
    ALLTOALL = auto()
    MC2 = auto()


class MoeMetadata(SimpleNamespace):
    """One attribute for each keyword."""

"""Which layer of the model LMDeploy is building: some of its models do not tell their experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_building: ContextVar[int | None] = ContextVar("building_layer", default=None)


@contextmanager
def building(layer: int) -> Iterator[None]:
    """What is built in this block belongs to that layer."""
    token = _building.set(layer)
    try:
        yield
    finally:
        _building.reset(token)


def layer_being_built(told: int) -> int:
    """The layer of the block around the call, or else the one that LMDeploy tells."""
    layer = _building.get()
    return told if layer is None else layer

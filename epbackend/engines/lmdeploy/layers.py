"""Which layer of the model LMDeploy is building: some of its models do not tell their experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from epbackend.errors import UnavailableError

_building: ContextVar[int | None] = ContextVar("building_layer", default=None)


@contextmanager
def building(layer: int) -> Iterator[None]:
    """What is built in this block belongs to that layer."""
    token = _building.set(layer)
    try:
        yield
    finally:
        _building.reset(token)


def layer_being_built(told: int | None) -> int:
    """The layer of the block around the call, or else the one that LMDeploy tells.

    Raises:
        UnavailableError: nobody tells. All layers would count as one, and get one layer's places.
    """
    layer = _building.get()
    if layer is None:
        layer = told
    if layer is None:
        raise UnavailableError(
            "this model's W8A8 experts do not tell which layer they belong to; use its bfloat16 or FP8 checkpoint"
        )
    return layer

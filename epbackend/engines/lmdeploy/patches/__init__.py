"""Every change to LMDeploy 0.18.0, by theme. Each says what it replaces, why, and when it is needed."""

from __future__ import annotations

from epbackend.engines.lmdeploy.patches import (
    cache,
    compiler,
    config,
    cuda,
    device,
    executors,
    models,
    steps,
)
from epbackend.engines.lmdeploy.patching import Patch

# The compiler's comes first: finding the others imports the functions it is about.
PATCHES: tuple[Patch, ...] = tuple(
    value
    for theme in (compiler, config, cuda, device, cache, executors, models, steps)
    for value in vars(theme).values()
    if isinstance(value, Patch)
)


def needed(device_name: str, ep_size: int, executor: str) -> tuple[Patch, ...]:
    """The patches for a device, a number of expert ranks and an executor (uni, mp, ray)."""
    present = {"always", device_name, executor} | ({"ep"} if ep_size > 1 else set())
    return tuple(each for each in PATCHES if each.when in present)

"""Every change to LMDeploy 0.18.0, by theme. Each says what it replaces, why, and when it is needed."""

from __future__ import annotations

from epbackend.engines.lmdeploy.patches import (
    ascend,
    cpu,
    cuda,
    engine,
    executors,
    handover,
    models,
    requests,
)
from epbackend.engines.lmdeploy.patching import Patch

# The CPU's and Ascend's come first: one of each must be applied before the targets of the others are imported.
PATCHES: tuple[Patch, ...] = (
    *cpu.PATCHES,
    *ascend.PATCHES,
    *cuda.PATCHES,
    *engine.PATCHES,
    *executors.PATCHES,
    *models.PATCHES,
    *handover.PATCHES,
    *requests.PATCHES,
)


def every_patch() -> tuple[Patch, ...]:
    """PATCHES, and those of the API server, which is imported for them: a second that ranks and pipelines save."""
    from epbackend.engines.lmdeploy.patches import server

    return PATCHES + server.PATCHES


def needed(device_name: str, ep_size: int, executor: str) -> tuple[Patch, ...]:
    """The patches for a device, a number of expert ranks and an executor (uni, mp, ray)."""
    present = {"always", device_name, executor} | ({"ep"} if ep_size > 1 else set())
    return tuple(each for each in PATCHES if each.when in present)


def of_run() -> tuple[Patch, ...]:
    """Those that `epbackend run` applies before the program starts, which enables the plug only later."""
    return (handover.packaged_models, *(each for each in PATCHES if each.when == "run"))

"""CPU threads of a rank."""

from __future__ import annotations

import os

import torch

from epbackend.device import get_device
from epbackend.engines.lmdeploy.state import active


def set_threads() -> None:
    """Gives this worker what `engine.threads_per_rank` says, on a CPU else its share of the machine's cores."""
    config = active().config
    threads = config.engine.threads_per_rank
    if threads is None and get_device(config.device).name == "cpu":
        threads = max(1, (os.cpu_count() or 1) // config.world_size)
    if threads is not None:
        torch.set_num_threads(threads)

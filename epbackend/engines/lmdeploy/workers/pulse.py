"""A rank's side of the watch over its steps: it shows that it runs and how far it has come, and ends when it is stuck.

LMDeploy's own collectives (attention's all-reduce, the broadcast of the next tokens) wait without end where a rank is
lost: it makes its process groups with a timeout of 97 years, and on a GPU or NPU nothing waits where a collective is
called. So each rank marks the beginning of a step, each MoE layer that it comes to, and the end. A thread looks at the
last mark twice a second and shows in the shared statistics that the process runs. The engine's process reads both
(`rank_watch`), and names the rank at fault. Where it cannot (the rank is on another machine, the engine is lost), the
rank ends by itself a little later.

Only steps are watched: loading, capture, warm-up and sleep may take as long as they need.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from epbackend.device.cpu_group import NAME, CpuGroup
from epbackend.dispatch.running_time import RunningTime
from epbackend.engines.lmdeploy.load.report import PULSE_PHASES, RANK, rank_row, record_error
from epbackend.engines.lmdeploy.workers.rank_watch import WAITS, where

logger = logging.getLogger("epbackend")

BEAT_S = 0.5
"""Between two looks, and two signs of life."""
LAST_RESORT_S = 4.0
"""How much later than the engine's process the rank itself ends."""

_COLLECTIVE_FILES = (
    "/torch/distributed/",
    "/dispatch/collectives.py",
    "/device/cpu_group.py",
    "/asyncio/",
    "/selectors.py",
)


class Pulse:
    """The marks of this process's rank."""

    def __init__(self, timeout_s: float, end: Callable[[], None] = lambda: os._exit(1)) -> None:
        """`end` is what happens when a step is stuck and this process has not been ended."""
        self._timeout_s, self._end = timeout_s, end
        # Marks are taken before anything watches them, by layers in warm-up: kept here, and shared from `start` on.
        self._row: Any = np.zeros(1, RANK)[0]
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._asleep: Callable[[], bool] = lambda: False

    def start(self, rank: int) -> None:
        """Watches the steps of this rank, in the thread that calls this. The model is loaded and warmed up by now."""
        limit_groups(self._timeout_s)
        row = rank_row(rank)
        if row is not None:
            self._row = row
        self._rank, self._runner = rank, threading.get_ident()
        self._row["pid"], self._row["beat"] = os.getpid(), time.monotonic()
        self._thread = threading.Thread(target=self._run, name="epbackend pulse", daemon=True)
        self._thread.start()

    @contextmanager
    def step(self, phase: str, asleep: Callable[[], bool]) -> Iterator[None]:
        """A step of the engine is inside. While `asleep()` it waits for the wake-up, however long."""
        self._asleep = asleep
        self._row["layer"] = -1
        self._row["moved"] = time.monotonic()
        self._row["phase"] = PULSE_PHASES.index(phase)
        try:
            yield
        finally:
            self._row["phase"] = 0

    def at_layer(self, layer: int) -> None:
        """The step has come to that MoE layer."""
        self._row["layer"] = layer
        self._row["moved"] = time.monotonic()

    def close(self) -> None:
        """Ends the watch."""
        self._stop.set()

    def _run(self) -> None:
        running = RunningTime()
        while not self._stop.wait(BEAT_S):
            row, now = self._row, running.look()
            row["beat"] = now
            if self._asleep():
                row["moved"] = now
            still_s = running.age_s(float(row["moved"])) if row["phase"] else 0.0
            if still_s > self._timeout_s:
                row["place"] = self._place().encode()[:512]
                if still_s > self._timeout_s + LAST_RESORT_S:
                    self._give_up(still_s)
            elif row["place"]:
                row["place"] = b""

    def _give_up(self, still_s: float) -> None:
        text = (
            f"rank {self._rank} is stuck: {where(self._row)} has not moved on for {still_s:.0f} s "
            f"(timeout_s {self._timeout_s:g}); it {self._place()}"
        )
        logger.critical(text)
        record_error(self._rank, text)
        self._end()

    def _place(self) -> str:
        """What the thread that runs the steps is doing, in words."""
        frame = sys._current_frames().get(self._runner)
        if frame is None:
            return "has left its loop"
        stack = traceback.extract_stack(frame)
        innermost = stack[-1]
        waits = any(part in each.filename for each in stack[-4:] for part in _COLLECTIVE_FILES)
        ours = next((each for each in reversed(stack) if "/torch/" not in each.filename), innermost)
        at = ours if waits else innermost
        return f"{WAITS if waits else 'stands in '}{at.name} ({_short(at.filename)}:{at.lineno})"


def limit_groups(timeout_s: float) -> None:
    """Gives every process group `timeout_s`, in place of LMDeploy's 97 years.

    Later than they are made: ranks load for different times, and wait for each other in barriers meanwhile. A group's
    timeout counts while somebody waits in a collective, so an idle engine meets none.
    """
    if not dist.is_initialized():
        return
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # backends that have no such setting are watched by the steps' age alone
        for group in list(c10d._world.pg_map):
            if isinstance(group, CpuGroup):
                group.set_timeout(timedelta(seconds=timeout_s))
            elif dist.get_backend(group) in ("gloo", NAME):
                # Torch's function would ask for the group's "cuda", which LMDeploy on Ascend makes a name of the NPU.
                group._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=timeout_s))
            else:
                c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def _short(path: str) -> str:
    return "/".join(path.split("/")[-2:])

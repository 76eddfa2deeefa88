"""A rank that is lost: which ranks do not answer, and how the others end while their GPUs wait for it.

After a failed collective a backend's error names an address at best. But every rank that is alive fails in the same
collective, at the latest when its timeout is over, and then signs in the process group's store. The ranks that have not
signed by then do not answer. The store itself may be gone with the rank that keeps it, and a stopped keeper would block
us: so a thread asks it, and is left behind when it takes too long.

On a GPU collectives do not fail where they are called. When a rank is lost the kernels of the others wait for it, and
their hosts block in the next call that needs a result, where no exception can reach them. NCCL's own watchdog follows
the group's timeout (LMDeploy sets 97 years), and sees nothing of what a CUDA graph replays. So a thread looks at the
oldest mark that the GPU has not passed. When it is overdue, the thread asks which ranks do not answer, reports them and
ends the process, as NCCL's watchdog would.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from epbackend.dispatch.running_time import RunningTime

logger = logging.getLogger("epbackend")

GRACE_S = 2.0
"""Ranks do not fail at the same moment."""
STORE_POLL_S = 0.05
POLL_S = 1.0


def unresponsive_ranks(group: dist.ProcessGroup, timeout_s: float) -> str:
    """Which ranks do not answer, in words; waits `timeout_s` and a little grace at most."""
    deadline = time.monotonic() + timeout_s + GRACE_S
    signed: set[int] = set()
    asking = threading.Thread(target=_collect_signatures, args=(group, deadline, signed), daemon=True)
    asking.start()
    asking.join(deadline + GRACE_S - time.monotonic())
    global_ranks = dist.get_process_group_ranks(group)
    missing = [rank for rank in global_ranks if rank not in signed]
    if not missing:
        return "every rank still answers, so the ranks disagree about their calls or the network failed"
    if not signed:
        return _store_is_gone()
    names = ", ".join(map(str, missing))
    return f"rank {names} does not answer" if len(missing) == 1 else f"ranks {names} do not answer"


def _collect_signatures(group: dist.ProcessGroup, deadline: float, signed: set[int]) -> None:
    """Sign, then add to `signed` each rank that has signed, until all have or the deadline passes."""
    store = c10d._get_process_group_store(group)
    waiting = set(dist.get_process_group_ranks(group))
    try:
        store.set(_signature(dist.get_rank()), "here")
        while waiting and time.monotonic() < deadline:
            here = {rank for rank in waiting if store.check([_signature(rank)])}
            signed |= here
            waiting -= here
            time.sleep(STORE_POLL_S)
    except dist.DistNetworkError:
        return  # the store is gone, which the caller sees by the missing signatures


def _signature(rank: int) -> str:
    return f"epbackend/answers/{rank}"


def _store_is_gone() -> str:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "no rank could be asked, because torchrun's own process does not answer"
    return "rank 0 does not answer, which also keeps the store where the others could be asked"


@dataclass(frozen=True)
class Mark:
    """A place in the order of a device's work."""

    what: str
    """What ends there, for the report."""
    passed: Callable[[], bool]
    set_at: float
    timeout_s: float

    @property
    def over(self) -> bool:
        """Whether the GPU has passed it, or will wait no more because it failed, which the host notices by itself."""
        try:
            return self.passed()
        except RuntimeError:
            return True


class Watchdog:
    """The marks of one stream, oldest first, and the thread that looks at them."""

    def __init__(self, who: Callable[[], str], end: Callable[[], None]) -> None:
        """`who` says in words which ranks do not answer; `end` is what happens after the report."""
        self._who, self._end = who, end
        self._marks: deque[Mark] = deque()
        self._time = RunningTime()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        # A queue and no Event: its `put` may be called by the garbage collector, in whatever thread that runs.
        self._stop: SimpleQueue[None] = SimpleQueue()

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Watchdog:
        """One that ends this process when a rank of the group is lost."""
        return cls(lambda: unresponsive_ranks(group, POLL_S), lambda: os.kill(os.getpid(), signal.SIGABRT))

    def add(self, what: str, passed: Callable[[], bool], timeout_s: float) -> None:
        """Watch a mark that was just set; marks are passed in the order in which they were added."""
        with self._lock:
            while self._marks and self._marks[0].over:
                self._marks.popleft()
            self._marks.append(Mark(what, passed, time.monotonic(), timeout_s))
        if self._thread is None:
            self._time.look()
            self._thread = threading.Thread(target=self._run, name="epbackend watchdog", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread; marks that it has not looked at are forgotten."""
        self._stop.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(POLL_S)

    def _run(self) -> None:
        while not (late := self._late()):
            try:
                self._stop.get(timeout=POLL_S)
            except Empty:
                continue
            return
        logger.critical(
            "%s did not end within timeout_s %g: %s. This process ends, as its GPU would wait without end",
            late.what,
            late.timeout_s,
            self._who(),
        )
        self._end()

    def _late(self) -> Mark | None:
        """The oldest mark, if it is overdue and was not passed.

        Each mark is asked once, when it is overdue: a query from this thread would break a capture in the main thread,
        and shortly before each capture LMDeploy runs the same layers, whose marks are new.
        """
        self._time.look()
        with self._lock:
            while self._marks and self._time.age_s(self._marks[0].set_at) > self._marks[0].timeout_s:
                if not self._marks[0].over:
                    return self._marks[0]
                self._marks.popleft()
        return None

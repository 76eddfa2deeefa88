"""After a failed collective: which ranks do not answer?

A backend's error names an address at best. But every rank that is alive fails in the same collective, at the latest
when its timeout is over, and then signs in the process group's store; who has not signed by then is to blame. The
store itself may be gone with the rank that keeps it, and a stopped keeper would block us: so a thread asks it, and
is left alone when it takes too long.

Watches what a GPU does without the host: work that never ends becomes an error that names rank and layer.

Collectives on a GPU do not fail where they are called. When a rank is lost the kernels of the others wait for it, and
their hosts block in the next call that needs a result, where no exception can reach them. NCCL's own watchdog follows
the group's timeout (LMDeploy sets 97 years), and sees nothing of what a CUDA graph replays. So a thread looks at the
oldest mark that the GPU has not passed. When it is overdue, the thread asks who does not answer, reports it and ends
the process, as NCCL's watchdog would.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Lock, Thread

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

GRACE_S = 2.0  # ranks do not fail at the same moment
STORE_POLL_S = 0.05


def blame(group: dist.ProcessGroup, patience_s: float) -> str:
    """Who is missing, in words; waits `patience_s` and a little grace at most."""
    deadline = time.monotonic() + patience_s + GRACE_S
    signed: set[int] = set()
    clerk = Thread(target=_collect, args=(group, deadline, signed), daemon=True)
    clerk.start()
    clerk.join(deadline + GRACE_S - time.monotonic())
    global_ranks = dist.get_process_group_ranks(group)
    missing = [rank for rank in global_ranks if rank not in signed]
    if not missing:
        return "every rank still answers, so the ranks disagree about their calls or the network failed"
    if not signed:
        return _store_is_gone()
    names = ", ".join(map(str, missing))
    return f"rank {names} does not answer" if len(missing) == 1 else f"ranks {names} do not answer"


def _collect(group: dist.ProcessGroup, deadline: float, signed: set[int]) -> None:
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
        return  # the store is gone, which `blame` sees by the missing signatures


def _signature(rank: int) -> str:
    return f"epbackend/rollcall/{rank}"


def _store_is_gone() -> str:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "no rank could be asked, because torchrun's own process does not answer"
    return "rank 0 does not answer, which also keeps the store where the others could be asked"


logger = logging.getLogger("epbackend")
POLL_S = 1.0
_marked_as_one = False


def watch(what: str, group: dist.ProcessGroup | None, timeout_s: float) -> None:
    """Mark this place in the current CUDA stream; `what` ends there. Does nothing while a graph is captured.

    A replay of a graph that holds collectives is marked by calling this after it. No group, nobody to wait for. Does
    nothing inside `one_mark` either.
    """
    if group is None or _marked_as_one or torch.cuda.is_current_stream_capturing():
        return
    passed = torch.cuda.Event()
    passed.record()
    _sentry(group).add(what, passed.query, timeout_s)


@contextmanager
def one_mark() -> Iterator[None]:
    """Layers inside set no mark of their own: whoever enters this watches what comes after them all.

    Between the two the host must not wait for the device, unless `held` says so.
    """
    global _marked_as_one
    before, _marked_as_one = _marked_as_one, True
    try:
        yield
    finally:
        _marked_as_one = before


@contextmanager
def held(what: str, group: dist.ProcessGroup, timeout_s: float) -> Iterator[None]:
    """Watch the host itself, which waits inside for what the device finds."""
    free: list[bool] = []
    _sentry(group).add(what, lambda: bool(free), timeout_s)
    try:
        yield
    finally:
        free.append(True)


@cache
def _sentry(group: dist.ProcessGroup) -> Sentry:
    return Sentry(lambda: blame(group, POLL_S), lambda: os.kill(os.getpid(), signal.SIGABRT))


@dataclass(frozen=True)
class Mark:
    """A place in the order of a device's work."""

    what: str
    passed: Callable[[], bool]
    set_at: float
    timeout_s: float

    @property
    def over(self) -> bool:
        """Whether the GPU has passed it, or waits for nobody because it failed, of which the host hears by itself."""
        try:
            return self.passed()
        except RuntimeError:
            return True

    @property
    def overdue(self) -> bool:
        return time.monotonic() - self.set_at > self.timeout_s


class Sentry:
    """The marks of one stream, oldest first, and the thread that looks at them."""

    def __init__(self, who: Callable[[], str], end: Callable[[], None]) -> None:
        """`who` says in words which ranks do not answer; `end` is what happens after the report."""
        self._who, self._end = who, end
        self._marks: deque[Mark] = deque()
        self._lock = Lock()
        self._thread: Thread | None = None

    def add(self, what: str, passed: Callable[[], bool], timeout_s: float) -> None:
        """Watch a mark that was just set; marks are passed in the order in which they were added."""
        with self._lock:
            while self._marks and self._marks[0].over:
                self._marks.popleft()
            self._marks.append(Mark(what, passed, time.monotonic(), timeout_s))
        if self._thread is None:
            self._thread = Thread(target=self._stand, name="epbackend sentry", daemon=True)
            self._thread.start()

    def _stand(self) -> None:
        while not (late := self._late()):
            time.sleep(POLL_S)
        logger.critical(
            "%s did not end within timeout_s %g: %s. This process ends, as its GPU would wait for ever",
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
        with self._lock:
            while self._marks and self._marks[0].overdue:
                if not self._marks[0].over:
                    return self._marks[0]
                self._marks.popleft()
        return None

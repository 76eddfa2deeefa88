"""After a failed collective: which ranks do not answer?

A backend's error names an address at best. But every rank that is alive fails in the same collective, at the latest
when its timeout is over, and then signs in the process group's store; who has not signed by then is to blame. The
store itself may be gone with the rank that keeps it, and a stopped keeper would block us: so a thread asks it, and
is left alone when it takes too long.
"""

from __future__ import annotations

import os
import time
from threading import Thread

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

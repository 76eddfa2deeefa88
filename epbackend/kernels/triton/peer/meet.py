"""All ranks meet: none goes on before every rank has come, and what each stored before it came is there for all.

Each rank counts the meetings, writes its number into its place at every rank, and waits until all places in its own
memory have come as far. Numbers only grow, so nothing is ever reset, and a rank that is already at the next meeting
does no harm.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.blocks import INTERPRETED
from epbackend.kernels.triton.peer.mirror import Mirror, reach

POLLS_PER_S = 5_000 if INTERPRETED.value else 1_000_000
"""How often a waiting rank looks, roughly: an atomic operation on its own memory takes about a microsecond."""


def meet(
    signals: Mirror, meeting_1: Tensor, finding_2: Tensor, rank: int, note: int, patience_s: float
) -> None:
    """`signals` (int64 [R]) are zeros at first, as is `meeting_1` (int64), this rank's count of meetings.

    When a rank does not come within about `patience_s`, its number + 1 and `note` are written to `finding_2` (int64,
    zeros until then, may be pinned host memory) and the GPU stops with an error: whatever follows would be wrong.
    """
    ranks = len(signals.mine)
    polls = max(1, int(patience_s * POLLS_PER_S))
    _meet[(1,)](
        signals.addresses_R,
        signals.mine,
        meeting_1,
        finding_2,
        rank,
        note,
        polls,
        ranks,
        triton.next_power_of_2(ranks),
        num_warps=1,
    )


@triton.jit(do_not_specialize=["rank", "note", "polls"])
def _meet(addresses_R, signals_R, meeting_1, finding_2, rank, note, polls, ranks, RANKS: tl.constexpr):
    """One program. The signals are atomics because those alone carry an order between GPUs (release and acquire)."""
    peer = tl.arange(0, RANKS)
    there = peer < ranks
    meeting = tl.load(meeting_1) + 1
    tl.store(meeting_1, meeting)
    place = reach(addresses_R, tl.where(there, peer, 0), signals_R) + rank
    tl.atomic_xchg(place, tl.zeros((RANKS,), tl.int64) + meeting, mask=there, sem="release", scope="sys")
    nothing = tl.zeros((RANKS,), tl.int64)
    late = peer + 1
    while (tl.max(late) > 0) & (polls > 0):
        seen = tl.atomic_add(signals_R + peer, nothing, mask=there, sem="acquire", scope="sys")
        late = tl.where(there & (seen < meeting), peer + 1, 0)
        polls -= 1
    if tl.max(late) > 0:
        tl.store(finding_2 + 1, note.to(tl.int64))
        tl.store(finding_2, tl.max(late).to(tl.int64))
        stop()


@triton.jit
def stop():
    """End all work of this process on the GPU with an error, once what was stored before has left the GPU."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )

"""Ranks that are processes: they map each other's memory, meet in the kernel, and name a rank that does not come.

On a CPU over shared memory (`shared_memory.py`), in Triton's interpreter.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.dispatch.context import GroupContext
from epbackend.dispatch.symmetric_memory import SymmetricMemoryPeers
from epbackend.errors import CollectiveError, UnavailableError
from tests.helpers import shared_memory
from tests.helpers.layer_case import Case, Seen, layer_equals_dense

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not knobs.runtime.interpret, reason="the stand-in for symmetric memory is for CPUs"),
]
CPU = torch.device("cpu")
BOUNDED = DispatchSettings(level=2, dispatcher="symmetric", max_tokens=11)
STATIC = DispatchSettings(level=2, dispatcher="symmetric", static=True, max_tokens=11)


def layers(groups: dict[int, RankGroup], cases: list[Case]) -> list[Seen]:
    """Several layers, one after the other, on the same peers."""
    with shared_memory.over_shared_memory(), GroupContext() as context:
        return [layer_equals_dense(groups, case, context) for case in cases]


@pytest.mark.parametrize(("size", "token_size"), [(2, 1), (4, 1), (4, 2)])
def test_layers_that_share_their_buffers(ranks, size, token_size):
    groups = size // token_size
    case = Case(size, (7, 0, 11, 3)[:groups], BOUNDED, token_size, device="cuda")
    static = replace(case, tokens=(9,) * groups, settings=STATIC)
    seen = ranks.run(size, layers, [case, static, replace(case, seed=1), replace(static, seed=2)])
    assert {each.dispatcher for rank in seen for each in rank} == {"symmetric"}


def lost(groups: dict[int, RankGroup]) -> str:
    """The last rank leaves between two barriers."""
    ranks = groups[1]
    with shared_memory.over_shared_memory():
        patient, hasty = (SymmetricMemoryPeers(ranks.group, CPU, timeout_s) for timeout_s in (60, 0.5))
    patient.barrier(layer=3)  # reads the kernel, which takes one rank longer than another
    if ranks.rank == ranks.size - 1:
        return ""
    with pytest.raises(CollectiveError) as failure:
        hasty.barrier(layer=4)
    return str(failure.value)


def test_a_rank_that_does_not_come_to_a_barrier_is_named(ranks):
    *heard, _ = ranks.run(4, lost)
    for message in heard:
        assert message.startswith("rank 3 did not come to an exchange of MoE layer 4 within timeout_s 0.5")


def closed_and_destroyed(groups: dict[int, RankGroup]) -> list[bool]:
    """Whether the buffers and the mappings of a group are gone when its context is closed and it is destroyed."""
    ranks = groups[1]
    group = dist.new_group(list(range(ranks.size)))
    case = Case(ranks.size, (5,) * ranks.size, BOUNDED, device="cuda")
    with shared_memory.over_shared_memory(), GroupContext() as context:
        layer_equals_dense({1: RankGroup.of(group)}, case, context)
        peers = context.get(SymmetricMemoryPeers, group, CPU, BOUNDED.timeout_s)
        (buffers,) = peers._buffers.values()
        held = [weakref.ref(each) for each in (peers, buffers, buffers.rows.local, *peers._handles)]
        del peers, buffers
    dist.destroy_process_group(group)
    gc.collect()
    return [ref() is None for ref in held]


def test_closing_leaves_no_buffer_and_no_mapping(ranks):
    for gone in ranks.run(2, closed_and_destroyed):
        assert len(gone) >= 5
        assert all(gone)


def unmapped(groups: dict[int, RankGroup]) -> str:
    """Rank 1 cannot map its peers' memory, as happens where there is no way between two GPUs."""
    ranks = groups[1]

    def rendezvous(tensor, group):
        if ranks.rank == 1:
            raise RuntimeError("CUDA driver error: invalid device ordinal")
        return shared_memory.Handle([tensor.data_ptr()] * ranks.size)

    with shared_memory.over_shared_memory(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory.symmetric_memory, "rendezvous", rendezvous)
        case = Case(2, (3, 4), replace(BOUNDED, timeout_s=5.0), device="cuda")
        with pytest.raises(UnavailableError) as failure:
            layer_equals_dense(groups, case)
    return str(failure.value)


def test_a_rank_that_cannot_map_the_others_fails_on_all(ranks):
    heard = set(ranks.run(2, unmapped))
    assert len(heard) == 1
    assert heard.pop().startswith(
        "MoE layer 0: rank 1 cannot share 0 MiB of GPU memory with its peers: CUDA driver error"
    )

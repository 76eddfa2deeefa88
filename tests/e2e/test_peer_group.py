"""The tests' own process group does what gloo does: on the CPU, where both can be had."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from epbackend.device.cuda import CudaDevice
from tests.helpers import peer_group
from tests.helpers.collectives import collectives
from tests.helpers.ranks import RankPool
from tests.helpers.shared_gpu_layer import layer_equals_dense, prepare


@pytest.fixture(scope="module")
def peers():
    """Ranks joined by the group under test."""
    pool = RankPool(peer_group.NAME, prepare)
    yield pool
    pool.close()


def test_collectives_are_those_of_gloo(peers):
    ours, theirs = (peers.run(4, collectives, backend) for backend in (peer_group.NAME, "gloo"))
    for of_peers, of_gloo in zip(ours, theirs, strict=True):
        for result, expected in zip(of_peers, of_gloo, strict=True):
            torch.testing.assert_close(result, expected, rtol=0, atol=0)


def what_a_store_holds(groups):
    """Rank 1 leaves a word in its group's store, where symmetric memory would look for it, and rank 0 reads it."""
    group = dist.new_group([0, 1], backend=peer_group.NAME)  # all four ranks take part
    if groups[1].rank > 1:
        return None
    plain = c10d._resolve_process_group(group.group_name)
    store = plain.get_group_store()
    if plain.rank() == 1:
        store.set("word", "found")
    return plain.size(), store.get("word")


def test_symmetric_memory_finds_a_store(peers):
    assert peers.run(4, what_a_store_holds) == [(2, b"found")] * 2 + [None] * 2


@pytest.mark.parametrize("static", [False, True], ids=["exact", "static"])
@pytest.mark.parametrize(
    ("dispatcher", "level", "token_size"),
    [("replicated", 1, 2), ("allgather", 1, 1), ("alltoall", 2, 1), ("alltoall", 2, 2)],
)
def test_a_layer(peers, dispatcher, level, token_size, static):
    seen = peers.run(2, layer_equals_dense, "cpu", dispatcher, level, token_size, static)
    assert seen == [dispatcher] * 2


@pytest.mark.cuda
@pytest.mark.parametrize("static", [False, True], ids=["exact", "static"])
@pytest.mark.parametrize(
    ("dispatcher", "level", "token_size"),
    [
        ("replicated", 1, 2),
        ("allgather", 1, 1),
        ("alltoall", 2, 1),
        ("alltoall", 2, 2),
        ("symmetric", 2, 1),
        ("symmetric", 2, 2),
    ],
)
def test_a_layer_of_qwen3_30b(peers, dispatcher, level, token_size, static):
    device = CudaDevice()
    if device.emulated or (reason := device.unavailable()):
        pytest.skip(f"cuda: {'this is the interpreter' if device.emulated else reason}")
    seen = peers.run(2, layer_equals_dense, "cuda", dispatcher, level, token_size, static)
    assert seen == [dispatcher] * 2

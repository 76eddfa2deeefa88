"""The tests' own process group does what gloo does: on the CPU, where both can be had."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from epbackend.device.cuda import CudaDevice
from tests.helpers import peer_group
from tests.helpers.ranks import RankPool
from tests.helpers.shared_gpu_layer import layer_equals_dense, prepare


@pytest.fixture(scope="module")
def peers():
    """Ranks joined by the group under test."""
    pool = RankPool(peer_group.NAME, prepare)
    yield pool
    pool.close()


def every_collective(groups, backend: str):
    """What this rank gets from each of them."""
    mine, peers = groups[1], range(groups[1].size)
    group = dist.new_group(peers, backend=backend)  # all four ranks take part
    x = torch.arange(8.0).view(4, 2) + 100 * mine.rank
    gathered, scattered, equal, top = x.new_empty(16, 2), x.new_empty(1, 2), torch.empty_like(x), x.clone()
    listed, root, total = [torch.empty_like(x) for _ in peers], x.clone(), x.clone()
    dist.all_reduce(total, group=group)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    dist.broadcast(root, src=2, group=group)
    dist.all_gather_into_tensor(gathered, x, group=group)
    dist.all_gather(listed, x, group=group)
    dist.reduce_scatter_tensor(scattered, x, group=group)
    dist.all_to_all_single(equal, x, group=group)
    dist.barrier(group=group)
    # rank r sends (r + p) % 3 rows to rank p
    sends, receives = [(mine.rank + p) % 3 for p in peers], [(p + mine.rank) % 3 for p in peers]
    sent = torch.arange(float(sum(sends))) + 10 * mine.rank
    uneven = sent.new_empty(sum(receives))
    dist.all_to_all_single(uneven, sent, receives, sends, group=group)
    return [total, top, root, gathered, torch.stack(listed), scattered, equal, uneven]


def test_collectives_are_those_of_gloo(peers):
    ours, theirs = (peers.run(4, every_collective, backend) for backend in (peer_group.NAME, "gloo"))
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

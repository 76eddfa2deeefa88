"""The process group of CPU ranks: it does what gloo does, in any order of waits, and says what went wrong."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from datetime import timedelta

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings

from epbackend.device import cpu_group
from epbackend.device.cpu_group import NAME, CpuGroup
from epbackend.engines.lmdeploy.workers.pulse import limit_groups
from tests.helpers.collectives import collectives, rarer_collectives
from tests.helpers.patience import PATIENCE_S

SIZE = 4
LARGE = 5 << 20
"""Bytes that no socket takes at once."""


def new_group(groups, timeout_s: float = PATIENCE_S) -> CpuGroup:
    group = dist.new_group(range(groups[1].size), timedelta(seconds=timeout_s), backend=NAME)
    assert isinstance(group, CpuGroup)
    return group


def assert_same(ours, theirs) -> None:
    for of_rank, expected in zip(ours, theirs, strict=True):
        for result, wanted in zip(of_rank, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=0, atol=0)


def test_collectives_are_those_of_gloo(ranks):
    assert_same(*(ranks.run(SIZE, collectives, backend) for backend in (NAME, "gloo")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_rarer_collectives_are_those_of_gloo(ranks, dtype):
    """With small whole numbers, which every order of sums gives exactly."""
    assert_same(*(ranks.run(SIZE, rarer_collectives, backend, dtype) for backend in (NAME, "gloo")))


def uneven_exchange(groups, rows_RR, width: int) -> bool:
    """Rank r sends `rows_RR[r][p]` rows to rank p; whether what came is what was sent."""
    group, me = new_group(groups), groups[1].rank
    sent = [torch.full((rows, width), 10.0 * me + peer) for peer, rows in enumerate(rows_RR[me])]
    receive_R = [of_rank[me] for of_rank in rows_RR]
    received = torch.empty(sum(receive_R), width)
    dist.all_to_all_single(received, torch.cat(sent), receive_R, rows_RR[me], group=group)
    wanted = torch.cat([torch.full((rows, width), 10.0 * peer + me) for peer, rows in enumerate(receive_R)])
    return torch.equal(received, wanted)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows_RR=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=2, max_size=2),
    width=st.sampled_from([1, 3, 40_000]),
)
def test_any_number_of_rows_comes_to_its_rank(ranks, rows_RR, width):
    assert ranks.run(2, uneven_exchange, rows_RR, width) == [True, True]


def tensors_with_gaps(groups) -> bool:
    group, me = new_group(groups), groups[1].rank
    base = torch.arange(6.0).view(2, 3)
    total, told = (base + me).t(), (base * me).t()
    dist.all_reduce(total, group=group)
    dist.broadcast(told, 1, group=group)
    whole = torch.zeros(3, 2 * SIZE).t()
    dist.all_gather_into_tensor(whole, (base + me), group=group)
    right = [torch.equal(total, (SIZE * base + sum(range(SIZE))).t()), torch.equal(told, base.t())]
    return all(right) and torch.equal(whole, torch.cat([base + peer for peer in range(SIZE)]))


def test_tensors_with_gaps_are_filled(ranks):
    assert ranks.run(SIZE, tensors_with_gaps) == [True] * SIZE


def waits_in_another_order(groups) -> bool:
    """Large tensors are under way in one group when ranks wait in another one, and only then in the first."""
    first, second, me = new_group(groups), new_group(groups), groups[1].rank
    parts = torch.full((SIZE, LARGE // 4), float(me))
    came = [torch.empty_like(parts) for _ in range(2)]
    works = [dist.all_to_all_single(each, parts, group=first, async_op=True) for each in came]
    total = torch.ones(LARGE // 4)
    dist.all_reduce(total, group=second)
    for work in reversed(works):
        work.wait()
    wanted = torch.arange(float(SIZE))[:, None].expand_as(parts)
    return bool((total == SIZE).all()) and all(torch.equal(each, wanted) for each in came)


def test_ranks_may_wait_in_another_order_than_they_began(ranks):
    assert ranks.run(SIZE, waits_in_another_order) == [True] * SIZE


def looks_again_and_again(groups) -> bool:
    group = new_group(groups)
    if groups[1].rank:
        time.sleep(0.2)
    total = torch.ones(5)
    work = dist.all_reduce(total, group=group, async_op=True)
    while not work.is_completed():
        time.sleep(0.001)
    return bool((total == SIZE).all())


def test_a_collective_that_is_only_looked_at_ends(ranks):
    assert ranks.run(SIZE, looks_again_and_again) == [True] * SIZE


def looks_for_a_lost_rank(groups) -> str:
    group, other = new_group(groups), new_group(groups)
    if groups[1].rank == 1:
        dist.barrier(other)
        dist.destroy_process_group(group)
        return ""
    work = dist.all_reduce(torch.ones(5), group=group, async_op=True)
    dist.barrier(other)
    while not work.is_completed():
        time.sleep(0.001)
    return fails_with(work.wait)


def test_whoever_only_looks_learns_of_a_lost_rank(ranks):
    assert "connection closed by rank 1" in ranks.run(2, looks_for_a_lost_rank)[0]


def moved_by_another_thread(groups) -> bool:
    """Tensors of torch's inference mode may be written to by threads in that mode alone."""
    first, second = new_group(groups), new_group(groups)
    with torch.inference_mode():
        total = torch.ones(5)
        work = dist.all_reduce(total, group=first, async_op=True)
    other = threading.Thread(target=dist.barrier, kwargs={"group": second})
    other.start()
    if groups[1].rank:
        time.sleep(0.2)
    other.join()
    with torch.inference_mode():
        work.wait()
    return bool((total == SIZE).all())


def test_another_thread_moves_bytes_and_writes_to_no_tensor(ranks):
    assert ranks.run(SIZE, moved_by_another_thread) == [True] * SIZE


def waits_in_two_threads(groups) -> bool:
    """A thread waits for a rank that is late while another one goes on in another group."""
    first, second, me = new_group(groups), new_group(groups), groups[1].rank
    late, others = torch.ones(3), torch.ones(3)
    thread = threading.Thread(target=dist.all_reduce, args=(late,), kwargs={"group": first})
    if me:
        thread.start()
    for _ in range(50):
        dist.all_reduce(others, dist.ReduceOp.MAX, group=second)
    if not me:
        thread.start()
    thread.join()
    return bool((late == SIZE).all()) and bool((others == 1).all())


def test_threads_wait_in_groups_of_their_own(ranks):
    assert ranks.run(SIZE, waits_in_two_threads) == [True] * SIZE


def fails_with(call, *args, **kwargs) -> str:
    with pytest.raises(RuntimeError) as error:
        call(*args, **kwargs)
    return str(error.value)


def call_different_collectives(groups) -> list[str]:
    group, x = new_group(groups), torch.ones(3)
    call = dist.broadcast if groups[1].rank else dist.all_reduce
    arguments = (x, 0) if groups[1].rank else (x,)
    return [fails_with(call, *arguments, group=group), fails_with(dist.barrier, group=group)]


def test_ranks_that_call_different_collectives_are_told(ranks):
    at_first, at_others = (ranks.run(2, call_different_collectives)[rank] for rank in (0, 1))
    assert (
        at_others
        == ["rank 1 of 2 CPU ranks: rank 0 sent all_reduce, 12 bytes; expected was broadcast, 12 bytes"] * 2
    )
    assert at_first == [at_first[0]] * 2, "a group that is broken says so again"
    assert "rank 0 of 2 CPU ranks: connection closed by rank 1" in at_first[0]


def call_with_different_sizes(groups) -> str:
    return fails_with(dist.all_reduce, torch.ones(3 + groups[1].rank), group=new_group(groups))


def test_ranks_that_bring_different_sizes_are_told(ranks):
    assert (
        "rank 1 sent all_reduce, 16 bytes; expected was all_reduce, 12 bytes"
        in ranks.run(2, call_with_different_sizes)[0]
    )


def one_rank_stays_away(groups) -> str:
    group = new_group(groups, timeout_s=0.3)
    told = "" if groups[1].rank == 1 else fails_with(dist.all_reduce, torch.ones(3), group=group)
    dist.barrier()
    return told


def test_a_rank_that_stays_away_is_named(ranks):
    told = ranks.run(SIZE, one_rank_stays_away)
    assert told[0] == f"rank 0 of {SIZE} CPU ranks: timed out after 0.3 s, waiting for ranks [1]"


def one_rank_destroys_the_group(groups) -> list[str]:
    group = new_group(groups)
    if groups[1].rank == 1:
        dist.destroy_process_group(group)
        return [fails_with(group.barrier)]
    return [fails_with(dist.all_reduce, torch.ones(3), group=group)]


def test_a_group_that_was_destroyed_is_of_no_use(ranks):
    (at_first,), (at_second,) = ranks.run(2, one_rank_destroys_the_group)
    assert "connection closed by rank 1" in at_first
    assert at_second == "the process group was destroyed"


def cannot_be_reduced(groups) -> str:
    return fails_with(
        dist.all_reduce, torch.ones(3, dtype=torch.int32), dist.ReduceOp.BXOR, group=new_group(groups)
    )


def test_a_reduction_that_it_lacks_is_named(ranks):
    assert "cannot reduce by" in ranks.run(2, cannot_be_reduced)[0]


def on_several_machines(groups) -> list:
    machine, cpu_group._machine = cpu_group._machine, lambda: f"machine {dist.get_rank()}"
    try:
        group = dist.new_group(range(groups[1].size), backend=NAME)
    finally:
        cpu_group._machine = machine
    total = torch.ones(3)
    dist.all_reduce(total, group=group)
    return [type(group._get_backend(torch.device("cpu"))).__name__, total.tolist()]


def test_gloo_joins_ranks_of_several_machines(ranks):
    assert ranks.run(2, on_several_machines) == [["ProcessGroupGloo", [2.0] * 3]] * 2


def limited(groups) -> timedelta:
    group = new_group(groups)
    limit_groups(7.0)
    found, _ = group.timeout, limit_groups(PATIENCE_S)
    return found


def test_its_timeout_is_that_of_the_config(ranks):
    assert ranks.run(2, limited) == [timedelta(seconds=7)] * 2


def intrude(address: str) -> int:
    """How many bytes another user gets who connects as rank 1 and waits."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    got = 255
    try:
        os.setuid(65534)  # nobody
        with socket.socket(socket.AF_UNIX) as stranger, contextlib.suppress(ConnectionError):
            stranger.connect(f"\0{address}")
            got = 0  # it is closed, sooner or later
            stranger.sendall(b"\1\0\0\0")
            got = len(stranger.recv(1))
    finally:
        os._exit(got)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user too")
def test_another_user_cannot_take_part():
    store, timeout, found = dist.HashStore(), timedelta(seconds=PATIENCE_S), {}

    def join(rank: int) -> None:
        found[rank] = CpuGroup(store, rank, 2, timeout)

    first = threading.Thread(target=join, args=(0,))
    first.start()
    assert intrude(store.get("address/0").decode()) == 0
    join(1)
    first.join()
    works = [found[rank].barrier() for rank in (0, 1)]
    assert [work.wait() for work in works] == [True, True]

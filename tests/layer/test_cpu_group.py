"""The process group of CPU ranks: it does what gloo does, leaves the rest to it, and says what went wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
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
    total, told, column = (base + me).t(), (base * me).t(), (base + me)[:, 1]
    dist.all_reduce(total, group=group)
    dist.all_reduce(column, group=group)
    dist.broadcast(told, 1, group=group)
    whole = torch.zeros(3, 2 * SIZE).t()
    dist.all_gather_into_tensor(whole, (base + me), group=group)
    wanted = (SIZE * base + sum(range(SIZE))).t()
    right = [torch.equal(total, wanted), torch.equal(column, wanted[1]), torch.equal(told, base.t())]
    return all(right) and torch.equal(whole, torch.cat([base + peer for peer in range(SIZE)]))


def test_tensors_with_gaps_are_filled(ranks):
    assert ranks.run(SIZE, tensors_with_gaps) == [True] * SIZE


def exchanges_under_way(groups) -> bool:
    """Gloo exchanges large tensors while sums begin and end, in the same group and in another one."""
    first, second, me = new_group(groups), new_group(groups), groups[1].rank
    parts = torch.full((SIZE, LARGE // 4), float(me))
    came = [torch.empty_like(parts) for _ in range(2)]
    works = [dist.all_to_all_single(each, parts, group=first, async_op=True) for each in came]
    total, small = torch.ones(LARGE // 4), torch.ones(3)
    dist.all_reduce(total, group=second)
    dist.all_reduce(small, group=first)
    for work in reversed(works):
        work.wait()
    wanted = torch.arange(float(SIZE))[:, None].expand_as(parts)
    summed = bool((total == SIZE).all()) and bool((small == SIZE).all())
    return summed and all(torch.equal(each, wanted) for each in came)


def test_what_is_called_here_and_what_gloo_does_go_side_by_side(ranks):
    assert ranks.run(SIZE, exchanges_under_way) == [True] * SIZE


def large_exchange(groups) -> bool:
    """Equal parts of more bytes than a socket takes, waited for at once."""
    group, me = new_group(groups), groups[1].rank
    parts, came = torch.full((SIZE, LARGE // 4), float(me)), torch.empty(SIZE, LARGE // 4)
    dist.all_to_all_single(came, parts, group=group)
    return torch.equal(came, torch.arange(float(SIZE))[:, None].expand_as(parts))


def test_rows_that_no_socket_takes_at_once_come_whole(ranks):
    assert ranks.run(SIZE, large_exchange) == [True] * SIZE


def only_gloo_has(groups, backend: str) -> list[torch.Tensor]:
    mine, peers = groups[1].rank, range(groups[1].size)
    group = dist.new_group(peers, backend=backend)
    bits, pair, part = (
        torch.tensor([mine + 4]),
        [torch.ones(2), torch.full((3,), float(mine))],
        torch.full((2,), mine),
    )
    dist.all_reduce(bits, dist.ReduceOp.BXOR, group=group)
    with dist._coalescing_manager(group):
        for each in pair:
            dist.all_reduce(each, group=group)
    functional = functional_collectives.all_gather_tensor(part, 0, group).clone()
    several = functional_collectives.all_gather_into_tensor_coalesced(pair, group)
    scattered = functional_collectives.reduce_scatter_tensor_coalesced(several, "sum", [0, 0], group)
    by_future = dist.all_reduce(part, group=group, async_op=True).get_future().wait()[0]
    from_any = torch.full((1,), mine)
    if mine:
        dist.send(from_any, 0, group=group)
    else:
        assert dist.recv(from_any, group=group) == 1
    averaged = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Linear(3, 1, bias=False), process_group=group
    )
    averaged(torch.full((1, 3), float(mine))).sum().backward()
    together = [each.clone() for each in (*several, *scattered)]
    return [bits, *pair, *together, functional, by_future, from_any, averaged.module.weight.grad]


def test_gloo_does_what_it_alone_has(ranks):
    assert_same(*(ranks.run(2, only_gloo_has, backend) for backend in (NAME, "gloo")))


def gloo_lets_go_of_tensors(groups) -> int:
    """Its threads need the GIL for that, while it is asked for barriers."""
    group = new_group(groups)
    for _ in range(100):
        dist.all_reduce(torch.ones(100_000), group=group)
        dist.barrier(group)
    return groups[1].rank


def test_no_call_of_gloo_holds_the_gil(ranks):
    assert ranks.run(SIZE, gloo_lets_go_of_tensors) == [*range(SIZE)]


def in_inference_mode(groups) -> bool:
    """Gloo writes to such tensors from outside of the mode too."""
    group = new_group(groups)
    with torch.inference_mode():
        total = torch.ones(5)
    dist.all_reduce(total, group=group)
    return bool((total == SIZE).all())


def test_tensors_of_the_inference_mode_are_filled(ranks):
    assert ranks.run(SIZE, in_inference_mode) == [True] * SIZE


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
    return [fails_with(call, *arguments, group=group), fails_with(dist.all_reduce, x, group=group)]


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


def broadcast_now() -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.asyncOp = 0, 0, False
    return options


def one_rank_destroys_the_group(groups) -> list[str]:
    group = new_group(groups)
    if groups[1].rank == 1:
        dist.destroy_process_group(group)
        return [fails_with(group.broadcast, [torch.ones(3)], broadcast_now())]
    return [fails_with(dist.all_reduce, torch.ones(3), group=group)]


def test_a_group_that_was_destroyed_is_of_no_use(ranks):
    (at_first,), (at_second,) = ranks.run(2, one_rank_destroys_the_group)
    assert "connection closed by rank 1" in at_first
    assert at_second == "the process group was destroyed"


def one_rank_is_interrupted(groups) -> list[str]:
    """As by Ctrl-C, while it waits for a rank that is late."""
    group, large = new_group(groups), torch.ones(2, LARGE // 4)
    if groups[1].rank:
        time.sleep(0.5)
        return [fails_with(dist.all_to_all_single, large, large.clone(), group=group)]
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            dist.all_to_all_single(large, large.clone(), group=group)
    finally:
        signal.signal(signal.SIGALRM, before)
    return [fails_with(dist.all_reduce, torch.ones(3), group=group)]


def test_a_collective_that_was_interrupted_is_not_gone_on_with(ranks):
    (at_first,), (at_second,) = ranks.run(2, one_rank_is_interrupted)
    assert at_first == "rank 0 of 2 CPU ranks: interrupted"
    assert "connection closed by rank 0" in at_second


def aborted_while_it_waits(groups, by_signal: bool) -> str:
    group, other = new_group(groups), new_group(groups)
    told = ""
    if not groups[1].rank:
        before = signal.signal(signal.SIGALRM, lambda number, frame: group.abort())
        if by_signal:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
        else:
            threading.Timer(0.2, group.abort).start()
        told = fails_with(dist.all_reduce, torch.ones(3), group=group)
        signal.signal(signal.SIGALRM, before)
    dist.barrier(other)
    return told


@pytest.mark.parametrize("by_signal", [False, True], ids=["thread", "signal"])
def test_whoever_waits_is_woken_by_an_abort(ranks, by_signal):
    assert ranks.run(2, aborted_while_it_waits, by_signal)[0] == "the process group was aborted"


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


def intrude(address: bytes, name: bytes) -> int:
    """How many bytes another user gets who connects by the name of rank 1, and waits."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    got = 255
    try:
        os.setuid(65534)  # nobody
        with socket.socket(socket.AF_UNIX) as stranger, contextlib.suppress(ConnectionError):
            stranger.bind(name)
            stranger.connect(address)
            got = 0  # it is closed, sooner or later
            got = len(stranger.recv(1))
    finally:
        os._exit(got)


def connected(address: bytes, name: bytes) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    link.bind(name)
    link.connect(address)
    return link


@pytest.fixture
def first_of_two(monkeypatch):
    """Of rank 0 of 2, which waits for the other one: (address, the name by which that comes, its links, its thread)"""
    told, links, gloo = [], {}, SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    listens = threading.Event()

    def tell(_, mine: str) -> list[str]:
        told.append(mine)
        listens.set()
        return [mine, "other"]

    monkeypatch.setattr(cpu_group, "_all_gather_text", tell)
    waits = threading.Thread(
        target=lambda: links.update(cpu_group._linked(gloo, timedelta(seconds=PATIENCE_S))), daemon=True
    )
    waits.start()
    assert listens.wait(PATIENCE_S)
    address, name = cpu_group._abstract(told[0]), cpu_group._abstract("other to 0")
    yield address, name, links, waits
    for link in links.values():
        link.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user too")
def test_another_user_cannot_take_part(first_of_two):
    address, name, links, waits = first_of_two
    assert intrude(address, name) == 0
    with connected(address, name) as other:
        waits.join()
        other.sendall(b"here")
        assert links[1].recv(4) == b"here"


def test_who_is_no_rank_is_sent_away(first_of_two):
    address, name, links, waits = first_of_two
    with connected(address, b"\0epbackend stranger") as stranger, connected(address, name) as other:
        waits.join()
        assert stranger.recv(1) == b""
        other.sendall(b"here")
        assert links[1].recv(4) == b"here"


def test_a_rank_that_is_gone_before_it_is_linked_is_named(monkeypatch):
    monkeypatch.setattr(cpu_group, "_all_gather_text", lambda _, mine: ["nowhere", mine])
    gloo = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    told = fails_with(cpu_group._linked, gloo, timedelta(seconds=PATIENCE_S))
    assert told.startswith("rank 1 of 2 CPU ranks: no connection to ranks [0]")

"""A rank that dies or stalls: the others fail in time, with an error that names it, and can exit."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from epbackend.device import cpu_group
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.errors import CollectiveError
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap
from tests.helpers.patience import PATIENCE_S
from tests.helpers.ranks import forking, free_port

SIZE, TIMEOUT_S = 3, 8.0
LEVEL_1 = DispatchSettings(level=1, timeout_s=TIMEOUT_S)
LEVEL_2 = DispatchSettings(level=2, timeout_s=TIMEOUT_S)


def serve(
    rank: int, port: int, backend: str, settings: DispatchSettings, victim: int, blow: int, errors
) -> None:
    """A layer call that works, then one in which `victim` does not take part."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    cpu_group.register()
    dist.init_process_group(backend, rank=rank, world_size=SIZE)
    ranks = RankGroup.of(dist.group.WORLD)
    patient, layer = (
        ExpertParallelMoE(
            torch.randn(2, 8, 6),
            torch.randn(2, 6, 4),
            slot_map=SlotMap.uniform(6, SIZE),
            ranks=ranks,
            settings=each,
            top_k=2,
            layer=7,
        )
        for each in (replace(settings, timeout_s=PATIENCE_S), settings)
    )
    tokens = torch.randn(5, 6), torch.randint(0, 6, (5, 2)), torch.rand(5, 2)
    patient(*tokens)
    if rank == victim:
        os.kill(os.getpid(), blow)
    try:
        layer(*tokens)
    except CollectiveError as error:
        errors.put((rank, str(error)))


@pytest.mark.parametrize(
    ("backend", "settings", "blow", "victim"),
    [
        ("gloo", LEVEL_1, signal.SIGKILL, 2),
        ("gloo", LEVEL_2, signal.SIGSTOP, 2),
        (cpu_group.NAME, LEVEL_1, signal.SIGKILL, 2),
        (cpu_group.NAME, LEVEL_2, signal.SIGSTOP, 2),
        (cpu_group.NAME, LEVEL_1, signal.SIGSTOP, 0),
        (cpu_group.NAME, LEVEL_2, signal.SIGKILL, 0),
        (cpu_group.NAME, replace(LEVEL_1, static=True, dispatch_dtype="fp8"), signal.SIGSTOP, 1),
        (cpu_group.NAME, replace(LEVEL_2, static=True, dispatch_dtype="int8"), signal.SIGKILL, 1),
    ],
    ids=[
        "killed, gloo",
        "stopped, gloo",
        "killed",
        "stopped",
        "keeper of the store stopped",
        "keeper of the store killed",
        "static and stopped",
        "static and killed",
    ],
)
def test_the_others_name_a_lost_rank(backend, settings, blow, victim):
    context = forking()
    errors = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=serve, args=(rank, port, backend, settings, victim, blow, errors), daemon=True)
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    try:
        heard = dict(errors.get(timeout=PATIENCE_S) for _ in range(SIZE - 1))
        for rank in heard:
            processes[rank].join(PATIENCE_S)
            assert processes[rank].exitcode is not None, f"rank {rank} cannot exit after the failure"
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert set(heard) == {0, 1, 2} - {victim}
    for message in heard.values():
        assert f"rank {victim} does not answer" in message
        assert re.match(r"(all_gather|all_to_all|reduce_scatter) of MoE layer 7 failed after", message)
        assert f"timeout_s {TIMEOUT_S:g}" in message

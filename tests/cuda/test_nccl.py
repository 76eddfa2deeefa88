"""What only NCCL can show, on two GPUs: static layers captured over two ranks, and a lost rank."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap
from tests.helpers.dense import dense_moe, tolerance
from tests.helpers.ranks import free_port

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        knobs.runtime.interpret or torch.cuda.device_count() < 2,
        reason="NCCL wants a GPU for each of two ranks",
    ),
]
SIZE, E, D, F, K, T, TIMEOUT_S = 2, 8, 128, 96, 3, 16, 8.0
ALLTOALL = DispatchSettings(level=2, dispatcher="alltoall", max_tokens=T, timeout_s=TIMEOUT_S)
ALLGATHER = replace(ALLTOALL, level=1, dispatcher="allgather")
WAYS = {
    "allgather": ALLGATHER,
    "alltoall": ALLTOALL,
    "chunks": replace(ALLTOALL, overlap_chunks=3, overlap_min_tokens=1),
    "fp8": replace(ALLTOALL, dispatch_dtype="fp8"),
}


class Rank:
    """One rank's layer, its tokens in buffers that stay where they are, and the dense answer."""

    def __init__(self, rank: int, settings: DispatchSettings) -> None:
        slot_map = SlotMap.uniform(E, SIZE)
        draw = torch.Generator().manual_seed(0)
        self.gate_up = (torch.randn(E, 2 * F, D, generator=draw) / D**0.5).bfloat16()
        self.down = (torch.randn(E, D, F, generator=draw) / F**0.5).bfloat16()
        mine = list(slot_map.local_experts(rank))
        self.layer = ExpertParallelMoE(
            self.gate_up[mine].cuda(),
            self.down[mine].cuda(),
            slot_map=slot_map,
            ranks=RankGroup.of(dist.group.WORLD),
            settings=settings,
            top_k=K,
            device="cuda",
            layer=7,
        )
        self.tokens = [
            torch.empty(T, D, device="cuda", dtype=torch.bfloat16),
            None,
            torch.rand(T, K, device="cuda"),
        ]
        self.tokens[1] = torch.empty(T, K, device="cuda", dtype=torch.int64)
        self.load(rank)

    def load(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.tokens[0].copy_(torch.randn(T, D, generator=draw))
        self.tokens[1].copy_(torch.rand(T, E, generator=draw).argsort(1)[:, :K])

    def check(self, out_TD: torch.Tensor, dispatch_dtype: str) -> None:
        expected = dense_moe(*(tensor.cpu() for tensor in self.tokens), self.gate_up, self.down)
        near = tolerance(torch.bfloat16) if dispatch_dtype == "full" else {"rtol": 0.1, "atol": 0.1}
        torch.testing.assert_close(out_TD.cpu().double(), expected, **near)


def start(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=SIZE)


def captured(rank: int, port: int, way: str) -> None:
    start(rank, port)
    mine = Rank(rank, replace(WAYS[way], static=True))
    mine.check(mine.layer(*mine.tokens, phase="decode"), WAYS[way].dispatch_dtype)
    torch.cuda.set_sync_debug_mode("error")
    mine.layer(*mine.tokens, phase="decode")
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = mine.layer(*mine.tokens, phase="decode")
    for seed in range(3):
        mine.load(10 * seed + rank)
        graph.replay()
        mine.layer.context.watch("replay", mine.layer.ranks.group, TIMEOUT_S)
        mine.check(out_TD, WAYS[way].dispatch_dtype)
    exact = Rank(rank, WAYS[way])
    exact.check(exact.layer(*exact.tokens), WAYS[way].dispatch_dtype)


def lost(rank: int, port: int, replayed: bool) -> None:
    start(rank, port)
    mine = Rank(rank, replace(ALLTOALL, static=True))
    mine.layer(*mine.tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.layer(*mine.tokens)
    torch.cuda.synchronize()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if replayed:
        graph.replay()
        mine.layer.context.watch("decode step", mine.layer.ranks.group, TIMEOUT_S)
    else:
        mine.layer(*mine.tokens)
    torch.cuda.synchronize()  # never ends: the watchdog ends the process


def run(target, *args, patience_s: float = 120.0) -> list[int | None]:
    """The exit codes of two ranks, None for one that still runs."""
    spawn, port = multiprocessing.get_context("spawn"), free_port()
    processes = [spawn.Process(target=target, args=(rank, port, *args)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + patience_s
        processes[0].join(deadline - time.monotonic())
        if target is not lost:
            processes[1].join(max(0, deadline - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("way", WAYS)
def test_static_layers_are_captured_and_replayed(way):
    assert run(captured, way) == [0, 0]


@pytest.mark.parametrize("replayed", [False, True])
def test_a_stopped_rank_ends_the_other(replayed, capfd):
    first, _ = run(lost, replayed)
    assert first == -signal.SIGABRT
    said = capfd.readouterr().err
    assert f"{'decode step' if replayed else 'prefill of MoE layer 7'} did not end within timeout_s" in said
    assert "rank 1 does not answer" in said

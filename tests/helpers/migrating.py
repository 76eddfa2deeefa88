"""A layer on several ranks whose experts move between its calls, and what can go wrong with that."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from epbackend.balance import migration, transfer
from epbackend.balance.board import PLACE, Board
from epbackend.balance.migration import Migrator
from epbackend.balance.moves import Migration, route
from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels.fp8 import BLOCK, Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.moe import ExpertParallelMoE
from epbackend.names import PHASES
from epbackend.placement.placement import Layout
from epbackend.replica_split import SlotMap
from tests.helpers.layer_case import place_of
from tests.helpers.patience import PATIENCE_S

EXPERTS, TOKENS, TOP_K = 8, 6, 3
DAMAGED, OTHER_LAYOUT, LATE, BROKEN = "damaged", "other layout", "late", "broken"


@dataclass(frozen=True)
class Moved:
    """What one rank saw."""

    flipped: tuple[int, ...]
    """The migrations that did."""
    steps: tuple[int, ...]
    """The step at which each of them did."""
    held: tuple[tuple[int, ...], ...]
    """The experts of all ranks by its map, at the end."""
    right_bytes: bool
    """Whether every slot holds the very bytes of its expert."""
    worst: float
    """The largest difference of a call's result from that of the first one, as a share of the largest value."""
    tokens_2E: np.ndarray
    """Choices that this rank's experts computed in each of PHASES."""
    routed_2E: np.ndarray
    """Those that its own tokens made."""
    errors: tuple[str, ...]
    layout: str
    """How the bytes of a slot are arranged."""
    same_launches: bool | None = None
    """Whether a call at the end launches the kernels of the recorded one, with the same arguments; not on a GPU."""


def assert_all_counted(seen: Sequence[Moved]) -> None:
    """Every choice is counted once, for its expert wherever that was, and in its phase."""
    counted_2E, routed_2E = sum(each.tokens_2E for each in seen), sum(each.routed_2E for each in seen)
    assert np.array_equal(counted_2E, routed_2E)
    assert routed_2E.any()


def weights(form: str) -> tuple[object, object]:
    """gate_up_E2FD and down_EDF, the same on every rank; quantized ones are large enough for a block."""
    generator = torch.Generator().manual_seed(0)
    hidden, width = {"fp8": (2 * BLOCK, BLOCK), "W8A8 tiles": (64, 32)}.get(form, (16, 12))
    gate_up = torch.randn(EXPERTS, 2 * width, hidden, generator=generator) / hidden**0.5
    down = torch.randn(EXPERTS, hidden, width, generator=generator) / width**0.5
    if form == "fp8":
        return tuple(
            Fp8Blocks(
                each.to(torch.float8_e4m3fn),
                torch.rand(EXPERTS, each.shape[1] // BLOCK, each.shape[2] // BLOCK, generator=generator),
            )
            for each in (gate_up, down)
        )
    if form in ("int8", "W8A8 tiles"):
        return tuple(
            Int8Weights((each * 40).to(torch.int8), torch.rand(EXPERTS, each.shape[1], generator=generator))
            for each in (gate_up, down)
        )
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[form]
    return gate_up.to(dtype), down.to(dtype)


def of_slots(matrices: object, experts: tuple[int, ...]) -> object:
    """The matrices of these experts."""
    picked = list(experts)
    if isinstance(matrices, Fp8Blocks):
        return Fp8Blocks(matrices.values_LNK[picked], matrices.scale_LBB[picked])
    if isinstance(matrices, Int8Weights):
        return Int8Weights(matrices.values_LNK[picked], matrices.scale_LN[picked])
    return matrices[picked]


def on(place: torch.device, matrices: object) -> object:
    """The matrices there."""
    if isinstance(matrices, Fp8Blocks):
        return Fp8Blocks(matrices.values_LNK.to(place), matrices.scale_LBB.to(place))
    if isinstance(matrices, Int8Weights):
        return Int8Weights(matrices.values_LNK.to(place), matrices.scale_LN.to(place))
    return matrices.to(place)


def migrate(
    groups: dict[int, RankGroup],
    board_file: str,
    start: Layout,
    plans: list[Migration],
    form: str = "float32",
    level: int = 2,
    split: str = "even",
    fault: str | None = None,
    faulty: int = 1,
    device: str = "cpu",
    replayed: bool = False,
) -> Moved:
    """On every rank: calls of one layer until each plan has ended, one after the other; rank 0 is the parent, too.

    `fault` befalls rank `faulty` in the first plan. Replayed, one call is recorded as a CUDA graph holds it, and then
    done again and again.
    """
    ranks = groups[1]
    if replayed and ranks.size > 1:  # gloo's collectives are operators of torch, which can be recorded
        ranks = RankGroup.of(dist.new_group(range(ranks.size), backend="gloo"))
    places = np.memmap(board_file, PLACE, mode="r+", shape=ranks.size)
    place = place_of(get_device(device), ranks.rank)
    gate_up, down = (on(place, each) for each in weights(form))
    bias_E2F = torch.arange(EXPERTS).float()[:, None].expand(-1, down_width(down) * 2)

    def build(slot_map: SlotMap) -> ExpertParallelMoE:
        mine = slot_map.local_experts(ranks.rank)
        return ExpertParallelMoE(
            of_slots(gate_up, mine),
            of_slots(down, mine),
            slot_map=slot_map,
            ranks=ranks,
            settings=DispatchSettings(
                level=level, timeout_s=PATIENCE_S, static=replayed, max_tokens=TOKENS if replayed else None
            ),
            movable=replayed,
            top_k=TOP_K,
            split=split,
            device=device,
            gate_up_bias_L2F=bias_E2F[list(mine)].to(place, copy=True) if form == "float32" else None,
        )

    layer = build(SlotMap(start))
    migrator = Migrator(places, ranks.rank, place, staging_bytes=1 << 24)
    migrator.watch(0, layer)
    board = Board(places)
    generator = torch.Generator().manual_seed(ranks.rank)
    hidden = down_hidden(down)
    tokens = torch.randn(TOKENS, hidden, generator=generator).to(
        torch.float32 if form in ("float32", "int8", "fp8") else torch.bfloat16
    )
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    share = torch.rand(TOKENS, TOP_K, generator=generator)
    tokens, ids, share = tokens.to(place), ids.to(place), share.to(place)

    def call(phase: str = "decode") -> Tensor:
        return layer(tokens, ids, share, phase=phase)

    if replayed:
        with layer.load.forgetting():
            call()
            graph, replayed_TD = captured(call, place)
    first, worst, calls, calls_2 = None, 0.0, 0, np.zeros(len(PHASES), int)
    flipped, steps, errors, published, over = [], [], [], 0, False
    deadline = time.monotonic() + PATIENCE_S
    with _fault(fault if ranks.rank == faulty else None):
        while not over:
            assert time.monotonic() < deadline, [dict(zip(PLACE.names, row, strict=True)) for row in places]
            if ranks.rank == 0 and (not published or board.ended(published)):
                if published:
                    errors += board.errors()
                if published < len(plans):
                    board.publish(plans[published])
                    published += 1
                else:
                    over = True
            before = layer.slot_map
            migrator.begin_step()
            calls += 1
            if layer.slot_map is not before:
                flipped.append(int(places[0]["order"]))
                steps.append(calls)
            phase = "decode" if replayed or calls % 3 else "prefill"
            calls_2[PHASES.index(phase)] += 1
            if replayed:
                graph.replay()
            out = (replayed_TD if replayed else call(phase)).float().clone()  # the next replay overwrites it
            first = out if first is None else first
            worst = max(worst, float((out - first).abs().max() / first.abs().max()))
            if ranks.size > 1:
                flag = torch.tensor([over], device=place)
                dist.broadcast(flag, 0, group=ranks.group)
                over = bool(flag)
            time.sleep(0.002)
    migrator.close()
    expected = build(layer.slot_map)
    same = all(
        torch.equal(a, b)
        for slot in range(len(layer.load.local_experts))
        for a, b in zip(layer.slot_memory(slot), expected.slot_memory(slot), strict=True)
    )
    tokens_2E = layer.load.tokens_2E.numpy()
    routed_2E = np.outer(calls_2, ids.cpu().flatten().bincount(minlength=EXPERTS).numpy())
    same_launches = None
    if replayed and place.type == "cpu":
        same_launches = captured(call, place)[0].launches == graph.launches
    return Moved(
        tuple(flipped),
        tuple(steps),
        layer.slot_map.layout.experts_of_rank,
        same,
        worst,
        tokens_2E,
        routed_2E,
        tuple(errors),
        layer.slot_layout,
        same_launches,
    )


def captured(call: Callable[[], Tensor], place: torch.device) -> tuple[Any, Tensor]:
    """A graph of the call, a real one on a GPU, and the result that its replays fill."""
    if place.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as LMDeploy does
            return graph, call()
    from tests.helpers.recorded_graph import RecordedGraph  # which needs Triton

    with RecordedGraph() as graph:
        return graph, call()


def layouts(*held: tuple[tuple[int, ...], ...]) -> list[Layout]:
    return [Layout(each, EXPERTS) for each in held]


# Two replicas, of 0 and 1; then a swap between ranks, a new replica, places that change on a rank, and back.
WAY = layouts(
    ((0, 1, 2, 3, 0), (4, 5, 6, 7, 1)),
    ((0, 1, 7, 3, 0), (4, 5, 6, 2, 1)),
    ((0, 1, 7, 3, 5), (4, 5, 6, 2, 4)),
    ((1, 0, 7, 3, 5), (4, 5, 6, 2, 0)),
    ((0, 1, 2, 3, 0), (4, 5, 6, 7, 1)),
)


def plans(way: list[Layout], **options: object) -> list[Migration]:
    """A migration from each layout to the next."""
    return [
        Migration(number, 0, before, after, route(before, after, [0] * before.ranks), **options)
        for number, (before, after) in enumerate(pairwise(way), start=1)
    ]


def down_width(down: object) -> int:
    return _values(down).shape[2]


def down_hidden(down: object) -> int:
    return _values(down).shape[1]


def _values(matrices: object) -> Tensor:
    return matrices if isinstance(matrices, Tensor) else matrices.values_LNK


def _fault(fault: str | None):
    pack, stage = transfer._pack, migration.stage

    def damage(plan: Migration, move: object, memory: list[Tensor], layout: str, message: Tensor) -> None:
        pack(plan, move, memory, layout, message)
        if plan.number == 1:
            message[0] ^= 1

    def other_layout(
        plan: Migration, move: object, memory: list[Tensor], layout: str, message: Tensor
    ) -> None:
        pack(plan, move, memory, "other" if plan.number == 1 else layout, message)

    def late(plan: Migration, *args: object) -> object:
        if plan.number == 1:
            time.sleep(3 * plan.timeout_s)
        return stage(plan, *args)

    def broken(plan: Migration, *args: object) -> object:
        if plan.number == 1:
            raise OSError("no memory")
        return stage(plan, *args)

    if fault in (DAMAGED, OTHER_LAYOUT):
        return mock.patch.object(transfer, "_pack", {DAMAGED: damage, OTHER_LAYOUT: other_layout}[fault])
    return mock.patch.object(migration, "stage", {LATE: late, BROKEN: broken}.get(fault, stage))

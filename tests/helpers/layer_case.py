"""One layer on several ranks beside the dense formula: what the layer tests run on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from unittest import mock

import torch
from torch import Tensor

from epbackend import moe
from epbackend.device import Device, get_device
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.dispatch.context import GroupContext
from epbackend.dispatch.row_format import RowFormat
from epbackend.kernels import Permuted
from epbackend.kernels.reference import ReferenceKernels
from epbackend.placement.placement import Layout
from epbackend.replica_split import SlotMap
from tests.helpers.dense import dense_moe, swiglu, tolerance

D, F = 12, 10
SPLITS = ("even", "nearest", "level", "level_by_node")
# The expert in each slot: in order, with replicas of experts 0, 3 and 5; in no order; 13 slots, for unequal ranks.
REPLICAS = (0, 1, 2, 3, 4, 5, 6, 7, 0, 3, 0, 5)
SHUFFLED = (5, 5, 2, 0, 7, 1, 5, 4, 6, 3, 5, 2)
UNEVEN = (0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 3, 5, 0)
UNEVEN_CUTS = {1: (13,), 2: (9, 4), 4: (5, 1, 4, 3)}
"""Slots of each rank that has a part of UNEVEN, by the number of ranks."""


def uneven(groups: int) -> tuple[int, ...]:
    """Tokens of each group of ranks, one of them without any."""
    return (7, 0, 11, 3)[:groups]


def relu_product(rows_S2F: Tensor) -> Tensor:
    """A gate that is not SwiGLU, with its halves interleaved."""
    return rows_S2F[..., ::2].relu() * rows_S2F[..., 1::2]


@dataclass(frozen=True)
class Case:
    """A layer, its settings, and the tokens that it is given."""

    size: int
    tokens: tuple[int, ...]
    """Tokens of each group of ranks that hold the same ones."""
    settings: DispatchSettings = field(default_factory=DispatchSettings)
    token_size: int = 1
    slots: tuple[int, ...] = tuple(range(8))
    """The expert in each slot, rank by rank."""
    slots_R: tuple[int, ...] = ()
    """How many slots each rank has; empty: equally many."""
    split: str = "even"
    node_size: int = 0
    top_k: int = 3
    dtype: torch.dtype = torch.float32
    bias: bool = False
    activation: Callable[[Tensor], Tensor] | None = None
    padding: int = 0
    """How many rows at the end of each batch are no tokens."""
    repeats: bool = False
    """Whether a token may choose an expert twice."""
    seed: int = 0
    hidden: int = D
    device: str = "cpu"

    @property
    def slot_map(self) -> SlotMap:
        if not self.slots_R:
            return SlotMap.of(self.slots, self.size)
        slots = iter(self.slots)
        held = tuple(tuple(islice(slots, count)) for count in self.slots_R)
        return SlotMap(Layout(held, max(self.slots) + 1), self.node_size)


@dataclass(frozen=True)
class Seen:
    """What one rank saw."""

    dispatcher: str
    passes: int
    rounds: int
    batches: int
    most_rows: int
    tokens_E: list[int]
    chosen_E: list[int]
    """How often this rank's own tokens chose each expert."""


def layer_equals_dense(groups: dict[int, RankGroup], case: Case, context: GroupContext | None = None) -> Seen:
    """Run the layer, fail unless this rank's tokens get what the dense formula gives them."""
    ranks = groups[case.token_size]
    device = get_device(case.device)
    place = place_of(device, ranks.rank)
    slot_map = case.slot_map
    experts = slot_map.experts
    draw = torch.Generator().manual_seed(case.seed)
    gate_up = (torch.randn(experts, 2 * F, case.hidden, generator=draw) / case.hidden**0.5).to(case.dtype)
    down = (torch.randn(experts, case.hidden, F, generator=draw) / 3).to(case.dtype)
    biases = [
        torch.randn(experts, n, generator=draw).to(case.dtype) if case.bias else None
        for n in (2 * F, case.hidden)
    ]
    draw.manual_seed(case.seed + 1 + ranks.rank // case.token_size)
    tokens = case.tokens[ranks.rank // case.token_size]
    hidden = torch.randn(tokens, case.hidden, generator=draw).to(case.dtype)
    ids = _choices(tokens, experts, case, draw)
    weights = torch.rand(tokens, case.top_k, generator=draw)

    mine = list(slot_map.local_experts(ranks.rank))
    spy = _Spy(device.kernels)
    with mock.patch.object(moe, "get_device", return_value=_Watched(device, spy)):
        layer = moe.ExpertParallelMoE(
            gate_up[mine].to(place),
            down[mine].to(place),
            slot_map=slot_map,
            ranks=ranks,
            settings=case.settings,
            split=case.split,
            top_k=case.top_k,
            gate_up_bias_L2F=None if biases[0] is None else biases[0][mine].to(place),
            down_bias_LD=None if biases[1] is None else biases[1][mine].to(place),
            activation=case.activation,
            context=context,
        )
    padding = (torch.arange(tokens) >= tokens - case.padding)[:, None].to(place) if case.padding else None
    out = layer(hidden.to(place), ids.to(place), weights.to(place), padding_T1=padding).cpu()
    tokens -= min(tokens, case.padding)
    out, hidden, ids, weights = out[:tokens], hidden[:tokens], ids[:tokens], weights[:tokens]
    if layer.dispatchers["prefill"].name != "replicated":
        form, reference = RowFormat.of(hidden, ids, case.settings.dispatch_dtype), ReferenceKernels()
        hidden, *_ = form.decode(reference, form.encode(reference, hidden, ids, weights))
    expected = dense_moe(hidden, ids, weights, gate_up, down, *biases, activation=case.activation or swiglu)
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.double(), expected, **tolerance(case.dtype))
    load = layer.load
    layer.close()
    chosen = torch.bincount(ids.flatten(), minlength=experts).tolist()
    return Seen(
        layer.dispatchers["prefill"].name,
        load.most_passes,
        load.most_rounds,
        spy.batches,
        spy.most_rows,
        load.tokens_E.tolist(),
        chosen,
    )


def assert_each_choice_computed_once(seen: list[Seen], token_size: int = 1) -> None:
    """`seen` is what the ranks of a layer saw, of which `token_size` in a row hold the same tokens."""
    computed_E = torch.tensor([rank.tokens_E for rank in seen]).sum(0)
    chosen_E = torch.tensor([rank.chosen_E for rank in seen[::token_size]]).sum(0)
    assert torch.equal(computed_E, chosen_E)


def place_of(device: Device, rank: int) -> torch.device:
    """Where a rank's tensors lie. Ranks share the GPUs that there are: gloo joins them, as NCCL would not on one."""
    gpus = torch.cuda.device_count() if device.name == "cuda" else 0
    place = device.torch_device(rank % gpus if gpus else rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)  # where Triton launches
    return place


def _choices(tokens: int, experts: int, case: Case, draw: torch.Generator) -> Tensor:
    if case.repeats:
        return torch.randint(0, experts, (tokens, case.top_k), generator=draw)
    return torch.rand(tokens, experts, generator=draw).argsort(1)[:, : case.top_k]


class _Watched:
    """A device whose kernels are watched."""

    def __init__(self, device: Device, spy: _Spy) -> None:
        self._device, self._spy = device, spy

    def __getattr__(self, name: str):
        return getattr(self._device, name)

    def kernel_set(self, name: str) -> _Spy:
        return self._spy


class _Spy:
    """Kernels that return garbage rows past the valid ones, as a device may, and watch what the experts are given."""

    def __init__(self, kernels) -> None:
        self._kernels = kernels
        self.batches, self.most_rows = 0, 0

    def __getattr__(self, name: str):
        return getattr(self._kernels, name)

    def permute(self, hidden_TD, slot_ids_TK, slots, window=None, expected=None) -> Permuted:
        permuted = self._kernels.permute(hidden_TD, slot_ids_TK, slots, window)
        self.most_rows = max(self.most_rows, len(permuted.rows_SD))
        garbage = permuted.rows_SD.new_full((2, hidden_TD.shape[1]), torch.nan)
        return Permuted(
            torch.cat([permuted.rows_SD, garbage]),
            permuted.counts_L,
            torch.cat([permuted.choice_of_row_S, permuted.choice_of_row_S.new_full((2,), -1)]),
            permuted.row_of_choice_S,
        )

    def expert_mlp(self, rows_SD, counts_L, weights, expected, total_L) -> Tensor:
        self.batches += 1
        out_SD = self._kernels.expert_mlp(rows_SD, counts_L, weights, expected, total_L)
        out_SD[int(counts_L.sum()) :] = torch.nan
        return out_SD

"""The data path of one MoE layer: split -> dispatch -> experts -> combine.

Usable on its own, without any serving engine. In a script started by `torchrun --nproc-per-node 2 script.py`:

    dist.init_process_group("gloo")
    ranks = RankGroup.of(dist.group.WORLD)
    slot_map = SlotMap.uniform(experts=16, ranks=ranks.size)
    mine = slot_map.local_experts(ranks.rank)
    with ExpertParallelMoE(
        (gate_up_E2FD[expert] for expert in mine),
        (down_EDF[expert] for expert in mine),
        slot_map=slot_map, ranks=ranks, settings=DispatchSettings(level=2), top_k=4,
    ) as layer:
        out_TD = layer(hidden_TD, topk_ids_TK, topk_weights_TK)

`examples/layer_torchrun.py` is the whole script, and docs/layer.md explains it. The letters of shapes are those of
`epbackend.dispatch`, and F, the width of an expert.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, LayerSpec, RankGroup
from epbackend.dispatch.choose import Decision, choose
from epbackend.dispatch.context import GroupContext
from epbackend.errors import ConfigError, EPError
from epbackend.kernels import ExpertWeights, Rows, renormalized
from epbackend.kernels.pair_counter import PairCounter
from epbackend.kernels.weight_formats import FLOATS, Matrices, sides
from epbackend.names import PHASES
from epbackend.replica_split import SlotMap, TokenSplit

Value = TypeVar("Value")


class ExpertWork:
    """What calls of experts were given and took, on a device whose results the host waits for: the CPU.

    Of each call there are four numbers: 1, its rows, the experts that had any, and its seconds. Kept are the sums of
    all products of two of them, from which the costs of a call, a row and an expert can be told apart, and a slow rank
    from one with much to do.
    """

    def __init__(self, products_44: np.ndarray) -> None:
        """Adds to these sums, float64, which others may read meanwhile."""
        self._products_44 = products_44

    def add(self, counts_L: Tensor, seconds: float) -> None:
        """A call with so many rows of each slot. One without rows computes nothing, and says nothing of the speed."""
        counts = counts_L.numpy()
        if not counts.any():
            return
        call_4 = np.array([1.0, counts.sum(), np.count_nonzero(counts), seconds])
        self._products_44 += call_4[:, None] * call_4


class LayerStats:
    """What one layer has done on this rank so far."""

    @torch.inference_mode(False)  # whose tensors could not be changed outside of it
    def __init__(self, local_experts: tuple[int, ...], experts: int) -> None:
        self.local_experts = local_experts
        """The expert in each of the rank's slots."""
        self.calls = 0
        """Calls from Python: a replayed CUDA graph makes none."""
        self.most_passes = self.most_rounds = 0
        """Of any call."""
        self.rows_2L = torch.zeros(2, len(local_experts), dtype=torch.int64, device="cpu")
        """Rows of each slot in each of PHASES, on the experts' device from the first call on; replays of a CUDA graph
        count here, in the phase that was captured."""
        self._rows_of = _rows_by_phase(self.rows_2L)
        self._placed = False  # until the first call
        self._experts_L = torch.tensor(local_experts, dtype=torch.int64, device="cpu")
        self.credit_2E = torch.zeros(2, experts, dtype=torch.int64, device="cpu")
        """Added to each expert's tokens: what slots counted for an expert that they no longer hold."""
        self.pairs: PairCounter | None = None
        """Where it is set, which experts tokens choose together is counted too."""
        self.work: ExpertWork | None = None
        """Where it is set, what the experts' products take is counted too."""

    def count_in(self, rows_2L: Tensor) -> None:
        """Go on counting there, on the experts' device, so that one allocation can hold the rows of all layers.

        To be called before a CUDA graph is captured, which would go on counting in the old place.
        """
        rows_2L.copy_(self.rows_2L)
        self.rows_2L, self._rows_of, self._placed = rows_2L, _rows_by_phase(rows_2L), True

    def rows_on(self, device: torch.device, phase: str) -> Tensor:
        """That phase's part of `rows_2L`, [L], for kernels that add a batch's counts in place, as graphs need it."""
        if not self._placed:
            with torch.inference_mode(False):
                self.count_in(self.rows_2L.to(device))
        return self._rows_of[phase]

    def add_call(self, passes: int, rounds: int) -> None:
        self.calls += 1
        self.most_passes = max(self.most_passes, passes)
        self.most_rounds = max(self.most_rounds, rounds)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """What is counted inside is forgotten; the counters stay where they are. Slots keep their experts meanwhile."""
        before = self.calls, self.most_passes, self.most_rounds
        rows_2L = self.rows_2L.clone()
        with nullcontext() if self.pairs is None else self.pairs.forgetting():
            yield
        self.calls, self.most_passes, self.most_rounds = before
        self.rows_2L.copy_(rows_2L)

    def replace_experts(self, local_experts: tuple[int, ...]) -> None:
        """From now on these experts are in the slots. What was counted, for which it waits, stays with the old ones."""
        counted_2E = self.tokens_2E
        self.local_experts, self._experts_L = (
            local_experts,
            torch.tensor(local_experts, dtype=torch.int64, device="cpu"),
        )
        self.credit_2E = self.credit_2E + counted_2E - self.tokens_2E

    @property
    def tokens_2E(self) -> Tensor:
        """Tokens that this rank's experts computed in each of PHASES (int64, on the CPU). It waits for them."""
        return self.credit_2E.index_add(1, self._experts_L, self.rows_2L.cpu())

    @property
    def tokens_E(self) -> Tensor:
        """The same in both phases together."""
        return self.tokens_2E.sum(0)


def _rows_by_phase(rows_2L: Tensor) -> dict[str, Tensor]:
    return {phase: rows_2L[at] for at, phase in enumerate(PHASES)}


@dataclass(frozen=True)
class Relocation:
    """Another map of a layer's slots, and the splits by it."""

    slot_map: SlotMap
    splits: dict[str, TokenSplit]


class ExpertParallelMoE:
    """The routed experts of one layer, spread over ranks: out = sum over k of weight * expert(hidden)."""

    def __init__(
        self,
        gate_up_L2FD: Matrices,
        down_LDF: Matrices,
        *,
        slot_map: SlotMap,
        ranks: RankGroup,
        settings: DispatchSettings | Mapping[str, DispatchSettings],
        top_k: int,
        split: str | Mapping[str, str] = "even",
        device: str = "cpu",
        kernels: str = "auto",
        gate_up_bias_L2F: Tensor | None = None,
        down_bias_LD: Tensor | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        renormalize: bool = False,
        check_ids: bool = True,
        movable: bool = False,
        layer: int = 0,
        context: GroupContext | None = None,
    ) -> None:
        """Pack this rank's experts and choose how rows travel. All ranks make their layers in the same order.

        Args:
            gate_up_L2FD: the first matrix of each expert of `slot_map.local_experts(ranks.rank)`, [2F, D] each, the
                gate above: one tensor, `Int8Weights` or `Fp8Blocks` of all, or any iterable of matrices
                (`epbackend.kernels.weight_formats`). The CPU copies single matrices one by one and keeps no
                reference to them, so that from a generator that reads the checkpoint they never exist twice; whole
                forms are used where they are, unless the CPU reorders them for oneDNN, or Ascend W8A8 into tiles.
            down_LDF: the second matrix of each, [D, F], in the same form.
            slot_map: which expert each slot of every rank holds.
            ranks: this rank's place among those that share the experts.
            settings: how rows travel: one for both phases, or one for each ("prefill", "decode").
            top_k: K, the experts of a token.
            split: which replica of its expert a token takes: "even", "nearest", "level" or "level_by_node"
                (`epbackend.replica_split`); one for both phases, or one for each.
            device: "cpu", "cuda", "ascend", another package's device, or "auto".
            kernels: one of the device's `kernel_sets`, or "auto".
            gate_up_bias_L2F: added to the first product.
            down_bias_LD: added to the second product.
            activation: maps the rows of the first product, [S, 2F], to [S, F]; None is SwiGLU.
            renormalize: whether each token's weights are divided by their sum first.
            check_ids: whether ids that no expert has are found and raised.
            movable: whether captured graphs shall follow `relocate`. The split's tables then have room for the most
                replicas that any expert can get in these slots.
            layer: the layer's number, for messages.
            context: shared by the layers of one engine, and closed by whoever made it. None: the layer makes one of its
                own, with a communicator and buffers of its own where the dispatcher has them, and `close` closes it.

        Raises:
            ConfigError: weights, map, ranks and settings do not fit each other, or the device does not take this form
                of weights.
            UnavailableError: the device cannot be used here.
        """
        if slot_map.ranks != ranks.size:
            raise ConfigError(f"slot_map is for {slot_map.ranks} ranks, but {ranks.size} share the experts")
        self.slot_map, self.ranks, self.top_k, self.layer = slot_map, ranks, top_k, layer
        self.context, self._owns_context, self._closed = context or GroupContext(), context is None, False
        """What it shares on its process groups; `context.watch` watches replays of its CUDA graphs."""
        of_gate_up, of_down = sides(gate_up_L2FD), sides(down_LDF)
        _check_fit(of_gate_up, of_down, gated=activation is None)
        slots = len(slot_map.local_experts(ranks.rank))
        _check_bias("gate_up_bias_L2F", gate_up_bias_L2F, slots, of_gate_up)
        _check_bias("down_bias_LD", down_bias_LD, slots, of_down)
        found = get_device(device)
        self._kernels = found.kernel_set(kernels)
        settings_of, split_of = _by_phase("settings", settings), _by_phase("split", split)
        specs = {
            phase: LayerSpec(
                ranks,
                found,
                self._kernels,
                settings_of[phase],
                slot_map.slots_per_rank,
                top_k,
                hidden_size=of_down[0] if of_down else None,
                renormalize=renormalize,
                layer=layer,
                context=self.context,
            )
            for phase in PHASES
        }
        chosen = {phase: choose(spec) for phase, spec in specs.items()}
        self._specs, self._split_of = specs, split_of
        self._check_ids, self._movable = check_ids, movable
        self._splits = self._splits_by(slot_map, check_ids)
        self._slots = slots
        self._dispatchers = {phase: dispatcher for phase, (dispatcher, _) in chosen.items()}
        self.dispatchers: dict[str, Decision] = {phase: choice for phase, (_, choice) in chosen.items()}
        """How rows travel in each phase, and why."""
        self._weights = ExpertWeights(
            gate_up=self._kernels.prepack(_exactly(slots, gate_up_L2FD, "gate_up_L2FD")),
            down=self._kernels.prepack(_exactly(slots, down_LDF, "down_LDF")),
            gate_up_bias_L2F=gate_up_bias_L2F,
            down_bias_LD=down_bias_LD,
            activation=activation,
        )
        dtype = self._weights.dtype
        self._takes = FLOATS if dtype is None else (dtype,)
        """The dtypes that tokens may have."""
        self._kernels.prepare(self._weights)
        self.load = LayerStats(slot_map.local_experts(ranks.rank), slot_map.experts)
        """What this rank has done so far."""

    def __call__(
        self,
        hidden_TD: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        phase: str = "prefill",
        padding_T1: Tensor | None = None,
    ) -> Tensor:
        """out_TD, in the dtype of `hidden_TD`, for this rank's T tokens (T = 0 too).

        `hidden_TD` has the dtype of the experts; where these are quantized, bfloat16, float16 or float32.
        `topk_ids_TK` are logical experts. All ranks make the call together and name the same phase. Rows for which
        `padding_T1` (bool) is true are no tokens: no expert computes or counts them, and what is returned for them
        means nothing. `mc2` wants them after all tokens. They are found on the device, so that a replayed CUDA graph
        leaves out others than the captured one.

        Raises:
            CollectiveError: a rank does not take part in time.
            ConfigError: shapes or dtypes do not fit each other, `top_k` or the experts, or an id is of no expert. Such
                an id is found on a CPU at once, on other devices in a later call that is not replayed from a graph,
                since none waits for the device.
            EPError: the layer is closed, or its context is and the call needs something of it.
        """
        if torch.compiler.is_compiling():
            # Nothing here can be traced. Disabled only now, for that imports torch's compiler, which takes seconds.
            return torch.compiler.disable(self._call)(
                hidden_TD, topk_ids_TK, topk_weights_TK, phase, padding_T1
            )
        return self._call(hidden_TD, topk_ids_TK, topk_weights_TK, phase, padding_T1)

    @torch.no_grad()
    def _call(
        self,
        hidden_TD: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        phase: str,
        padding_T1: Tensor | None,
    ) -> Tensor:
        if self._closed:
            raise EPError(f"MoE layer {self.layer} is closed: make another one")
        if phase not in PHASES:
            raise ConfigError(f"phase {phase!r} is unknown; it is one of {', '.join(PHASES)}")
        _check_call(hidden_TD, topk_ids_TK, topk_weights_TK, padding_T1, self.top_k, self._takes)
        if self.load.pairs is not None:
            self.load.pairs.add(topk_ids_TK, padding_T1)
        dispatcher = self._dispatchers[phase]
        if dispatcher.spec.renormalize and not dispatcher.renormalizes:
            topk_weights_TK = renormalized(topk_weights_TK)
        slot_ids_TK = self._splits[phase](topk_ids_TK)
        if padding_T1 is not None:
            slot_ids_TK.masked_fill_(padding_T1, -1)
        exchange = dispatcher.begin(hidden_TD, slot_ids_TK, topk_weights_TK)
        total_L = self.load.rows_on(hidden_TD.device, phase)
        for batch in exchange.dispatch():
            counts_L = batch.counts_L
            if len(counts_L) > self._slots:  # the ids after these are of slots that only other ranks have
                counts_L = counts_L[: self._slots]
            exchange.combine(self.experts(batch.rows_SD, counts_L, batch.expected, total_L))
        out_TD = exchange.finish()
        if out_TD.is_cuda:
            timeout_s = dispatcher.spec.settings.timeout_s
            self.context.watch(f"{phase} of MoE layer {self.layer}", self.ranks.group, timeout_s)
        self.load.add_call(exchange.passes, exchange.rounds)
        return out_TD

    def experts(
        self, rows_SD: Rows, counts_L: Tensor, expected: int | None = None, total_L: Tensor | None = None
    ) -> Tensor:
        """This rank's experts alone, without any exchange: rows_SD of the same rows, which are sorted by slot.

        `counts_L` are the rows of each slot, int64, and are added to `total_L`; `expected`: see `Batch`.
        """
        if self.load.work is None:
            return self._kernels.expert_mlp(rows_SD, counts_L, self._weights, expected, total_L)
        began = time.perf_counter()
        out_SD = self._kernels.expert_mlp(rows_SD, counts_L, self._weights, expected, total_L)
        self.load.work.add(counts_L, time.perf_counter() - began)
        return out_SD

    def slot_memory(self, slot: int) -> list[Tensor]:
        """All bytes of the expert in one of this rank's slots, in a fixed order: uint8 views of what calls read."""
        weights = self._weights
        memory = [
            *self._kernels.slot_memory(weights.gate_up, slot),
            *self._kernels.slot_memory(weights.down, slot),
        ]
        biases = [bias for bias in (weights.gate_up_bias_L2F, weights.down_bias_LD) if bias is not None]
        return [*memory, *(bias[slot].view(-1).view(torch.uint8) for bias in biases)]

    @property
    def slot_layout(self) -> str:
        """How `slot_memory` is arranged; only ranks that have the same may exchange it."""
        both = self._weights.gate_up, self._weights.down
        return ", ".join(self._kernels.slot_layout(each) for each in both)

    def prepare(self, slot_map: SlotMap, device: torch.device) -> Relocation:
        """The tables for other experts in the same slots, ready for `relocate`; from any thread, on no other's time.

        Raises:
            ConfigError: the ranks would have other slots than now; or `movable`, and only one map knows their speeds.
        """
        if not np.array_equal(slot_map.layout.slots_R, self.slot_map.layout.slots_R):
            raise ConfigError(f"slot_map: MoE layer {self.layer} keeps the slots of every rank")
        if self._movable and bool(slot_map.rank_speed) != bool(self.slot_map.rank_speed):
            raise ConfigError(
                f"slot_map: captured graphs of MoE layer {self.layer} heed the speeds of ranks, or do not: give "
                "rank_speed in both maps, or in none"
            )
        splits = self._splits_by(slot_map, self._check_ids and not self._movable)  # its own checks go on
        for split in splits.values():
            split.prepare(device)
        return Relocation(slot_map, splits)

    @torch.inference_mode()
    def relocate(self, relocation: Relocation) -> None:
        """Route by another map from the next call on, on all ranks between the same two calls.

        The caller has brought the experts' bytes into `slot_memory`. Captured graphs follow if the layer is `movable`:
        what changes is filled in place, in the current stream. Else they keep the old map.
        """
        self.slot_map = relocation.slot_map
        for phase, split in self._splits.items():
            split.become(relocation.splits[phase])
        self.load.replace_experts(self.slot_map.local_experts(self.ranks.rank))

    def _splits_by(self, slot_map: SlotMap, check_ids: bool) -> dict[str, TokenSplit]:
        return {
            phase: TokenSplit(self._split_of[phase], slot_map, spec, check_ids, self._movable)
            for phase, spec in self._specs.items()
        }

    def close(self) -> None:
        """End what the layer holds on its process groups, unless its `context` is shared; calls raise from now on.

        Call it before the groups are destroyed, and replay no graph of the layer afterwards. It makes no collective.
        """
        self._closed = True
        if self._owns_context:
            self.context.close()

    def __enter__(self) -> ExpertParallelMoE:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _by_phase(name: str, value: Value | Mapping[str, Value]) -> Mapping[str, Value]:
    """One value for each phase, from one for all or one for each."""
    found: Mapping[str, Value] = value if isinstance(value, Mapping) else dict.fromkeys(PHASES, value)
    if set(found) != set(PHASES):
        raise ConfigError(f"{name}: needed for {' and '.join(PHASES)}, not for {sorted(found)}")
    return found


def _check_fit(gate_up: tuple[int, int] | None, down: tuple[int, int] | None, *, gated: bool) -> None:
    """Check that one matrix takes what the other gives, by their sides where these are known.

    Raises:
        ConfigError: it does not.
    """
    if gate_up is None or down is None:
        return
    if gate_up[1] != down[0] or (gated and gate_up[0] != 2 * down[1]):
        raise ConfigError(
            f"gate_up_L2FD holds matrices of {gate_up[0]} x {gate_up[1]} and down_LDF of {down[0]} x {down[1]}; they "
            "must be 2F x D and D x F"
        )


def _check_call(
    hidden_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    padding_T1: Tensor | None,
    top_k: int,
    takes: tuple[torch.dtype, ...],
) -> None:
    """Check the shapes and dtypes of a call's tensors, before the other ranks wait for this one.

    Raises:
        ConfigError: they do not fit each other or `top_k`, the experts take tokens of other dtypes, or the ids are no
            integers.
    """
    chosen = (len(hidden_TD), top_k)
    if hidden_TD.ndim != 2 or topk_ids_TK.shape != chosen or topk_weights_TK.shape != chosen:
        raise ConfigError(
            f"hidden_TD, topk_ids_TK and topk_weights_TK have the shapes {list(hidden_TD.shape)}, "
            f"{list(topk_ids_TK.shape)} and {list(topk_weights_TK.shape)}; they must be T x D, and twice T x {top_k}"
        )
    if topk_ids_TK.dtype not in (torch.int32, torch.int64):
        raise ConfigError(f"topk_ids_TK are {topk_ids_TK.dtype}; ids of experts are int32 or int64")
    if hidden_TD.dtype not in takes:
        raise ConfigError(
            f"hidden_TD is {hidden_TD.dtype}, but the experts take {' or '.join(map(str, takes))}; convert it, or load "
            "the experts in its dtype"
        )
    if padding_T1 is not None and (padding_T1.dtype != torch.bool or padding_T1.shape != (len(hidden_TD), 1)):
        raise ConfigError(
            f"padding_T1 is {padding_T1.dtype} of the shape {list(padding_T1.shape)}, and must be torch.bool of "
            f"{[len(hidden_TD), 1]}"
        )


def _check_bias(name: str, bias_LN: Tensor | None, slots: int, matrix: tuple[int, int] | None) -> None:
    """Check that a bias has a row for each slot, and a value for each output.

    Raises:
        ConfigError: it does not.
    """
    if bias_LN is None:
        return
    expected = (slots, matrix[0] if matrix else bias_LN.shape[-1])
    if bias_LN.shape != expected:
        raise ConfigError(f"{name} has the shape {list(bias_LN.shape)}, and must have {list(expected)}")


def _exactly(slots: int, matrices: Matrices, name: str) -> Matrices:
    """The matrices as they came.

    Raises:
        ConfigError: there are not as many as slots; for an iterator at its end.
    """
    if isinstance(matrices, Sized):
        _check_count(slots, len(matrices), name)
        return matrices
    return _counted(slots, matrices, name)


def _counted(slots: int, matrices: Iterable[Any], name: str) -> Iterator[Any]:
    count = 0
    for matrix in matrices:
        count += 1
        yield matrix
    _check_count(slots, count, name)


def _check_count(slots: int, count: int, name: str) -> None:
    if count != slots:
        raise ConfigError(f"{name} has {count} experts, but this rank has {slots} slots")

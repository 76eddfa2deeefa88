"""The data path of one MoE layer: assign -> dispatch -> experts -> combine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from epbackend.device import get_device
from epbackend.dispatch.base import Problem
from epbackend.dispatch.choose import Choice, choose
from epbackend.dispatch.ranks import RankGroup
from epbackend.dispatch.settings import DispatchSettings
from epbackend.kernels import ExpertWeights
from epbackend.slots import SlotMap

PHASES = ("prefill", "decode")


@dataclass
class Counter:
    """Adds up one number a call."""

    total: int = 0
    max: int = 0

    def add(self, value: int) -> None:
        self.total += value
        self.max = max(self.max, value)


class Load:
    """What one layer did on this rank so far."""

    def __init__(self, experts_L: tuple[int, ...], experts: int, device: torch.device) -> None:
        self.calls = 0
        self.passes, self.rounds = Counter(), Counter()
        self._rows_L = torch.zeros(len(experts_L), dtype=torch.int64, device=device)
        self._experts_L, self._experts = experts_L, experts

    def add_rows(self, counts_L: Tensor) -> None:
        self._rows_L += counts_L

    def add_call(self, passes: int, rounds: int) -> None:
        self.calls += 1
        self.passes.add(passes)
        self.rounds.add(rounds)

    @property
    def tokens_E(self) -> Tensor:
        """Tokens that this rank's experts computed, per logical expert [E] int64, on the CPU."""
        tokens_E = torch.zeros(self._experts, dtype=torch.int64)
        return tokens_E.index_add_(0, torch.tensor(self._experts_L), self._rows_L.cpu())


class ExpertParallelMoE:
    """The experts of one layer, spread over ranks."""

    def __init__(self, gate_up_L2FD: Tensor, down_LDF: Tensor, *, slot_map: SlotMap, ranks: RankGroup,
                 settings: DispatchSettings | Mapping[str, DispatchSettings], device: str = "cpu", top_k: int,
                 gate_up_bias_L2F: Tensor | None = None, down_bias_LD: Tensor | None = None,
                 activation: Callable[[Tensor], Tensor] | None = None, layer: int = 0) -> None:
        self._kernels = get_device(device).kernels
        self.slot_map, self.ranks, self.layer = slot_map, ranks, layer
        by_phase = settings if isinstance(settings, Mapping) else dict.fromkeys(PHASES, settings)
        chosen = {
            phase: choose(Problem(ranks, self._kernels, by_phase[phase], slot_map.slots_per_rank, top_k, layer))
            for phase in PHASES
        }
        self._dispatchers = {phase: dispatcher for phase, (dispatcher, _) in chosen.items()}
        self.dispatchers: dict[str, Choice] = {phase: choice for phase, (_, choice) in chosen.items()}
        self._weights = ExpertWeights(
            self._kernels.pack(gate_up_L2FD), self._kernels.pack(down_LDF), gate_up_bias_L2F, down_bias_LD, activation
        )
        self.load = Load(slot_map.local_experts(ranks.rank), slot_map.experts, gate_up_L2FD.device)

    def __call__(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor,
                 phase: str = "prefill") -> Tensor:
        slot_ids_TK = self.slot_map.assign(topk_ids_TK)
        exchange = self._dispatchers[phase].begin(hidden_TD, slot_ids_TK, topk_weights_TK)
        for batch in exchange.dispatch():
            self.load.add_rows(batch.counts_L)
            exchange.combine(self._kernels.expert_mlp(batch.rows_SD, batch.counts_L, self._weights), batch)
        self.load.add_call(exchange.passes, exchange.rounds)
        return exchange.finish()

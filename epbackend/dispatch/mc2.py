"""`ep_level` 2 on Ascend by CANN's fused operators: rows go straight to their experts, and weighted sums back.

No size travels through the host, so a step never waits for the device. For that, every rank sends the same number of
tokens: the most that a call of this phase may have, padded with masked ones. Communicator and buffer are sized for
them when the first call shows the hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from epbackend.device import devices
from epbackend.device.hccl import own_communicator
from epbackend.dispatch.base import Batch, Dispatcher, Exchange, Problem
from epbackend.dispatch.mc2_limits import LIMITS, broken, broken_width, buffer_mb
from epbackend.errors import ConfigError
from epbackend.kernels.int8 import Int8Rows
from epbackend.kernels.npu import ops

DTYPES = (torch.bfloat16, torch.float16)
FEWEST_ON_A2 = 16


class Mc2(Dispatcher):
    name = "mc2"
    level = 2
    summary = "CANN's fused dispatch and combine, without a size through the host"

    @classmethod
    def missing(cls) -> str | None:
        reason = devices()["ascend"].unavailable()
        return super().missing() or (reason and f"it needs device ascend: {reason}")

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        chip = _chip(problem)
        if chip is None:
            return "it needs an Ascend NPU (device ascend)"
        if reason := super().unsupported(problem):
            return reason
        if problem.settings.transport == "fp8":
            return "it sends rows in full or in int8, and transport is fp8"
        ranks, slots = problem.ranks.size, problem.slots
        if chip == "A2" and ranks < FEWEST_ON_A2 and problem.settings.dispatcher == "auto":
            return (
                f"on A2 it is for {FEWEST_ON_A2} ranks and more, and there are {ranks}: older CANN takes no fewer, "
                "so name it (dispatcher: mc2) where yours does"
            )
        if reason := broken(chip, ranks, slots, problem.top_k, problem.most_tokens):
            return reason
        return None if problem.hidden_size is None else broken_width(chip, problem.hidden_size)

    @classmethod
    def reason(cls, problem: Problem) -> str:
        chip, form = str(_chip(problem)), ", in int8" if problem.settings.transport == "int8" else ""
        most, tokens = LIMITS[chip].tokens, problem.most_tokens
        return f"{cls.summary}: {chip} takes {most} tokens a rank, and {tokens} are sent{form}"

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        """Raises ConfigError for a model, or a number of tokens, outside of the operators' limits.

        A token must choose each slot once at most, which the router's top-k sees to.
        """
        tokens = self.problem.most_tokens
        assert tokens is not None  # else `unsupported` gave a reason
        _check(hidden_TD, tokens, _chip(self.problem))
        group = _group(self.problem, hidden_TD.shape[1], tokens)
        return _Mc2Exchange(
            group, hidden_TD, slot_ids_TK, weights_TK, self.problem.settings.transport == "int8"
        )


class _Mc2Exchange(Exchange):
    def __init__(
        self, group: ops.FusedGroup, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor, int8: bool
    ) -> None:
        self._group, self._int8 = group, int8
        self._tokens, self._dtype = len(hidden_TD), hidden_TD.dtype
        self._hidden_TD = _padded(hidden_TD, group.tokens)
        self._weights_TK = _padded(weights_TK.float(), group.tokens)
        ids_TK = _padded(slot_ids_TK.int(), group.tokens, -1)
        self._active_T = ids_TK[:, 0] >= 0
        # Masked tokens, too, must name experts, and different ones.
        valid_K = torch.arange(ids_TK.shape[1], dtype=torch.int32, device=ids_TK.device)
        self._ids_TK = torch.where(self._active_T[:, None], ids_TK, valid_K)

    def dispatch(self) -> Iterator[Batch]:
        sent = ops.moe_dispatch(self._hidden_TD, self._ids_TK, self._active_T, self._group, self._int8)
        rows_SD = sent.rows_SD if sent.scale_S is None else Int8Rows(sent.rows_SD, sent.scale_S, self._dtype)
        self._sent = sent
        yield Batch(rows_SD, sent.counts_L, sent.assist_info, step=0)

    def combine(self, rows_SD: Tensor, batch: Batch) -> None:
        self._out_TD = ops.moe_combine(
            rows_SD, self._ids_TK, self._weights_TK, self._active_T, self._sent, self._group
        )

    def finish(self) -> Tensor:
        return self._out_TD[: self._tokens]


def _chip(problem: Problem) -> str | None:
    """The NPU's generation; None where the kernels are another device's."""
    return getattr(problem.kernels, "chip", None)


def _group(problem: Problem, hidden: int, tokens: int) -> ops.FusedGroup:
    ranks, chip = problem.ranks, _chip(problem)
    assert chip is not None  # else `unsupported` gave a reason
    assert ranks.group is not None
    buffer = buffer_mb(chip, ranks.size, problem.slots, problem.top_k, tokens, hidden)
    communicator = own_communicator(ranks.group, buffer)
    algorithm = LIMITS[chip].algorithm
    return ops.FusedGroup(communicator, ranks.rank, ranks.size, problem.slots, tokens, algorithm)


def _check(hidden_TD: Tensor, tokens: int, chip: str | None) -> None:
    """Raise ConfigError for what only a call can show to be outside of the limits."""
    if len(hidden_TD) > tokens:
        raise ConfigError(
            f"dispatcher mc2: this rank has {len(hidden_TD)} tokens, and engine.max_batch_size allows {tokens}; "
            "raise it, or set dispatcher: alltoall"
        )
    if reason := broken_width(str(chip), hidden_TD.shape[1]):
        raise ConfigError(f"dispatcher mc2: {reason}; set dispatcher: alltoall")
    if hidden_TD.dtype not in DTYPES:
        raise ConfigError(
            f"dispatcher mc2: it takes bfloat16 and float16, not {str(hidden_TD.dtype).removeprefix('torch.')}; "
            "set engine.dtype: bfloat16, or dispatcher: alltoall"
        )


def _padded(tensor_TX: Tensor, tokens: int, value: int = 0) -> Tensor:
    return pad(tensor_TX, (0, 0, 0, tokens - len(tensor_TX)), value=value)

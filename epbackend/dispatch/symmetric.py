"""`ep_level` 2 inside one NVLink domain: rows are stored straight into the memory of their experts' ranks.

No collective library and no size through the host: the kernels of `kernels/triton/peer` count, store and answer, and
the ranks meet on their GPUs. A static call (`DispatchSettings.static`) can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epbackend.device import devices
from epbackend.dispatch.base import Dispatcher, Exchange, Problem
from epbackend.dispatch.symmetric_reach import not_built, unreachable
from epbackend.errors import ConfigError, UnavailableError

OPEN_TOKENS = 2048
"""Tokens that a rank sends at a time where nothing bounds a call; longer calls go in several parts."""

OPEN_SCALE = 2.0
"""Receive buffer for those, in shares of what an even spread would fill: what does not fit goes in further rounds."""


class Symmetric(Dispatcher):
    name = "symmetric"
    level = 2
    summary = "store rows straight into the peers' memory, sorted by expert"

    @classmethod
    def missing(cls) -> str | None:
        reason = devices()["cuda"].unavailable()
        return super().missing() or (reason and f"it needs device cuda: {reason}") or not_built()

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        """All ranks come to the same answer; the first time they ask each other where they are."""
        if reason := super().unsupported(problem):
            return reason
        if not getattr(problem.kernels, "on_cuda", False):
            return "it needs device cuda with its Triton kernels"
        if problem.settings.static and problem.settings.max_tokens is None:
            return "nothing bounds this phase's tokens (decode is bounded by engine.max_batch_size)"
        if problem.settings.transport == "fp8" and not _float8():
            return "transport is fp8, which GPUs older than Ada (8.9) do not have: write int8 or full"
        if reason := not_built():
            return reason
        if cls.name not in problem.settings.dispatcher:
            return "it has not run on a GPU yet, so it is taken only where it is named"
        return unreachable(problem.ranks, problem.settings.timeout_s)

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        """Raises ConfigError for more tokens than the phase may have.

        The first call of a shape makes the buffers, and raises UnavailableError on all ranks if one of them cannot.
        """
        from epbackend.dispatch.symmetric_exchange import SymmetricExchange  # imports Triton
        from epbackend.dispatch.symmetric_peers import connect

        room = Room.of(self.problem)
        if room.bounded and len(hidden_TD) > room.tokens:
            raise ConfigError(
                f"MoE layer {self.problem.layer}: {len(hidden_TD)} tokens in a call that may have {room.tokens}; "
                "raise engine.max_batch_size"
            )
        try:
            peers = connect(self.problem.ranks.group, hidden_TD.device, self.problem.settings.timeout_s)
            return SymmetricExchange(self.problem, peers, room, hidden_TD, slot_ids_TK, weights_TK)
        except UnavailableError as error:
            raise UnavailableError(f"MoE layer {self.problem.layer}: {error}") from error


def _float8() -> bool:
    """Whether the GPU converts float8; Triton's interpreter does."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)


@dataclass(frozen=True)
class Room:
    """What one exchange can hold; the same on all ranks."""

    tokens: int
    """The most tokens that a rank sends."""
    rows: int
    """Rows of a rank's receive buffer."""
    bounded: bool
    """Whether no call has more tokens."""

    @classmethod
    def of(cls, problem: Problem) -> Room:
        """`buffer_scale_factors` size the receive buffer as MindIE does: int(tokens * top_k * scale) rows.

        Without them there is room for the worst case where a call's tokens are bounded.

        >>> Room.of(Problem(RankGroup(None, 0, 8), None, DispatchSettings(2, max_tokens=128), slots=32, top_k=8))
        Room(tokens=128, rows=8192, bounded=True)
        """
        settings, ranks = problem.settings, problem.ranks
        bounded = problem.most_tokens is not None
        tokens = problem.most_tokens or OPEN_TOKENS
        usual = ranks.size if bounded else min(ranks.size, OPEN_SCALE)
        scale = next((scale for length, scale in settings.buffer_scale_factors if length <= tokens), usual)
        return cls(tokens, max(1, int(tokens * problem.top_k * scale)), bounded)

    def rounds_of(self, rows: int) -> int:
        """How many rounds `rows` rows for one rank need.

        One even without a row: its meetings keep a rank that is ahead from writing the next call's counts over those
        that another has yet to read.
        """
        return max(1, -(-rows // self.rows))

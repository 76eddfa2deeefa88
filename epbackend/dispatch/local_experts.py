"""From tokens to the weighted sums of this rank's experts: the local half that most dispatchers share.

The cutoff (MindIE's `topk_scaling_factor`) bounds the expanded rows that exist at one time. MindIE loses the rows past
the bound; here they go through a further pass, so the result is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from epbackend.dispatch.base import Batch, DispatchSettings, Exchange, LayerSpec
from epbackend.errors import ConfigError
from epbackend.kernels import renormalized


def kept_choices(top_k: int, factor: float) -> int:
    """MindIE's `int(top_k * factor)`: the choices of each token that fit within the bound, at least 1.

    Raises:
        ConfigError: with so small a factor none fits.
    """
    kept = int(top_k * factor)
    if kept < 1:
        smallest = ceil(Fraction(1000, top_k)) / 1000
        raise ConfigError(
            f"topk_scaling_factor {factor} leaves no room for any of a token's {top_k} experts "
            f"(int({top_k} * {factor}) is 0); the smallest factor that works is {smallest}"
        )
    return kept


def row_bound(tokens: int, top_k: int, settings: DispatchSettings) -> int:
    """The most expanded rows that one pass over `tokens` gathered tokens may hold (MindIE's formula)."""
    worst_case = tokens * top_k
    if settings.topk_scaling_factor is None:
        return worst_case
    kept = kept_choices(top_k, settings.topk_scaling_factor)
    return min(worst_case, max(tokens, settings.cutoff_min_tokens) * kept)


def expected_rows(tokens: int, top_k: int, ranks: int, *, chosen: bool) -> int:
    """How many of the tokens' choices fall on one of `ranks` ranks if all ranks are equally likely.

    With `chosen` these are tokens that chose the rank at least once, which a token does with probability
    1 - (1 - 1/R)^K.

    >>> expected_rows(128, 8, 4, chosen=False), expected_rows(128, 8, 4, chosen=True)
    (256, 285)
    """
    rows = tokens * top_k / ranks
    return ceil(rows / (1 - (1 - 1 / ranks) ** top_k)) if chosen else ceil(rows)


class LocalRows:
    """N tokens in, rows for this rank's slots out, weighted sums of the results in `sums_ND`."""

    def __init__(
        self,
        spec: LayerSpec,
        hidden_ND: Tensor,
        slot_ids_NK: Tensor,
        weights_NK: Tensor,
        bound: int | None = None,
        *,
        chosen: bool = False,
        dtype: torch.dtype = torch.float32,
        renormalize: bool = False,
    ) -> None:
        """Takes N tokens in.

        Args:
            spec: the layer.
            hidden_ND: their hidden states.
            slot_ids_NK: the slots of their choices, of all ranks; -1: none.
            weights_NK: the weights of their choices.
            bound: the most rows of a pass; None for all rows in one.
            chosen: whether every token is here because it chose this rank.
            dtype: of the sums where one batch has all rows; those of several batches are float32.
            renormalize: whether each token's weights are divided by their sum; the sum of one batch does it on its way.
        """
        self._kernels, self._slots = spec.kernels, spec.slots
        self._hidden_ND = hidden_ND
        first = spec.ranks.rank * spec.slots
        self._slot_ids_NK = slot_ids_NK - first if first else slot_ids_NK  # a launch less
        self._bound = bound if bound is not None and bound < slot_ids_NK.numel() else None
        early = renormalize and self._bound is not None
        self._weights_NK = renormalized(weights_NK) if early else weights_NK
        self._renormalize = renormalize and not early
        self._static = spec.settings.static
        self._expected = expected_rows(len(slot_ids_NK), slot_ids_NK.shape[1], spec.ranks.size, chosen=chosen)
        self._dtype = dtype
        self.sums_ND = hidden_ND.new_empty(0)
        """[N, D], once the first batch is added."""

    def passes(self) -> int:
        """How many passes this rank's rows need; counts them only where a bound asks for it.

        A static call takes as many as the worst routing needs; the last ones may find no row.
        """
        if self._bound is None:
            return 1
        if self._static:
            return -(-self._slot_ids_NK.numel() // self._bound)
        rows = int(self._kernels.count(self._slot_ids_NK, self._slots).sum())
        return max(1, -(-rows // self._bound))

    def batch(self, number: int) -> Batch:
        """The rows of one pass; `add` takes their results before the next is asked for."""
        window = None if self._bound is None else (number * self._bound, (number + 1) * self._bound)
        permuted = self._kernels.permute(
            self._hidden_ND, self._slot_ids_NK, self._slots, window, self._expected
        )
        self._permuted = permuted
        expected = min(self._expected, len(permuted.rows_SD))
        return Batch(permuted.rows_SD, permuted.counts_L, expected)

    def add(self, rows_SD: Tensor, *, only: bool = True) -> None:
        """Add the experts' results for the last batch, weighted, to their tokens' sums. `only`: there is no other."""
        if only:
            self.sums_ND = self._kernels.weighted_sums(
                rows_SD, self._permuted, self._weights_NK, self._dtype, self._renormalize
            )
            return
        if not len(self.sums_ND):
            self.sums_ND = self._hidden_ND.new_zeros(self._hidden_ND.shape, dtype=torch.float32)
        self._kernels.unpermute(rows_SD, self._permuted.choice_of_row_S, self._weights_NK, self.sums_ND)


class PassesExchange(Exchange):
    """An exchange whose rows are all here once it has begun: passes over them. A subclass adds `finish`."""

    def __init__(self, local: LocalRows) -> None:
        self._local = local

    def dispatch(self) -> Iterator[Batch]:
        self.passes = self._local.passes()
        for number in range(self.passes):
            yield self._local.batch(number)

    def combine(self, rows_SD: Tensor) -> None:
        self._local.add(rows_SD, only=self.passes == 1)

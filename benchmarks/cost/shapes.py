"""Shapes of models, and how many ranks or nodes a token reaches."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb


@dataclass(frozen=True)
class Model:
    """The routed experts of one layer."""

    name: str
    D: int
    """Hidden size."""
    E: int
    """Experts."""
    K: int
    """Experts of a token."""
    groups: int = 1
    groups_of_token: int = 1
    """The router first takes so many of the groups, and then all K experts from these."""

    def packed_row(self, bytes_each: int) -> int:
        """Bytes of a packed token (epbackend/dispatch/row_format.py): ids, weights, hidden state.

        8-bit values bring a float32 scale for each 128 of them.
        """
        return 8 * self.K + self.row(bytes_each)

    def row(self, bytes_each: int) -> int:
        """Bytes of a hidden state in bfloat16 (2), or in 8 bits with its scales (1)."""
        return 2 * self.D if bytes_each == 2 else self.D + 4 * -(-self.D // 128)

    def reached(self, units: int, limited: bool = True) -> float:
        """Of `units` equal parts of the experts (ranks, nodes), how many a token's K experts are in, on average.

        Routing is taken as even, so the experts in one unit are hypergeometrically distributed:
        units * (1 - C(E - u, K) / C(E, K)) with u = E / units. Under a group limit the groups are drawn first and the
        experts from theirs. `limited=False` leaves the limit out.
        """
        groups, chosen = (self.groups, self.groups_of_token) if limited else (1, 1)
        group_size, unit_size = self.E // groups, self.E // units
        pool = chosen * group_size
        of_unit = max(1, unit_size // group_size)  # groups that a unit holds; it may hold a part of one
        missed = sum(
            comb(of_unit, drawn)
            * comb(groups - of_unit, chosen - drawn)
            / comb(groups, chosen)
            * comb(pool - drawn * min(unit_size, group_size), self.K)
            / comb(pool, self.K)
            for drawn in range(min(of_unit, chosen) + 1)
        )
        return units * (1 - missed)


DEEPSEEK_V3 = Model("DeepSeek-V3", D=7168, E=256, K=8, groups=8, groups_of_token=4)
QWEN3_30B = Model("Qwen3-30B", D=2048, E=128, K=8)

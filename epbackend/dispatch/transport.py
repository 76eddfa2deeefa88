"""In what form a row's hidden values travel to the experts: as they are, or in 8 bits with scales.

Rows in 8 bits get their own dtype back on arrival; experts of the same form quantise them again, to the same values but
for rounding. Partial sums always travel back in full: rounding errors of a row average out over the D products that it
enters, those of a sum go straight into the model's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from epbackend.kernels import fp8


@dataclass(frozen=True)
class Transport:
    """One form."""

    values: torch.dtype | None
    """What travels; None: the rows' own dtype."""
    scales: Callable[[int], int]
    """G: how many scales (float32) a row of so many values has."""

    def dtype(self, hidden: torch.dtype) -> torch.dtype:
        """Of the values that travel, for rows of `hidden`."""
        return self.values or hidden


TRANSPORTS = {
    "full": Transport(None, lambda width: 0),
    "int8": Transport(torch.int8, lambda width: 1),
    "fp8": Transport(fp8.FP8, lambda width: -(-width // fp8.BLOCK)),
}
"""Off by at most: int8 1/254 of the row's largest value; fp8 1/16 of a value, or 1/458752 of the largest of its 128."""

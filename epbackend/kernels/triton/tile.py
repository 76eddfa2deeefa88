"""A tile: how a grouped matmul is cut into pieces of work, and what each piece may use of the chip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tile:
    """Sizes of one tile, and how the compiler is to lay it out."""

    rows: int
    columns: int
    """Of the output; a gated product multiplies twice as many columns of the weights."""
    depth: int
    warps: int
    stages: int
    """Blocks that are under way from memory while one is multiplied."""
    band: int = 8
    """Row tiles that share the L2 cache."""
    programs: int = 1
    """Programs for each multiprocessor."""
    tma: bool = True
    """Load by the bulk copy engine where chip and alignment allow."""
    specialize: bool = False
    """Let some warps load and others multiply (Hopper with Triton 3.6)."""
    flatten: bool = False
    """Make one loop of tiles and depth, so that the next tile loads while this one ends."""

    def launch(self) -> dict[str, Any]:
        """The arguments that every grouped matmul takes."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_K": self.depth,
            "BAND": self.band,
            "SPECIALIZE": self.specialize,
            "FLATTEN": self.flatten,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

"""One product to be tuned: its data, and the launch of it with any tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epbackend.kernels.forms import Experts
from epbackend.kernels.fp8 import BLOCK, FP8, Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.triton.chip import Chip, chip_of
from epbackend.kernels.triton.grouped import grouped_matmul
from epbackend.kernels.triton.quantise import quantise_fp8, quantise_int8
from epbackend.kernels.triton.resources import compiling_for, resources
from epbackend.kernels.triton.schedule import row_tiles
from epbackend.kernels.triton.tile import Tile
from epbackend.kernels.triton.tiles import Product

BYTES = {"half": 2, "fp8": 1, "int8": 1}
"""Of a value, by form."""

LARGEST_ERROR = {"half": 0.01, "int8": 0.03, "fp8": 0.06}
"""Of a right answer, as a share of the reference's norm: what rounding rows to so few bits leaves."""

LARGEST_MEAN = 1024
"""Rows a slot that stand for all larger numbers."""

MOST_SPILLED = 128
"""Bytes a thread: a few registers that wait outside of the loop cost less than a smaller tile would."""


@dataclass(frozen=True)
class ExpertShape:
    """The routed experts that one GPU holds: gate_up [slots, 2F, D] and down [slots, D, F]."""

    name: str
    slots: int
    D: int
    F: int

    def weights(self, form: str, device: torch.device) -> tuple[Experts, Experts]:
        """(gate_up, down), random, packed in `form`."""
        gate_up = random_experts(form, self.slots, 2 * self.F, self.D, device)
        return gate_up, random_experts(form, self.slots, self.D, self.F, device)


def random_experts(form: str, slots: int, columns: int, depth: int, device: torch.device) -> Experts:
    """[slots, columns, depth], so that products of rows of ones' size have about that size too."""
    if form == "half":
        return torch.randn(slots, columns, depth, device=device, dtype=torch.bfloat16) / depth**0.5
    if form == "int8":
        values = torch.randint(-127, 128, (slots, columns, depth), device=device, dtype=torch.int8)
        return Int8Weights(values, torch.full((slots, columns), 1 / (73 * depth**0.5), device=device))
    values = torch.empty(slots, columns, depth, dtype=FP8, device=device)
    for slot in range(slots):
        values[slot] = torch.randn(columns, depth, device=device).to(FP8)
    scales = torch.rand(slots, columns // BLOCK, depth // BLOCK, device=device) / depth**0.5
    return Fp8Blocks(values, scales)


@dataclass(frozen=True)
class Data:
    """Rows as the kernel takes them, quantised or not; the experts; counts_L."""

    rows: Any
    experts: Any
    counts_L: Tensor


@dataclass(frozen=True)
class Job:
    """One product at one mean number of rows a slot."""

    experts: ExpertShape
    form: str
    gated: bool
    up_to: float | None
    """The entry of the table's list that the result is for."""

    def __str__(self) -> str:
        kind = "gated" if self.gated else "plain"
        return f"{self.experts.name} {self.form} {kind} {self.rows / self.experts.slots:g} rows a slot"

    @property
    def rows(self) -> int:
        return int(self.experts.slots * (self.up_to or LARGEST_MEAN))

    @property
    def product(self) -> Product:
        experts = self.experts
        height, depth = (2 * experts.F, experts.D) if self.gated else (experts.D, experts.F)
        return Product(self.form, self.gated, self.rows, experts.slots, height, depth)

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.product.height * self.product.depth

    @property
    def bytes(self) -> float:
        """The weights, and the rows that come in."""
        product = self.product
        return BYTES[self.form] * product.depth * (product.slots * product.height + product.rows)

    def draw(self, device: torch.device) -> Data:
        """Random data; on "meta" the shapes alone."""
        product = self.product
        rows_SK = torch.randn(product.rows, product.depth, dtype=torch.bfloat16, device=device)
        slot_S = torch.randint(product.slots, (product.rows,), device=device)
        counts_L = torch.zeros(product.slots, dtype=torch.int64, device=device)
        counts_L.scatter_add_(0, slot_S, torch.ones_like(slot_S))
        schedule = row_tiles(counts_L, product.rows, 128)
        quantise = {"half": lambda rows, _: rows, "fp8": quantise_fp8, "int8": quantise_int8}[self.form]
        experts = self.experts.weights(self.form, device)[0 if self.gated else 1]
        return Data(quantise(rows_SK, schedule), experts, counts_L)

    def run(self, data: Data, tile: Tile, chip: Chip | None = None) -> Tensor:
        """The schedule and the product."""
        chip = chip or chip_of(data.counts_L.device)
        schedule = row_tiles(data.counts_L, self.rows, tile.rows)
        out = grouped_matmul(
            data.rows, data.experts, schedule, tile, chip, gated=self.gated, dtype=torch.bfloat16
        )
        return out if isinstance(out, Tensor) else out.values_SK


def compile_job(job: Job, chip: Chip, tile: Tile) -> bool:
    """Compile one candidate into Triton's cache; whether it can be used."""
    try:
        with compiling_for(chip) as compiled:
            job.run(job.draw(torch.device("meta")), tile, chip)
        found = resources(compiled[-1])
    except Exception:  # whatever the compiler does not like about a candidate, there are others
        return False
    fits = found.shared_bytes <= chip.shared_bytes and found.spilled <= MOST_SPILLED
    return fits and found.programs_per_sm(chip) >= tile.programs

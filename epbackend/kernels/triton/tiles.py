"""Which tile a product gets: the tuned one for this chip and shape if there is one, else its chip family's.

`tiles.json` has both. "families" are chosen by hand from the static model and checked to compile without spills;
"tuned" holds what was measured on a chip with a version of Triton, and serves that chip and version alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from epbackend.kernels.quantised import Fp8Blocks, Int8Rows
from epbackend.kernels.triton.chip import Chip
from epbackend.kernels.triton.tile import Tile

TABLE = Path(__file__).with_name("tiles.json")
FAMILIES = {8: "ampere", 9: "hopper", 10: "blackwell", 11: "blackwell", 12: "ampere"}
"""By the major compute capability. Desktop Blackwell (12) has no more shared memory than desktop Ampere had."""


@dataclass(frozen=True)
class Product:
    """What is known of a grouped matmul before it runs; how the rows spread over the slots is not."""

    form: str
    """half (bfloat16 and float16), float32, fp8 or int8."""
    gated: bool
    rows: int
    slots: int
    height: int
    """Outputs of a slot's matrix: N, or 2F where the product is gated."""
    depth: int

    @classmethod
    def of(cls, rows: int, experts: Tensor | Fp8Blocks | Int8Rows, gated: bool) -> Product:
        return cls(form_of(experts), gated, rows, *weight_of(experts).shape)


def weight_of(experts: Tensor | Fp8Blocks | Int8Rows) -> Tensor:
    """The matrices [L, N, K], without their scales."""
    return experts if isinstance(experts, Tensor) else experts.weight_LNK


def form_of(experts: Tensor | Fp8Blocks | Int8Rows) -> str:
    """The section of the table that serves these matrices."""
    if isinstance(experts, Tensor):
        return "float32" if experts.dtype == torch.float32 else "half"
    return "fp8" if isinstance(experts, Fp8Blocks) else "int8"


@cache
def choose_tile(chip: Chip, product: Product) -> Tile:
    """The first tile of the product's list that takes its mean number of rows a slot."""
    entries = _tuned(chip, product) or family_tiles(chip, product.form, product.gated)
    rows_per_slot = product.rows / product.slots
    fields = next(e for e in entries if e["up_to"] is None or rows_per_slot <= e["up_to"])
    return Tile(**{name: value for name, value in fields.items() if name != "up_to"})


def family_tiles(chip: Chip, form: str, gated: bool) -> list[dict[str, Any]]:
    """What serves a chip that nobody has tuned for."""
    return table()["families"][FAMILIES[chip.capability[0]]][form]["gated" if gated else "plain"]


@cache
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def write_table(new: dict[str, Any]) -> None:
    """Replace tiles.json, one tile a line."""
    text = json.dumps(new, indent=1)
    tiles = re.compile(r"\{\s*(\"up_to\"[^}]*?)\s*\}")
    TABLE.write_text(tiles.sub(lambda found: "{" + re.sub(r"\s+", " ", found[1]) + "}", text) + "\n")


def _tuned(chip: Chip, product: Product) -> list[dict[str, Any]] | None:
    wanted = {
        "chip": chip.name,
        "triton": ".".join(triton.__version__.split(".")[:2]),
        "form": product.form,
        "gated": product.gated,
        "height": product.height,
        "depth": product.depth,
    }
    return next((e["tiles"] for e in table()["tuned"] if wanted.items() <= e.items()), None)

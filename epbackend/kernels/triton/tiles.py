"""What a launch must know of the chip: how many programs it runs at once, and what it can do.

A tile: how a grouped matmul is cut into pieces of work, and what each piece may use of the chip.

Which tile a product gets: the tuned one for this chip and shape if there is one, else its chip family's.

`tiles.json` has both. "families" are chosen by hand from the static model and checked to compile without spills;
"tuned" holds what was measured on a chip with a version of Triton, and serves that chip and version alone. What
`epbackend tune` measures goes into a table of the user's own, which comes first.

From counts to tiles: which rows each tile of a grouped matmul multiplies, worked out on the device.

Example: counts_L = [3, 0, 130] with blocks of 128 rows gives tiles_M3 = [[0, 0, 3], [2, 3, 133], [2, 131, 133]] and
total_1 = [3]: slot, first row, and the row at which the slot's rows end.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

from epbackend.errors import ConfigError
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.weight_formats import Experts

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether Triton's interpreter runs the kernels, on a CPU: set by TRITON_INTERPRET=1 before the first import."""


@dataclass(frozen=True)
class Chip:
    """A GPU, as the tile tables and the static model see it."""

    name: str
    capability: tuple[int, int]
    sms: int
    """Streaming multiprocessors."""
    shared_bytes: int
    """Shared memory that one program may have."""

    @property
    def tma(self) -> bool:
        """Whether it has the bulk tensor copy engine (Hopper and later)."""
        return self.capability >= (9, 0)

    @property
    def fp8(self) -> bool:
        """Whether it multiplies float8_e4m3fn."""
        return self.capability >= (8, 9)


A100 = Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912)
L40S = Chip("NVIDIA L40S", (8, 9), 142, 101_376)
H100 = Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 232_448)
H200 = Chip("NVIDIA H200", (9, 0), 132, 232_448)
B200 = Chip("NVIDIA B200", (10, 0), 148, 232_448)
INTERPRETER = Chip("Triton's interpreter", (9, 0), 3, 232_448)
"""Three programs, so that each of them has several tiles to take, and one ends before the others."""


@cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind a torch device; the CPU stands for Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    limits = driver.active.utils.get_device_properties(device.index)
    return Chip(found.name, (found.major, found.minor), found.multi_processor_count, limits["max_shared_mem"])


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


PACKAGED = Path(__file__).with_name("tiles.json")
OWN_TABLE = "EPBACKEND_TILES"
"""The environment variable that names the user's own table."""
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
    def of(cls, rows: int, experts: Experts, gated: bool) -> Product:
        return cls(form_of(experts), gated, rows, *weight_of(experts).shape)


def weight_of(experts: Experts) -> Tensor:
    """The matrices [L, N, K], without their scales."""
    return experts if isinstance(experts, Tensor) else experts.values_LNK


def form_of(experts: Experts) -> str:
    """The section of the table that serves these matrices."""
    if isinstance(experts, Tensor):
        return "float32" if experts.dtype == torch.float32 else "half"
    return "fp8" if isinstance(experts, Fp8Blocks) else "int8"


@lru_cache(maxsize=4096)
def choose_tile(chip: Chip, product: Product) -> Tile:
    """The family's first tile that takes the product's mean number of rows a slot, or what tuning put in its place."""
    rows_per_slot = product.rows / product.slots
    family = family_tiles(chip, product.form, product.gated)
    entry = next(each for each in family if each["up_to"] is None or rows_per_slot <= each["up_to"])
    wanted = tuned_for(chip, product, entry["up_to"])
    tuned = next((each["tile"] for each in table()["tuned"] if wanted.items() <= each.items()), entry)
    return Tile(**{name: value for name, value in tuned.items() if name != "up_to"})


def family_tiles(chip: Chip, form: str, gated: bool) -> list[dict[str, Any]]:
    """What serves a chip that nobody has tuned for, from few rows a slot (`up_to`) to many."""
    return table()["families"][FAMILIES[chip.capability[0]]][form]["gated" if gated else "plain"]


def tuned_for(chip: Chip, product: Product, up_to: float | None) -> dict[str, Any]:
    """What a measured tile holds for: chip, version of Triton, product, and the family's tile that it replaces."""
    return {
        "chip": chip.name,
        "triton": ".".join(triton.__version__.split(".")[:2]),
        "form": product.form,
        "gated": product.gated,
        "height": product.height,
        "depth": product.depth,
        "up_to": up_to,
    }


@cache
def table() -> dict[str, Any]:
    """The packaged table, with the tuned tiles of the user's own before its own.

    Raises ConfigError for a table of the user's that cannot be read.
    """
    packaged = json.loads(PACKAGED.read_text())
    return {**packaged, "tuned": [*_tuned_in(own_table()), *packaged["tuned"]]}


def own_table() -> Path:
    """Where `epbackend tune` writes, file or no file: $EPBACKEND_TILES, or else in the user's cache."""
    if named := os.environ.get(OWN_TABLE):
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "epbackend" / "tiles.json"


def _tuned_in(path: Path) -> list[dict[str, Any]]:
    """The tuned tiles of a table; none where there is no file."""
    if not path.exists():
        return []
    try:
        tuned = json.loads(path.read_text())["tuned"]
        for each in tuned:
            Tile(**each["tile"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no table of tiles ({type(error).__name__}: {error}); remove it and run epbackend tune again, "
            f"or name another one in {OWN_TABLE}"
        ) from None
    return tuned


def record(path: Path, tuned: dict[str, Any], tile: Tile, date: str) -> None:
    """Write a measured tile into a table, in the place of an earlier one for the same; other processes may read it."""
    stored = json.loads(path.read_text()) if path.exists() else {"tuned": []}
    others = [each for each in stored["tuned"] if not tuned.items() <= each.items()]
    stored["tuned"] = [*others, {**tuned, "date": date, "tile": asdict(tile)}]
    innermost = re.compile(r"\{[^{}]*\}")  # on one line each
    text = innermost.sub(lambda found: json.dumps(json.loads(found[0])), json.dumps(stored, indent=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(text + "\n")
    beside.replace(path)


@dataclass(frozen=True)
class Schedule:
    """The row tiles of one grouped matmul. Both products of an expert share one."""

    tiles_M3: Tensor
    """int32: slot, first row, end of the slot's rows. M is the most that the counts may ask for."""
    total_1: Tensor
    """int32: how many of the M are used."""
    block_rows: int


def row_tiles(counts_L: Tensor, rows: int, block_rows: int) -> Schedule:
    """The tiles of `block_rows` rows that cover the groups of `counts_L`, whose sum is at most `rows` (< 2^31)."""
    slots = len(counts_L)
    most = rows // block_rows + min(slots, rows)
    tiles_M3 = torch.empty(most, 3, dtype=torch.int32, device=counts_L.device)
    total_1 = torch.empty(1, dtype=torch.int32, device=counts_L.device)
    slots_pow2 = triton.next_power_of_2(slots)
    _row_tiles[(slots,)](
        counts_L=counts_L,
        tiles_M3=tiles_M3,
        total_1=total_1,
        slots=slots,
        SLOTS=slots_pow2,
        BLOCK_ROWS=block_rows,
        num_warps=1,
    )
    return Schedule(tiles_M3, total_1, block_rows)


@triton.jit
def _row_tiles(
    counts_L,
    tiles_M3,
    total_1,
    slots,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LANES: tl.constexpr = 32,
):
    """One program a slot writes the tiles of that slot, LANES at a time."""
    slot = tl.program_id(0)
    each = tl.arange(0, SLOTS)
    rows_L = tl.load(counts_L + each, mask=each < slots, other=0).to(tl.int32)
    tiles_L = (rows_L + BLOCK_ROWS - 1) // BLOCK_ROWS
    first_tile = tl.sum(tl.where(each < slot, tiles_L, 0))
    first_row = tl.sum(tl.where(each < slot, rows_L, 0))
    tiles = tl.sum(tl.where(each == slot, tiles_L, 0))
    end = first_row + tl.sum(tl.where(each == slot, rows_L, 0))
    for start in range(0, tiles, LANES):
        tile = start + tl.arange(0, LANES)
        entry = tiles_M3 + 3 * (first_tile + tile)
        tl.store(entry, slot, mask=tile < tiles)
        tl.store(entry + 1, first_row + tile * BLOCK_ROWS, mask=tile < tiles)
        tl.store(entry + 2, end, mask=tile < tiles)
    if slot == slots - 1:
        tl.store(total_1, first_tile + tiles)


@triton.jit
def covered_rows(tiles_M3, total_1):
    """How many rows the counts add up to: where the last tile's slot ends."""
    tiles = tl.load(total_1)
    return tl.load(tiles_M3 + 3 * tiles - 1, mask=tiles > 0, other=0)

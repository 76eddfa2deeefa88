"""How a grouped matmul is cut for a chip: the chip, the tile that a product gets, and the schedule of row tiles.

`tiles.json` has two lists of tiles. "families" are chosen by hand, from a static model and one H200's figures, and
checked to compile; "tuned" holds what was measured on a chip with a version of Triton, and serves that chip and version
alone. What `epbackend tune` measures goes into a table of the user's own, which comes first.

The schedule says which rows each tile multiplies; it is computed on the device from the counts. Example:
counts_L = [3, 0, 130] with blocks of 128 rows gives tiles_M3 = [[0, 0, 3], [2, 3, 133], [2, 131, 133]] and
total_1 = [3]: slot, first row, and the row at which the slot's rows end.

Shapes: L slots, N outputs and K inputs of a matrix, M row tiles.
"""

from __future__ import annotations

import json
import logging
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
from epbackend.files import cache_folder, replace_file
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.triton.launch import named_launch, next_power_of_2
from epbackend.kernels.weight_formats import Experts

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether Triton's interpreter runs the kernels on a CPU; set by TRITON_INTERPRET=1 before the first import."""


logger = logging.getLogger("epbackend")

GLUON_OF = ("3.6", "3.7")
"""Versions of Triton whose Gluon, an experimental part of it, compiles `specialized_matmul`; with another one products
are those of `grouped_matmul` alone, and the log says so."""


@dataclass(frozen=True)
class Chip:
    """A GPU: how many programs it runs at once, and what it can do."""

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

    @property
    def specializes(self) -> bool:
        """Whether it runs `specialized_matmul`: Hopper does, Triton's interpreter does not."""
        return self.capability[0] == 9 and self != INTERPRETER and _knows_gluon()


A100 = Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912)
L40S = Chip("NVIDIA L40S", (8, 9), 142, 101_376)
H100 = Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 232_448)
H200 = Chip("NVIDIA H200", (9, 0), 132, 232_448)
B200 = Chip("NVIDIA B200", (10, 0), 148, 232_448)
INTERPRETER = Chip("Triton's interpreter", (9, 0), 3, 232_448)
"""Three programs, so that each of them has several tiles to take, and one ends before the others."""


@cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a torch device; for the CPU `INTERPRETER`."""
    if device.type == "cpu":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    limits = driver.active.utils.get_device_properties(device.index)
    return Chip(found.name, (found.major, found.minor), found.multi_processor_count, limits["max_shared_mem"])


SPECIALIZED_ROWS = 128
"""Of a tile of `specialized_matmul`: 64 for each of its warpgroups."""


@dataclass(frozen=True)
class Tile:
    """The piece of a grouped matmul that one program multiplies at a time, and compiler options for it."""

    rows: int
    columns: int
    """Of the output; a gated product multiplies twice as many columns of the weights."""
    depth: int
    warps: int
    stages: int
    """Blocks that are loaded while one is multiplied."""
    band: int = 8
    """Row tiles that share the L2 cache."""
    programs: int = 1
    """Programs for each multiprocessor."""
    tma: bool = True
    """Load by the bulk copy engine where chip and alignment allow."""
    specialize: bool = False
    """Let one warp load and two warpgroups multiply (`specialized_matmul`), whatever `warps` says."""
    flatten: bool = False
    """Make one loop of tiles and depth, so that the next tile loads while this one ends."""
    gather: bool = False
    """Of a gated product in half precision: read its rows where the tokens lie, by pointers, so that none is copied."""

    def __post_init__(self) -> None:
        """Raises ValueError where `specialized_matmul` has no such tile."""
        if self.specialize and (self.rows != SPECIALIZED_ROWS or self.gather):
            raise ValueError(
                f"a tile that specializes has {SPECIALIZED_ROWS} rows and does not gather: {self}"
            )

    def constants(self) -> dict[str, Any]:
        """The arguments that every grouped matmul takes, beside the compiler's `num_warps` and `num_stages`."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_K": self.depth,
            "BAND": self.band,
            "FLATTEN": self.flatten,
        }


PACKAGED = Path(__file__).with_name("tiles.json")
OWN_TABLE = "EPBACKEND_TILES"
"""The environment variable that names the user's table."""
FAMILIES = {8: "ampere", 9: "hopper", 10: "blackwell", 11: "blackwell", 12: "ampere"}
"""By the major compute capability. Desktop Blackwell (12) has no more shared memory than desktop Ampere had."""


@dataclass(frozen=True)
class Product:
    """What is known of a grouped matmul before it runs; how the rows are spread over the slots is not."""

    weight_format: str
    """half (bfloat16 and float16), float32, fp8 or int8."""
    gated: bool
    rows: int
    slots: int
    height: int
    """Outputs of a slot's matrix: N, or 2F where the product is gated."""
    depth: int
    aligned: bool = True
    """Whether TMA can read the matrices."""

    @classmethod
    def of(cls, rows: int, experts: Experts, gated: bool) -> Product:
        values_LNK = weight_values(experts)
        slots, height, depth = values_LNK.shape
        return cls(weight_format(experts), gated, rows, slots, height, depth, aligned(values_LNK))


TMA_BYTES = 16


def aligned(tensor: Tensor) -> bool:
    """Whether TMA can read the tensor: rows contiguous, and base and row stride multiples of 16 bytes."""
    strides = [stride * tensor.itemsize for stride in tensor.stride()[:-1]]
    return tensor.stride(-1) == 1 and not any(at % TMA_BYTES for at in (tensor.data_ptr(), *strides))


def weight_values(experts: Experts) -> Tensor:
    """The matrices [L, N, K], without their scales."""
    return experts if isinstance(experts, Tensor) else experts.values_LNK


def weight_format(experts: Experts) -> str:
    """The section of the table that serves these matrices: half, float32, fp8 or int8."""
    if isinstance(experts, Tensor):
        return "float32" if experts.dtype == torch.float32 else "half"
    return "fp8" if isinstance(experts, Fp8Blocks) else "int8"


@lru_cache(maxsize=4096)
def choose_tile(chip: Chip, product: Product) -> Tile:
    """The family's first tile that takes the product's mean number of rows a slot, or what tuning put in its place."""
    rows_per_slot = product.rows / product.slots

    def serves(tile: dict[str, Any]) -> bool:
        if not tile.get("specialize"):
            return True
        if chip.capability[0] == 9 and not _knows_gluon():
            _say_that_gluon_differs()
        return chip.specializes and product.aligned

    family = filter(serves, family_tiles(chip, product.weight_format, product.gated))
    entry = next(each for each in family if each["up_to"] is None or rows_per_slot <= each["up_to"])
    wanted = tuned_for(chip, product, entry["up_to"])
    measured = (each["tile"] for each in table()["tuned"] if wanted.items() <= each.items())
    tile = next(filter(serves, measured), entry)
    return Tile(**{name: value for name, value in tile.items() if name != "up_to"})


def _knows_gluon() -> bool:
    return triton.__version__.startswith(GLUON_OF)


@cache
def _say_that_gluon_differs() -> None:
    """Once."""
    logger.warning(
        "Triton %s is not among those with which this GPU's fastest products in 8 bits were compiled (%s): others take "
        "their place, up to a third slower with many rows",
        triton.__version__,
        ", ".join(GLUON_OF),
    )


def family_tiles(chip: Chip, weight_format: str, gated: bool) -> list[dict[str, Any]]:
    """The tiles of a chip that was not tuned for, from few rows a slot (`up_to`) to many.

    One that specializes is followed by one for the same rows that does not.
    """
    return table()["families"][FAMILIES[chip.capability[0]]][weight_format]["gated" if gated else "plain"]


def tuned_for(chip: Chip, product: Product, up_to: float | None) -> dict[str, Any]:
    """What a measured tile is valid for: chip, version of Triton, product, and the family's tile that it replaces."""
    return {
        "chip": chip.name,
        "triton": ".".join(triton.__version__.split(".")[:2]),
        "form": product.weight_format,
        "gated": product.gated,
        "height": product.height,
        "depth": product.depth,
        "up_to": up_to,
    }


@cache
def table() -> dict[str, Any]:
    """The packaged table, with the tuned tiles of the user's table before its own.

    Raises:
        ConfigError: The user's table cannot be read.
    """
    packaged = json.loads(PACKAGED.read_text())
    return {**packaged, "tuned": [*_tuned_in(own_table()), *packaged["tuned"]]}


def own_table() -> Path:
    """The user's table, which may not exist yet: $EPBACKEND_TILES, or else a file in the user's cache."""
    if named := os.environ.get(OWN_TABLE):
        return Path(named)
    return cache_folder() / "tiles.json"


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
    """Write a measured tile into a table, replacing an earlier one for the same; other processes may read meanwhile."""
    stored = json.loads(path.read_text()) if path.exists() else {"tuned": []}
    others = [each for each in stored["tuned"] if not tuned.items() <= each.items()]
    stored["tuned"] = [*others, {**tuned, "date": date, "tile": asdict(tile)}]
    innermost = re.compile(r"\{[^{}]*\}")  # on one line each
    text = innermost.sub(lambda found: json.dumps(json.loads(found[0])), json.dumps(stored, indent=1))
    replace_file(path, f"{text}\n".encode())


@dataclass(frozen=True)
class Schedule:
    """The row tiles of one grouped matmul. Both products of an expert share one."""

    tiles_M3: Tensor
    """int32: slot, first row, end of the slot's rows. M is the most tiles that any counts need."""
    total_1: Tensor
    """int32: how many of the M are used."""
    block_rows: int


def row_tiles(counts_L: Tensor, rows: int, block_rows: int, total_L: Tensor | None = None) -> Schedule:
    """The tiles of `block_rows` rows that cover the groups of `counts_L`, whose sum is at most `rows` (< 2^31).

    The counts are added to `total_L` (int64).
    """
    slots = len(counts_L)
    most = rows // block_rows + min(slots, rows)
    tiles_M3 = torch.empty(most, 3, dtype=torch.int32, device=counts_L.device)
    total_1 = torch.empty(1, dtype=torch.int32, device=counts_L.device)
    _row_tiles[(slots,)](
        counts_L=counts_L,
        total_L=total_L,
        tiles_M3=tiles_M3,
        total_1=total_1,
        slots=slots,
        SLOTS=next_power_of_2(slots),
        BLOCK_ROWS=block_rows,
        LANES=32,
        num_warps=1,
    )
    return Schedule(tiles_M3, total_1, block_rows)


@named_launch
@triton.jit
def _row_tiles(
    counts_L,
    total_L,
    tiles_M3,
    total_1,
    slots,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The tiles of one slot, LANES at a time."""
    slot = tl.program_id(0)
    each = tl.arange(0, SLOTS)
    rows_L = tl.load(counts_L + each, mask=each < slots, other=0).to(tl.int32)
    tiles_L = (rows_L + BLOCK_ROWS - 1) // BLOCK_ROWS
    first_tile = tl.sum(tl.where(each < slot, tiles_L, 0))
    first_row = tl.sum(tl.where(each < slot, rows_L, 0))
    tiles = tl.sum(tl.where(each == slot, tiles_L, 0))
    rows = tl.sum(tl.where(each == slot, rows_L, 0))
    if total_L is not None:
        tl.store(total_L + slot, tl.load(total_L + slot) + rows)
    end = first_row + rows
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
    """The sum of the counts, read off the schedule: where the last tile's slot ends."""
    tiles = tl.load(total_1)
    return tl.load(tiles_M3 + 3 * tiles - 1, mask=tiles > 0, other=0)


@triton.jit
def find_tile(tile, tiles_M3, row_tiles, column_tiles, BAND: tl.constexpr):
    """(slot, first row, end of the slot's rows, column tile) of a tile, by its number.

    Tiles come in bands of BAND row tiles, and within a band column after column: those that run at the same time share
    BAND row blocks and few column blocks, which stay in the L2 cache.
    """
    band = tile // (BAND * column_tiles)
    rows_of_band = tl.minimum(row_tiles - band * BAND, BAND)
    within = tile - band * BAND * column_tiles
    entry = tiles_M3 + 3 * (band * BAND + within % rows_of_band)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), within // rows_of_band

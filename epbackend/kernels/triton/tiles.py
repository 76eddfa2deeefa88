"""Which tile a product gets: the tuned one for this chip and shape if there is one, else its chip family's.

`tiles.json` has both. "families" are chosen by hand from the static model and checked to compile without spills;
"tuned" holds what was measured on a chip with a version of Triton, and serves that chip and version alone. What
`epbackend tune` measures goes into a table of the user's own, which comes first.
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
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels.forms import Experts
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.triton.chip import Chip
from epbackend.kernels.triton.tile import Tile

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

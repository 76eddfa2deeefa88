"""Which product is the fastest on this processor, by measuring: once for each dtype, processor and number of threads.

What is fast differs by processor: with one row in float32, oneDNN's blocked layout is ahead of MKL on one and behind it
on the next; bfloat16 has a product of its own on some, and runs at a tenth of the speed on others. So a few matrices,
more than a cache holds, are multiplied in each way, with as many rows as experts get while answering and while reading
a prompt. Experts are in memory once: the layout is kept that is ahead over all these numbers of rows.

`python -m epbackend.kernels.cpu.choice` measures beforehand, which `make setup` calls.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from math import inf, isqrt, log
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from filelock import FileLock

from epbackend.errors import ConfigError, unknown_name
from epbackend.files import cache_folder, replace_file
from epbackend.kernels.cpu import products
from epbackend.kernels.weight_formats import FLOATS

logger = logging.getLogger("epbackend")

PRODUCTS = ("library", "compiled", "onednn")
FORCED = "EPBACKEND_CPU_PRODUCT"
"""The environment variable that takes the place of a measurement: one of `PRODUCTS`, as for tests and comparisons."""

ROWS = (1, 2, 4, 16, 64)
"""Of one expert: the first three while answering, the others while reading prompts."""
OUTPUTS, INPUTS = 1536, 2048
BYTES = 50_000_000
"""Of the matrices: more than most caches hold, as the experts of a model are."""
TURNS, MOST_TURNS = 3, 12
AGREEING = 1.2
"""Turns go on until the two fastest of each product differ by no more than this factor."""
PAYS = 0.97
"""More rows than there are get multiplied where that takes less than this part of the time."""

MANY = 1 << 62
"""More rows than any slot has."""
LOCK_S = 60
"""How long a process waits for another's measurement, which takes a second or two, before it makes its own."""

Microseconds = dict[str, dict[int, float]]
"""product -> rows -> microseconds of one matrix."""


@dataclass(frozen=True)
class Method:
    """How matrices of one dtype are stored and multiplied."""

    layout: str
    """plain, or onednn."""
    compiled_from: int = 0
    compiled_below: int = 0
    """In the plain layout, slots with so many rows take the compiled product, and others the library's."""
    fewest_rows: int = 1
    """In oneDNN's layout."""

    @classmethod
    def of(cls, product: str) -> Method:
        """One product for all numbers of rows."""
        if product == "onednn":
            return cls("onednn")
        return cls("plain", 0, MANY if product == "compiled" else 0)

    def compiled(self, rows_L: np.ndarray) -> np.ndarray:
        """Whether slots with so many rows take the compiled product (bool [L])."""
        return (rows_L >= self.compiled_from) & (rows_L < self.compiled_below)

    def __str__(self) -> str:
        if self.layout == "onednn":
            return "onednn" + (f", at least {self.fewest_rows} rows" if self.fewest_rows > 1 else "")
        if self.compiled_below <= self.compiled_from:
            return "library"
        if self.compiled_from <= 1 and self.compiled_below == MANY:
            return "compiled"
        below = "" if self.compiled_below == MANY else f" to {self.compiled_below - 1}"
        return f"compiled from {max(1, self.compiled_from)}{below} rows of an expert, else library"


@cache
def choose(dtype: torch.dtype, product: str = "auto") -> Method:
    """The method for a dtype: by name, by the environment, from the user's table, or measured now and kept there.

    A product that cannot be had for the dtype on this processor is replaced by the library's.

    Raises:
        ConfigError: the name is unknown.
    """
    if product == "auto":
        product = os.environ.get(FORCED, "auto")
    if product != "auto":
        if product not in PRODUCTS:
            raise unknown_name(FORCED, product, ("auto", *PRODUCTS))
        return Method.of("library" if product == "onednn" and not products.onednn_takes(dtype) else product)
    return Method(**_kept_or_measured(dtype)["choice"])


def known() -> dict[str, Any]:
    """What was measured on this processor with these versions: "dtype, threads" -> method, figures and date."""
    return _read(table_path()).get(_key(), {})


def decide(us: Microseconds) -> Method:
    """The method that figures speak for. Without oneDNN's, the plain layout."""
    compiled = us.get("compiled", dict.fromkeys(us["library"], inf))
    plain = {rows: min(us["library"][rows], compiled[rows]) for rows in us["library"]}
    if packed := us.get("onednn"):
        ahead = sum(log(plain[rows] / packed[rows]) for rows in packed)
        if ahead > 0:
            least = min(packed[rows] for rows in packed if rows <= 4)
            fewest = next(rows for rows in packed if packed[rows] * PAYS <= least)
            return Method("onednn", fewest_rows=fewest)
    wins = [rows for rows in plain if compiled[rows] <= us["library"][rows]]
    if not wins:
        return Method.of("library")
    # Between two numbers that were measured the border is their geometric mean; wins are taken as one range.
    counts = sorted(plain)
    below, above = counts.index(wins[0]) - 1, counts.index(wins[-1]) + 1
    first = 0 if below < 0 else isqrt(counts[below] * wins[0]) + 1
    return Method("plain", first, MANY if above == len(counts) else isqrt(wins[-1] * counts[above]) + 1)


def measure(dtype: torch.dtype) -> Microseconds:
    """The fastest turn of each product, with matrices that come from memory."""
    slots = BYTES // (OUTPUTS * INPUTS * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)  # whoever packs experts keeps the state of torch's own
    drawn: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    matrices_L = [torch.randn(OUTPUTS, INPUTS, **drawn).to(dtype) for _ in range(slots)]
    for matrix_NK in matrices_L:
        products.use_huge_pages(matrix_NK.data_ptr(), matrix_NK.nbytes)
    at_L = np.array([matrix_NK.data_ptr() for matrix_NK in matrices_L])
    ways: dict[str, Callable[..., Any]] = {
        "library": lambda rows_SK, *where: products.library(rows_SK, matrices_L, *where)
    }
    if compiler_trouble() is None:
        ways["compiled"] = lambda rows_SK, first_L, last_L, out_SN: out_SN.copy_(
            products.compiled(rows_SK, at_L, first_L, last_L, dtype, OUTPUTS)
        )
    if products.onednn_takes(dtype):
        packed_L = [products.reordered(matrix_NK) for matrix_NK in matrices_L]
        ways["onednn"] = lambda rows_SK, *where: products.onednn(rows_SK, packed_L, *where)
    us: Microseconds = {name: {} for name in ways}
    for rows in ROWS:
        last_L = np.arange(1, slots + 1) * rows
        turns: dict[str, list[float]] = {name: [] for name in ways}
        while not settled(turns.values()):
            for name, way in ways.items():
                rows_SK = torch.randn(slots * rows, INPUTS, **drawn).to(dtype)
                out_SN = rows_SK.new_empty(len(rows_SK), OUTPUTS)
                start = time.perf_counter()
                way(rows_SK, last_L - rows, last_L, out_SN)
                turns[name].append(time.perf_counter() - start)
        for name, seconds in turns.items():
            us[name][rows] = round(min(seconds) / slots * 1e6, 1)
    return us


def settled(turns: Iterable[list[float]]) -> bool:
    """Whether there are enough turns of each: those that other programs have slowed down do not agree."""
    for seconds in turns:
        if len(seconds) < TURNS:
            return False
        fastest, second = sorted(seconds)[:2]
        if second > AGREEING * fastest and len(seconds) < MOST_TURNS:
            return False
    return True


@cache
def compiler_trouble() -> str | None:
    """Why nothing can be compiled for this processor; None if it can. Then quantized experts run by the reference."""
    try:
        from epbackend.kernels.cpu.compiled import threads_part

        threads_part(torch.float16)
    except Exception as error:
        logger.warning("experts' products cannot be compiled here, and are slower: %s", error)
        return f"{type(error).__name__}: {error}"
    return None


def _kept_or_measured(dtype: torch.dtype) -> dict[str, Any]:
    """The entry of `known` for a dtype with this process's threads."""
    name = f"{str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    if name in (entries := known()):
        return entries[name]
    path = table_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        # Ranks start together: one measures, and the others wait instead of disturbing it.
        lock.acquire(LOCK_S)
    except OSError as error:
        logger.warning(
            "experts' products are compiled and measured in each process, about 5 s, as nothing can be kept (%s): set "
            "XDG_CACHE_HOME and NUMBA_CACHE_DIR to a folder that can be written",
            error,
        )
        return _measured(dtype)
    with lock:
        if name in (entries := known()):
            return entries[name]
        entry = _measured(dtype)
        table = _read(path)
        table[_key()] = {**entries, name: entry}
        try:
            replace_file(path, f"{json.dumps(table, indent=1)}\n".encode())
        except ConfigError as error:
            logger.warning("%s; the next process measures again", error)
        return entry


def _measured(dtype: torch.dtype) -> dict[str, Any]:
    us = measure(dtype)
    return {"choice": asdict(decide(us)), "us": us, "date": date.today().isoformat()}


def report() -> dict[str, Any]:
    """What `epbackend doctor` tells of the processor: which products serve here, and why."""
    forced = os.environ.get(FORCED)
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "onednn": [str(dtype).removeprefix("torch.") for dtype in FLOATS if products.onednn_takes(dtype)],
        "forced": forced,
        "measured": {
            name: {"product": str(Method(**entry["choice"])), "date": entry["date"], "us": entry["us"]}
            for name, entry in known().items()
        },
    }


def table_path() -> Path:
    """Where measurements are kept, in the user's cache; the file may not exist yet."""
    return cache_folder() / "cpu.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
        for entries in table.values():
            for entry in entries.values():
                Method(**entry["choice"])
        return table
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is no table of measurements (%s): measured again", path, error)
        return {}


@cache
def _key() -> str:
    """What a measurement holds for."""
    compiled = Path(__file__).with_name("compiled.py").read_bytes()
    versions = f"torch {torch.__version__}, numba {version('numba')}, compiled.py {crc32(compiled):08x}"
    return f"{processor()}, {versions}"


@cache
def processor() -> str:
    """The processor's model as Linux knows it: "AMD EPYC (family 25, model 1, AVX2)"; elsewhere what Python knows."""
    instructions = torch.backends.cpu.get_cpu_capability()
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.processor() or platform.machine()} ({instructions})"
    lines = [line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line]
    found = {name.strip(): value.strip() for name, value in lines}
    name = found.get("model name", platform.machine())
    return f"{name} (family {found.get('cpu family')}, model {found.get('model')}, {instructions})"


def main() -> None:
    """Measures with all threads and with one, as ranks that share a machine have."""
    print(f"experts on {processor()}")
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            print(f"  {dtype}, {threads} threads: {choose(dtype)}", flush=True)
        choose.cache_clear()


if __name__ == "__main__":
    main()

"""What the workers' MoE layers did, seen from the process that started them.

The parent makes one shared-memory segment, the `LoadBoard`; each worker writes down the counters of its layers in it
after every step (`load_writer`), and the parent reads them at any time (`LoadReport`). The segment belongs to the
parent: its resource tracker removes it even where the parent is killed. Workers map the file behind it, because
attaching through `multiprocessing` would make their own tracker remove it with the first worker that ends.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from epbackend.errors import EPError

BOARD_VARIABLE = "EPBACKEND_LOAD_BOARD"
"""Names the segment to worker processes, as `ranks:name`."""

MAX_LAYERS, MAX_EXPERTS = 256, 1024
STEPS = 1024
"""Steps of the engine whose tokens are kept one by one."""
AHEAD = 8
"""More steps than a rank can be ahead of another one."""

# The board is an array of these, one a rank. Memory is taken only where something is written.
RANK = np.dtype(
    [
        ("error", "S4096"),
        ("dispatchers", "S16384"),
        ("experts", np.int64),
        ("calls", np.int64, MAX_LAYERS),
        ("passes", np.int64, MAX_LAYERS),
        ("rounds", np.int64, MAX_LAYERS),
        ("tokens", np.int64, (MAX_LAYERS, MAX_EXPERTS)),
        ("steps", np.int64, (MAX_LAYERS, STEPS)),
    ]
)

logger = logging.getLogger("epbackend")


@dataclass(frozen=True)
class LoadReport:
    """The work of all ranks since the engine started, its warm-up included."""

    layers: tuple[int, ...]
    """The model's layers that have experts: the second axis of tokens_RLE."""
    tokens_RLE: np.ndarray
    """Tokens that rank R computed for expert E of the layer, int64."""
    calls: int
    """Steps of the engine: forward passes through all layers."""
    passes: int
    """The most passes that a single call took (1: the cutoff never bound)."""
    rounds: int
    """The most rounds that a single call took (1: the buffers always sufficed)."""
    dispatchers: dict[str, dict[str, Any]]
    """phase -> name of its dispatcher, the reason, and why others were passed over."""
    step_imbalance_L: np.ndarray
    """As `imbalance_L`, but each step by itself, since in each the ranks wait for the busiest: the sum of the steps'
    maxima over the sum of their means, in the last thousand steps."""

    @property
    def tokens_per_rank(self) -> list[int]:
        """Expert tokens of each rank over all layers."""
        return self.tokens_RLE.sum(axis=(1, 2)).tolist()

    @property
    def imbalance_L(self) -> np.ndarray:
        """The busiest rank's tokens over the ranks' mean, for each of `layers` (1.0: level, or no token at all)."""
        tokens_RL = self.tokens_RLE.sum(axis=2)
        mean_L = tokens_RL.mean(axis=0)
        return np.where(mean_L > 0, tokens_RL.max(axis=0) / np.maximum(mean_L, 1e-9), 1.0)

    def loads_LE(self, layers: int, ep_size: int) -> np.ndarray:
        """Tokens of each logical expert in all `layers` of the model, int64; zeros where a layer has no experts.

        With `ep_size` 1 every rank computes (its share of) every token, so that one rank has seen them all.
        """
        loads_LE = np.zeros((layers, self.tokens_RLE.shape[2]), dtype=np.int64)
        loads_LE[list(self.layers)] = self.tokens_RLE[:ep_size].sum(axis=0)
        return loads_LE

    def since(self, earlier: LoadReport) -> LoadReport:
        """The work after `earlier` was read; maxima and step_imbalance_L stay those of the whole time."""
        return LoadReport(
            self.layers,
            self.tokens_RLE - earlier.tokens_RLE if earlier.layers else self.tokens_RLE,
            self.calls - earlier.calls,
            self.passes,
            self.rounds,
            self.dispatchers,
            self.step_imbalance_L,
        )


class LoadBoard:
    """The parent's end: makes the segment, reads it, removes it."""

    def __init__(self, ranks: int) -> None:
        self._memory = SharedMemory(create=True, size=ranks * RANK.itemsize)
        self._ranks = np.ndarray(ranks, RANK, buffer=self._memory.buf)

    @property
    def variable(self) -> str:
        """The value of BOARD_VARIABLE for workers."""
        return f"{len(self._ranks)}:{self._memory.name}"

    def report(self) -> LoadReport:
        """What has been counted so far."""
        layers = np.flatnonzero(self._ranks["calls"].any(axis=0))
        experts = int(self._ranks["experts"].max())
        notes = [json.loads(note) for note in self._ranks["dispatchers"] if note]
        return LoadReport(
            layers=tuple(layers.tolist()),
            tokens_RLE=self._ranks["tokens"][:, layers, :experts].copy(),
            calls=int(self._ranks["calls"].max()),
            passes=int(self._ranks["passes"].max()),
            rounds=int(self._ranks["rounds"].max()),
            dispatchers=notes[0] if notes else {},
            step_imbalance_L=np.array([self._step_imbalance(layer) for layer in layers.tolist()]),
        )

    def _step_imbalance(self, layer: int) -> float:
        calls = int(self._ranks["calls"][:, layer].min())
        kept = np.arange(max(0, calls - STEPS + AHEAD), calls) % STEPS
        tokens_RS = self._ranks["steps"][:, layer][:, kept]
        mean = tokens_RS.mean(axis=0).sum()
        return float(tokens_RS.max(axis=0).sum() / mean) if mean else 1.0

    def remove(self) -> None:
        """Takes the segment away. Workers that still run keep writing to memory nobody sees."""
        del self._ranks
        self._memory.close()
        self._memory.unlink()


def check_room(layer: int, experts: int) -> None:
    """Raises EPError for a layer or experts that the board has no room for."""
    if layer >= MAX_LAYERS or experts > MAX_EXPERTS:
        raise EPError(
            f"MoE layer {layer} with {experts} experts: the load report has room for {MAX_LAYERS} layers "
            f"of {MAX_EXPERTS} experts"
        )


def record_error(rank: int, text: str) -> None:
    """Leaves the worker's last words for its parent."""
    row = rank_row(rank)
    if row is not None:
        row["error"] = text.encode()[:4096]


def last_words(rank: int) -> str | None:
    """What the worker of that rank left, if it failed by an exception."""
    row = rank_row(rank)
    return None if row is None else bytes(row["error"]).rstrip(b"\0").decode(errors="replace") or None


def rank_row(rank: int) -> np.ndarray | None:
    """This rank's row of the board named in the environment."""
    ranks, _, name = os.environ.get(BOARD_VARIABLE, "").partition(":")
    if not name:
        return None
    path = Path("/dev/shm") / name
    if not path.exists():
        logger.warning("rank %d runs on another machine than its parent: its load is not reported", rank)
        return None
    return np.memmap(path, RANK, mode="r+", shape=int(ranks))[rank]

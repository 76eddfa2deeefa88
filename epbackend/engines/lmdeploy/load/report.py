"""What the workers' MoE layers did, seen from the process that started them.

The parent makes one shared-memory segment, `SharedStats`. A thread of each worker writes there what the worker's layers
have counted (`stats_writer`): a few times a second, and at once when the parent asks, as it does before it reads
(`LoadReport`). The segment belongs to the parent: its resource tracker removes it even where the parent is killed.
Workers map the file behind it, because attaching through `multiprocessing` would make their own tracker remove it with
the first worker that ends. A worker on another machine keeps its row to itself, and its engine fetches what it has
counted (`Counted`, `workers.ray_executor`).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from epbackend.balance.board import PLACE, text_in
from epbackend.config import EPConfig
from epbackend.engines.lmdeploy.workers.process_guard import ENDED, keep_tracker, process_state
from epbackend.engines.load_report import STEPS, LoadReport, step_imbalance_Y
from epbackend.errors import EPError, UnavailableError
from epbackend.names import PHASES

STATS_VARIABLE = "EPBACKEND_LOAD_STATS"
"""Names the segment to worker processes, as `ranks:name`."""

MAX_LAYERS, MAX_EXPERTS = 256, 1024
AHEAD = 8
"""More steps than the host of a rank can be ahead of what its device has done."""
PATIENCE_S = 2.0
"""How long a reader waits for a running worker that does not answer: it may be loading or capturing."""
LOOK_S = 0.001
SETTLE_S = 0.25
"""How long a reader waits for ranks to have counted the same steps: busy ones never have for long."""

# The segment is an array of these, one a rank: 7 MB each.
RANK = np.dtype(
    [
        ("error", "S4096"),
        ("verdict", "S2048"),  # in the first rank's row: why the whole engine ended
        ("pid", np.int64),
        ("beat", np.float64),  # when the rank last showed that it runs; this and `moved` by time.monotonic()
        ("phase", np.int64),  # of the step that it is in, an index into PULSE_PHASES
        ("moved", np.float64),  # when that step began, or came to its last layer
        ("layer", np.int64),  # the MoE layer that the step has come to; -1: none yet
        ("place", "S512"),  # where its main thread stands, once that lasts too long
        ("dispatchers", "S16384"),
        ("telling", np.int64),  # in the first rank's row, by the parent: odd while `about` is written
        ("about", "S8192"),
        ("experts", np.int64),
        ("top_k", np.int64),
        ("asked", np.int64),  # by the reader: the number of its question
        ("answered", np.int64),  # by the writer: the number of the question that it saw before it wrote
        ("writer", np.int64),  # the process that answers; 0: none does
        ("writing", np.int64),  # odd while what follows is written
        ("layers", np.bool_, MAX_LAYERS),
        ("steps", np.int64),
        ("passes", np.int64),
        ("rounds", np.int64),
        ("tokens", np.int64, (len(PHASES), MAX_LAYERS, MAX_EXPERTS)),
        ("sums", np.int64, (STEPS, MAX_LAYERS)),  # tokens of each layer after step s, at s % STEPS
        ("balance", PLACE),
    ]
)

PULSE_PHASES = ("", "prefill", "decode")
"""What a rank may be in; the first: in no step."""

logger = logging.getLogger("epbackend")


class StatsReader:
    """Looks at the segment of an engine of this machine, from any process, and changes nothing."""

    def __init__(self, ranks: np.ndarray) -> None:
        """`ranks`: the segment, an array of RANK."""
        self._ranks = ranks

    @classmethod
    def attach(cls, variable: str) -> StatsReader:
        """Raises EPError where the segment that a value of STATS_VARIABLE names is not there, or of another release."""
        ranks, _, name = variable.partition(":")
        path = Path("/dev/shm") / name
        try:
            if not 0 <= path.stat().st_size - int(ranks) * RANK.itemsize < os.sysconf("SC_PAGE_SIZE"):
                raise EPError(f"{path} was not made by this release of epbackend")
            return cls(np.memmap(path, RANK, mode="r", shape=int(ranks)))
        except OSError as error:
            raise EPError(f"{path} cannot be read: its engine has ended, or is another user's") from error

    def latest(self) -> LoadReport:
        """What running workers have written down by themselves: a quarter of a second old. Waits for none of them."""
        layers = np.flatnonzero((self._ranks["layers"] & (self._ranks["steps"] > 0)[:, None]).any(axis=0))
        experts = int(self._ranks["experts"].max())
        ranks = [_read(row, layers, experts) for row in self._ranks]
        notes = [json.loads(note) for note in self._ranks["dispatchers"] if note]
        return LoadReport(
            layers=tuple(layers.tolist()),
            tokens_2RYE=np.stack([rank.tokens_2YE for rank in ranks], axis=1),
            calls=max(rank.steps for rank in ranks),
            passes=int(self._ranks["passes"].max()),
            rounds=int(self._ranks["rounds"].max()),
            dispatchers=notes[0] if notes else {},
            step_imbalance_Y=_step_imbalance_Y(ranks),
            top_k=int(self._ranks["top_k"].max()),
        )

    @property
    def about(self) -> dict[str, Any]:
        """What the parent has told of the deployment; empty where it could not be read whole."""
        row, deadline = self._ranks[0], time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            began, text = int(row["telling"]), bytes(row["about"])
            if began == row["telling"] and not began % 2:
                return json.loads(text) if text else {}
            time.sleep(LOOK_S)
        return {}


class SharedStats(StatsReader):
    """The parent's end: makes the segment, reads it, removes it."""

    def __init__(self, ranks: int, **about: Any) -> None:
        """`about`: what readers are told of the deployment, see `tell`.

        Raises:
            UnavailableError: shared memory has no room for it.
        """
        self._memory = SharedMemory(create=True, size=ranks * RANK.itemsize)
        take_room(self._memory, "the load report")
        super().__init__(np.ndarray(ranks, RANK, buffer=self._memory.buf))
        self._asking, self._telling, self._about = Lock(), Lock(), dict[str, Any]()
        self.tell(**about)

    @classmethod
    def of(cls, config: EPConfig) -> SharedStats:
        """Of the deployment that this process is about to start."""
        keep_tracker()
        split = {phase: config.placement.split_of(phase) for phase in PHASES}
        return cls(config.world_size, pid=os.getpid(), ep_size=config.ep_size, split=split)

    @property
    def variable(self) -> str:
        """The value of STATS_VARIABLE for workers."""
        return f"{len(self._ranks)}:{self._memory.name}"

    def report(self) -> LoadReport:
        """What has been counted: all steps that have ended, and on an idle engine the same ones of all ranks."""
        deadline = time.monotonic() + SETTLE_S
        with self._asking:
            self._ask()
            # A client has its answer when the first rank has: the others end the same step a moment later.
            while self._apart() and time.monotonic() < deadline:
                time.sleep(LOOK_S)
                self._ask()
            return self.latest()

    def _apart(self) -> bool:
        """Whether ranks that step together have counted different steps."""
        steps = self._ranks["steps"][self._ranks["writer"] > 0]
        return self._about.get("ep_size", 1) > 1 and bool((steps != steps[:1]).any())

    def tell(self, **about: Any) -> None:
        """Adds to what readers are told, or replaces it: anything that JSON can say, in 8 KB together."""
        with self._telling:
            self._about |= about
            text = json.dumps(self._about).encode()
            if len(text) > RANK["about"].itemsize:
                raise EPError(f"the deployment is told in {len(text)} bytes of {RANK['about'].itemsize}")
            row = self._ranks[0]
            row["telling"] += 1
            row["about"] = text
            row["telling"] += 1

    @property
    def verdict(self) -> str | None:
        """Why an engine that writes here ended, as its watch has found; None while all is well."""
        return text_in(self._ranks[0]["verdict"]) or None

    @property
    def places(self) -> np.ndarray:
        """The ranks' places at the board of migrations. To be let go before `remove`."""
        return self._ranks["balance"]

    def _ask(self) -> None:
        """Asks every writer to bring its part up to date, and waits for those whose process still runs."""
        self._ranks["asked"] += 1
        deadline = time.monotonic() + PATIENCE_S
        for rank, row in enumerate(self._ranks):
            while row["answered"] != row["asked"] and process_state(int(row["writer"])) not in ENDED:
                if time.monotonic() > deadline:
                    logger.warning("rank %d is busy: its part of the load report is older", rank)
                    break
                time.sleep(LOOK_S)

    def remove(self) -> None:
        """Removes the segment. Workers that still run go on writing to memory that is not read."""
        del self._ranks
        remove_segment(self._memory)


def take_room(memory: SharedMemory, what: str) -> None:
    """All pages of a new segment at once: one that is missing later kills whoever writes there (SIGBUS).

    Raises:
        UnavailableError: there are not as many; the segment is gone then.
    """
    try:
        with (Path("/dev/shm") / memory.name).open("r+b") as segment:
            os.posix_fallocate(segment.fileno(), 0, memory.size)
    except OSError as error:
        remove_segment(memory)
        raise UnavailableError(
            f"/dev/shm has no room for {what}, {memory.size / 1e6:.0f} MB ({error.strerror}): free some, or give the "
            "container more (docker: --shm-size; Kubernetes: an emptyDir with medium Memory)"
        ) from error


def remove_segment(memory: SharedMemory) -> None:
    """Closes a segment that this process made, and removes it where systemd has not.

    With its default, RemoveIPC=yes, systemd removes the segments of a user whose last session has ended, also those of
    processes that run on. They keep what they have mapped.
    """
    memory.close()
    try:
        memory.unlink()
    except FileNotFoundError:
        resource_tracker.unregister(memory._name, "shared_memory")  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Rank:
    """One rank's part of the segment, all of one moment."""

    steps: int
    tokens_2YE: np.ndarray
    sums_SY: np.ndarray


def _read(row: Any, layers: np.ndarray, experts: int) -> _Rank:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        began = int(row["writing"])
        found = _Rank(int(row["steps"]), row["tokens"][:, layers, :experts], row["sums"][:, layers])
        # A writer that was killed half-way stays half-way.
        if (began == row["writing"] and not began % 2) or time.monotonic() > deadline:
            return found
        time.sleep(LOOK_S)


def _step_imbalance_Y(ranks: list[_Rank]) -> np.ndarray:
    """Over the steps that all ranks have ended and still know."""
    ended, last = min(rank.steps for rank in ranks), max(rank.steps for rank in ranks)
    kept = np.arange(max(0, last - STEPS + AHEAD), ended + 1) % STEPS
    return step_imbalance_Y(np.diff(np.stack([rank.sums_SY[kept] for rank in ranks]), axis=1))


@dataclass(frozen=True)
class Counted:
    """What a rank has counted, on its way to the machine where its row is read."""

    steps: int
    first: int
    """The first step whose sums are here; those of the steps before have travelled, or are forgotten."""
    sums_SY: np.ndarray
    """Of the steps from `first` to `steps`."""
    layers: np.ndarray
    tokens_2YE: np.ndarray
    passes: int
    rounds: int
    top_k: int
    dispatchers: bytes

    @classmethod
    def of(cls, row: Any, since: int) -> Counted:
        """Of a rank's row, which nobody writes meanwhile; `since` is the step up to which it has travelled."""
        steps, layers = int(row["steps"]), np.flatnonzero(row["layers"])
        known = since if since <= steps else 0  # it has started over
        first = max(known + 1, steps - STEPS + 1)
        sums_SY = row["sums"][np.ix_(np.arange(first, steps + 1) % STEPS, layers)]
        tokens_2YE = row["tokens"][:, layers, : int(row["experts"])]
        passes, rounds, top_k = (int(row[name]) for name in ("passes", "rounds", "top_k"))
        return cls(
            steps, first, sums_SY, layers, tokens_2YE, passes, rounds, top_k, bytes(row["dispatchers"])
        )

    def write(self, row: Any) -> None:
        """Into that rank's row."""
        with writing(row):
            row["layers"] = False
            row["layers"][self.layers] = True
            row["sums"][np.ix_(np.arange(self.first, self.steps + 1) % STEPS, self.layers)] = self.sums_SY
            row["experts"] = experts = self.tokens_2YE.shape[2]
            row["tokens"][:, self.layers, :experts] = self.tokens_2YE
            for name in ("steps", "passes", "rounds", "top_k", "dispatchers"):
                row[name] = getattr(self, name)


@contextmanager
def writing(row: Any) -> Iterator[None]:
    """Readers of a rank's row repeat what they read meanwhile."""
    row["writing"] += 1
    yield
    row["writing"] += 1


def check_room(layer: int, experts: int) -> None:
    """Raises EPError for a layer or experts that the segment has no room for."""
    if layer >= MAX_LAYERS or experts > MAX_EXPERTS:
        raise EPError(
            f"MoE layer {layer} with {experts} experts: the load report has room for {MAX_LAYERS} layers "
            f"of {MAX_EXPERTS} experts"
        )


def record_error(rank: int, text: str) -> None:
    """Writes down for the parent what the worker failed of."""
    row = rank_row(rank)
    if row is not None:
        row["error"] = text.encode()[:4096]


def last_error(rank: int) -> str | None:
    """What the worker of that rank failed of; None where it did not fail by an exception."""
    row = rank_row(rank)
    return None if row is None else text_in(row["error"]) or None


def record_verdict(text: str) -> None:
    """Writes down why the engine ends, for the process that serves or asked; the first reason stays."""
    row = rank_row(0)
    if row is not None and not row["verdict"]:
        row["verdict"] = text.encode()[:2048]


def rank_row(rank: int) -> Any:
    """This rank's row of the segment that the environment names; None where it names none.

    On another machine than the segment's it is a row of this process alone.
    """
    rows = all_rows()
    if rows is not None:
        return rows[rank]
    return _own_row(rank) if os.environ.get(STATS_VARIABLE) else None


@cache
def _own_row(rank: int) -> Any:
    return np.zeros(1, RANK)[0]


def all_rows() -> np.ndarray | None:
    """The rows of all ranks; None without a segment on this machine."""
    ranks, _, name = os.environ.get(STATS_VARIABLE, "").partition(":")
    path = Path("/dev/shm") / name
    if not name or not path.exists():
        return None
    return np.memmap(path, RANK, mode="r+", shape=int(ranks))

"""How the parent and the ranks of one machine agree on a migration: words in shared memory, without waiting.

    parent   publishes migration n                          -> every rank
    rank     stages it in a thread, answers n, or -n        -> rank 0 and the parent
    rank 0   when a step k begins: if all have answered n, decides "n flips at step k + lead", else perhaps "dropped"
    rank     when step k + lead begins: flips, or drops, and says so    -> the parent

Why no rank can miss the flip: ranks make the same steps, and each step holds a collective among all of them. No rank
begins step k + lead before its device has done step k (`streams.Streams.lead`), which it can only after rank 0 has sent
something in step k, as it does after it has decided. On a CPU the lead is 1: a host ends one step before the next.
Rank 0 is the only one that decides, once for each number. The parent can ask for the end of a migration (`cancel`), no
more.

The words are single int64 that one side writes, and a text with a checksum: a reader that comes too early sees the old
value, or tries again.
"""

from __future__ import annotations

import zlib
from enum import Enum
from typing import Any

import numpy as np

from epbackend.balance.moves import Migration
from epbackend.errors import EPError

MAX_TEXT = 256 << 10

PLACE = np.dtype(
    [
        ("order", np.int64),  # by the parent: the number of the migration in `text`
        ("length", np.int64),
        ("checksum", np.int64),
        ("text", np.uint8, MAX_TEXT),
        ("cancelled", np.int64),  # by the parent: up to this number none shall flip
        ("port", np.int64),  # by rank 0: where the ranks meet
        ("decision", np.int64),  # by rank 0: number << STEP_BITS | step, or step 0: dropped
        ("step", np.int64),  # steps that have begun
        ("layers", np.int64),  # layers that are there
        ("expert_bytes", np.int64),  # the largest expert
        ("answer", np.int64),
        ("flip_us", np.int64),  # the longest flip so far, in microseconds
        ("ended", np.int64),  # the last migration that flipped here or was given up
        ("error", "S1024"),
        ("work", np.float64, (4, 4)),  # `ExpertWork` of all layers, where speeds are measured
    ]
)
"""One rank's place at the board."""

STEP_BITS = 40
LEADER = 0


class Verdict(Enum):
    """What a rank does with what it has staged when a step begins."""

    WAIT = "wait"
    FLIP = "flip"
    DROP = "drop"


class Board:
    """The parent's end: one migration at a time."""

    def __init__(self, places: np.ndarray) -> None:
        """`places`: an array of PLACE, one for each rank, all zero."""
        self._places = places

    def close(self) -> None:
        """Lets go of the memory, and knows nothing afterwards."""
        self._places = np.zeros(0, PLACE)

    @property
    def expert_bytes(self) -> int:
        """Of the largest expert in any layer; 0: not all ranks have their layers yet."""
        if not self._places["layers"].all():
            return 0
        return int(self._places["expert_bytes"].max())

    @property
    def work_R44(self) -> np.ndarray:
        """What the ranks' experts were given and took so far, see `ExpertWork`; a call half-way added is no harm."""
        return self._places["work"].copy()

    def publish(self, migration: Migration) -> None:
        """Raises EPError where another migration is under way, or the order is too long for the board."""
        if not self.ended(int(self._places["order"].max())):
            raise EPError(f"migration {migration.number}: the one before it is still under way")
        text = migration.to_json().encode()
        if len(text) > MAX_TEXT:
            raise EPError(
                f"layer {migration.layer}: its order takes {len(text)} bytes of {MAX_TEXT} on the board"
            )
        for place in self._places:
            place["text"][: len(text)] = np.frombuffer(text, np.uint8)
            place["length"], place["checksum"] = len(text), zlib.crc32(text)
        self._places["error"] = b""
        self._places["order"] = migration.number  # last: who sees it finds the rest

    def cancel(self, number: int) -> None:
        """Rank 0 drops the migration when its next step begins, unless it has decided already."""
        self._places["cancelled"] = number

    def staged(self, number: int) -> bool:
        """Whether every rank has staged it, or one has failed."""
        answers_R = self._places["answer"]
        return bool((answers_R == number).all() or (answers_R == -number).any())

    def ended(self, number: int) -> bool:
        """Whether it is over on every rank: flipped on all, or on none."""
        return bool((self._places["ended"] >= number).all())

    def flipped(self, number: int) -> bool:
        """Of a migration that has ended."""
        decision = int(self._places[LEADER]["decision"])
        return decision >> STEP_BITS == number and bool(decision & ((1 << STEP_BITS) - 1))

    @property
    def longest_flip_ms(self) -> float:
        """For which a migration has held a rank up, at most."""
        return float(self._places["flip_us"].max()) / 1e3

    def silent(self, number: int) -> list[int]:
        """The ranks that have not answered."""
        return np.flatnonzero(np.abs(self._places["answer"]) != number).tolist()

    def errors(self) -> list[str]:
        """What ranks say of the migration published last."""
        texts = [text_in(place["error"]) for place in self._places]
        return [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]


def text_in(field: Any) -> str:
    """What a field of bytes in shared memory says."""
    return bytes(field).rstrip(b"\0").decode(errors="replace")


class Seat:
    """A rank's end. `begin_step` belongs to the thread that serves; all else to the one that stages."""

    def __init__(self, places: np.ndarray, rank: int, lead: int = 1) -> None:
        """`lead`: no rank begins step k + lead before it has done step k; the same on all ranks."""
        self._places, self._rank, self._mine, self._lead = places, rank, places[rank], lead
        self._step = int(self._mine["step"])
        self._decided = 0

    def has_layer(self, expert_bytes: int) -> None:
        """One more layer is there."""
        self._mine["expert_bytes"] = max(int(self._mine["expert_bytes"]), expert_bytes)
        self._mine["layers"] += 1

    @property
    def ordered(self) -> int:
        """The number of the migration that is published."""
        return int(self._mine["order"])

    def order(self, after: int) -> Migration | None:
        """The migration that is published, if its number is higher than that."""
        number = self.ordered
        if number <= after:
            return None
        text = self._mine["text"][: int(self._mine["length"])].tobytes()
        if zlib.crc32(text) != int(self._mine["checksum"]):
            return None  # half-way written: it is there when we look again
        migration = Migration.from_json(text.decode())
        return migration if migration.number == number else None

    @property
    def port(self) -> int:
        """Where rank 0 listens; 0: not yet."""
        return int(self._places[LEADER]["port"])

    def listen(self, port: int) -> None:
        self._mine["port"] = port

    def answer_staged(self, number: int) -> None:
        self._mine["answer"] = number

    def answer_failed(self, number: int, error: str) -> None:
        """Nothing of it is held here: it is over for this rank."""
        self._mine["error"] = error.encode()[:1024]
        self._mine["answer"] = -number
        self._mine["ended"] = number

    def flipped_in(self, seconds: float) -> None:
        self._mine["flip_us"] = max(int(self._mine["flip_us"]), int(1e6 * seconds))

    def end(self, number: int) -> None:
        self._mine["ended"] = number

    def begin_step(self, pending: int) -> Verdict:
        """A step begins; `pending` is the number of what is staged here, 0: nothing.

        Raises:
            EPError: the step of the flip is over, so that this rank would compute with other slots than the rest.
        """
        self._step += 1
        self._mine["step"] = self._step
        if self._rank == LEADER:
            self._decide()
        if not pending:
            return Verdict.WAIT
        decision = int(self._places[LEADER]["decision"])
        number, step = decision >> STEP_BITS, decision & ((1 << STEP_BITS) - 1)
        if number != pending or step > self._step:
            return Verdict.WAIT
        if not step:
            return Verdict.DROP
        if step < self._step:
            raise EPError(
                f"migration {pending} had to flip at step {step}, and this rank begins step {self._step}"
            )
        return Verdict.FLIP

    def _decide(self) -> None:
        number = self.ordered
        if number <= self._decided:
            return
        answers_R = self._places["answer"]
        if (answers_R == -number).any() or self._mine["cancelled"] >= number:
            self._decided = number
            self._mine["decision"] = number << STEP_BITS
        elif (answers_R == number).all():
            self._decided = number
            # Others have begun the step that is done here, and not the one that waits for what rank 0 does in this one.
            counts = set(self._places["step"].tolist())
            if min(counts) >= self._step - self._lead and max(counts) < self._step + self._lead:
                self._mine["decision"] = number << STEP_BITS | self._step + self._lead
            else:
                self._mine["error"] = f"ranks count different steps: {sorted(counts)}".encode()
                self._mine["decision"] = number << STEP_BITS

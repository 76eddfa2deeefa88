"""What a placement is to balance: the cost of the rank that all others wait for.

Every objective is a table over two sums over the slots of a rank, its tokens (choices) and its activated experts:

* `tokens`: the cost is the tokens themselves, as recorded (compute-bound: prefill);
* `activated[:BATCH]`: the experts that a batch is expected to touch, whose weights must be read (memory-bound: decode);
* a path to a JSON file: measured microseconds over both, `{"tokens": [..], "experts": [..], "microseconds": [[..]]}`,
  a row for each number of tokens; bilinear inside the table, as its outermost cells outside. `"batch"` may be given.

A batch is counted in choices, as loads are: a token that goes to K experts counts K times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from epbackend.errors import ConfigError
from epbackend.files import read_json

DEFAULT_BATCH = 1024
"""Choices of a batch unless given: 128 requests that decode one token each, for 8 experts."""

Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Objective:
    """The cost of a rank by its tokens (X) and its activated experts (A). The default is the tokens alone.

    The unit of a cost is that of the table: choices, activated experts, or microseconds.

    Raises:
        ConfigError: the table has axes that do not rise, rows that do not match them, or costs below 0.
    """

    name: str = "tokens"
    batch: int = 0
    """Choices of a batch over all ranks, to which loads are scaled; 0: costs are of the loads as recorded."""
    tokens_X: tuple[float, ...] = (0.0, 1.0)
    """Choices on a rank, rising."""
    experts_A: tuple[float, ...] = (0.0, 1.0)
    """Activated experts on a rank, rising."""
    cost_XA: Grid = ((0.0, 0.0), (1.0, 1.0))

    def __post_init__(self) -> None:
        for axis, values in (("tokens", self.tokens_X), ("experts", self.experts_A)):
            if len(values) < 2 or not np.isfinite(values).all() or not (np.diff(values) > 0).all():
                raise ConfigError(
                    f"objective {self.name}: {axis} must be two numbers or more, each above the one before"
                )
        shape = (len(self.tokens_X), len(self.experts_A))
        if [len(row) for row in self.cost_XA] != [shape[1]] * shape[0]:
            raise ConfigError(
                f"objective {self.name}: microseconds must have {shape[0]} rows (tokens) of {shape[1]} (experts)"
            )
        cost_XA = self.table[2]
        if not np.isfinite(cost_XA).all() or cost_XA.min() < 0:
            raise ConfigError(f"objective {self.name}: microseconds must be finite and 0 or more")
        if self.batch < 0 or (self.batch == 0 and (cost_XA != cost_XA[:, :1]).any()):
            raise ConfigError(
                f"objective {self.name}: batch is {self.batch}; give the tokens of a batch, 1 or more"
            )

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens_X, experts_A and cost_XA as float64 arrays."""
        return np.array(self.tokens_X), np.array(self.experts_A), np.array(self.cost_XA)

    def features(self, tokens_P: np.ndarray, total: float) -> tuple[np.ndarray, np.ndarray]:
        """Of slots with these loads, out of `total` over all: tokens in a batch, and the chance that it activates each.

        Both float64 in the shape given. Where `batch` is 0, the loads themselves and zeros.
        """
        shares_P = tokens_P / total if total > 0 else np.zeros_like(tokens_P, dtype=np.float64)
        if not self.batch:
            return np.asarray(tokens_P, dtype=np.float64), np.zeros(shares_P.shape)
        return shares_P * self.batch, 1.0 - (1.0 - np.minimum(shares_P, 1.0)) ** self.batch

    def cost(self, tokens: ArrayLike, experts: ArrayLike) -> np.ndarray:
        """The cost of ranks with these tokens and activated experts, elementwise, in the unit of the table."""
        tokens_X, experts_A, table_XA = self.table
        x, fx = _cell(tokens_X, tokens)
        y, fy = _cell(experts_A, experts)
        low = table_XA[x, y] + fy * (table_XA[x, y + 1] - table_XA[x, y])
        high = table_XA[x + 1, y] + fy * (table_XA[x + 1, y + 1] - table_XA[x + 1, y])
        return low + fx * (high - low)

    @cached_property
    def plane(self) -> tuple[float, float] | None:
        """The cost of a token and of an activated expert, if a rank costs the sum of both; None for any other table."""
        tokens_X, experts_A, cost_XA = self.table
        token = (cost_XA[1, 0] - cost_XA[0, 0]) / (tokens_X[1] - tokens_X[0])
        expert = (cost_XA[0, 1] - cost_XA[0, 0]) / (experts_A[1] - experts_A[0])
        if not np.allclose(token * tokens_X[:, None] + expert * experts_A, cost_XA):
            return None
        return float(token), float(expert)

    def rank_costs(self, tokens_P: np.ndarray, rank_of_slot_P: np.ndarray, ranks: int) -> np.ndarray:
        """The cost of every rank, float64 [R], for the tokens that each slot gets, by any split and in any unit."""
        tokens_P, experts_P = self.features(tokens_P, float(np.sum(tokens_P)))
        tokens_R = np.bincount(rank_of_slot_P, weights=tokens_P, minlength=ranks)
        experts_R = np.bincount(rank_of_slot_P, weights=experts_P, minlength=ranks)
        return self.cost(tokens_R, experts_R)


TOKENS = Objective()


def activated(batch: int = DEFAULT_BATCH) -> Objective:
    """Balances the experts that a batch of so many choices is expected to activate."""
    return Objective(f"activated:{batch}", batch, cost_XA=((0.0, 1.0), (0.0, 1.0)))


def parse_objective(given: str | Path | Objective) -> Objective:
    """`tokens`, `activated`, `activated:BATCH` or the path of a time table; an objective stays as it is.

    Raises ConfigError for anything else.
    """
    if isinstance(given, Objective):
        return given
    text = str(given)
    if text == "tokens":
        return TOKENS
    if text == "activated":
        return activated()
    name, _, batch = text.partition(":")
    if name == "activated":
        if not re.fullmatch(r"[1-9][0-9]{0,11}", batch):
            raise ConfigError(
                f"objective: {text!r} needs the tokens of a batch after the colon, as activated:1024"
            )
        return activated(int(batch))
    if text.endswith(".json"):
        return read_table(Path(text))
    raise ConfigError(
        f"objective: {text!r} is unknown; use tokens, activated, activated:BATCH or the path of a time table (.json)"
    )


def read_table(path: Path) -> Objective:
    """A measured time table. Raises ConfigError where the file cannot be read, or is no table."""
    data = read_json("objective", path)
    if not isinstance(data, dict):
        raise ConfigError(f"objective: {path} must be an object with tokens, experts and microseconds")
    batch = data.get("batch", DEFAULT_BATCH)
    if type(batch) is not int or not 1 <= batch < 10**12:
        raise ConfigError(
            f"objective: batch in {path} must be a whole number of tokens, 1 or more, not {batch!r}"
        )
    rows = data.get("microseconds")
    if not isinstance(rows, list):
        raise ConfigError(f"objective: microseconds in {path} must be a list of rows, one a number of tokens")
    return Objective(
        path.name,
        batch,
        _numbers(data.get("tokens"), "tokens", path),
        _numbers(data.get("experts"), "experts", path),
        tuple(_numbers(row, f"microseconds[{index}]", path) for index, row in enumerate(rows)),
    )


def _numbers(values: Any, field: str, path: Path) -> tuple[float, ...]:
    if not isinstance(values, list) or any(type(value) not in (int, float) for value in values):
        raise ConfigError(f"objective: {field} in {path} must be a list of numbers")
    try:
        return tuple(float(value) for value in values)
    except OverflowError:
        raise ConfigError(f"objective: {field} in {path} has a number that is too large") from None


def _cell(axis: np.ndarray, value: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The cell of the axis that holds each value, and where in it: 0 at its start, 1 at its end, beyond them outside.

    `search.layer_search` has the form for one number, which is compiled.
    """
    index = np.clip(np.searchsorted(axis, value, side="right") - 1, 0, len(axis) - 2)
    return index, (np.asarray(value) - axis[index]) / (axis[index + 1] - axis[index])

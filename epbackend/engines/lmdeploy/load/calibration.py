"""Experts timed where they serve: warm ranks do it if a folder is named, and leave a file each.

Letters: X numbers of rows, A numbers of active experts.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from epbackend.balance.calibration import Calibration, active_experts, time_experts
from epbackend.engines.lmdeploy.environment import environment
from epbackend.errors import EPError
from epbackend.files import replace_file
from epbackend.moe import ExpertParallelMoE

CALIBRATE_VARIABLE = "EPBACKEND_CALIBRATE"
"""Names workers the folder."""
ASKED = "asked.json"


@contextmanager
def calibrating(ranks: int, rows_X: tuple[int, ...], rounds: int) -> Iterator[Callable[[], Calibration]]:
    """Engines that are started inside time their experts at once; the call that is given says what all found.

    Args:
        ranks: processes of the engine, each of which leaves a file.
        rows_X, rounds: see `time_experts`.
    """
    with tempfile.TemporaryDirectory(prefix="epbackend-calibrate-") as folder:
        (Path(folder) / ASKED).write_text(json.dumps([rows_X, rounds]))
        with environment({CALIBRATE_VARIABLE: folder}):
            yield lambda: _read(Path(folder), ranks, rows_X)


def calibrate(layers: Mapping[int, ExpertParallelMoE], hidden_size: int, dtype: torch.dtype) -> None:
    """Times the experts of this rank's first layer of experts, where it is asked for, and leaves its file."""
    if CALIBRATE_VARIABLE not in os.environ or not layers:
        return
    folder = Path(os.environ[CALIBRATE_VARIABLE])
    rows_X, rounds = json.loads((folder / ASKED).read_text())
    number = min(layers)
    layer = layers[number]
    microseconds_XA = time_experts(layer, hidden_size, dtype, tuple(rows_X), rounds)
    found = {
        "layer": number,
        "slots": int(layer.slot_map.layout.slots_R.min()),
        "microseconds": microseconds_XA.tolist(),
    }
    replace_file(folder / f"rank{layer.ranks.rank}.json", json.dumps(found).encode())


def _read(folder: Path, ranks: int, rows_X: tuple[int, ...]) -> Calibration:
    """Raises EPError where a rank has left no file, or holds one expert alone."""
    files = [folder / f"rank{rank}.json" for rank in range(ranks)]
    if missing := [rank for rank, file in enumerate(files) if not file.exists()]:
        raise EPError(
            f"calibrate: rank {', '.join(map(str, missing))} has timed no experts; run all ranks on this machine, and "
            "use a model with experts"
        )
    found = [json.loads(file.read_text()) for file in files]
    if found[0]["slots"] < 2:
        raise EPError(
            "calibrate: a rank holds a single expert, of which no table of times can be made: lower ep_size"
        )
    return Calibration(
        rows_X,
        active_experts(found[0]["slots"]),
        np.array([each["microseconds"] for each in found]),
        found[0]["layer"],
    )

"""The pairs of a real run: workers count them where a folder is named, and leave a file each when they end."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from epbackend.engines.lmdeploy.environment import environment
from epbackend.errors import EPError
from epbackend.files import replace_file
from epbackend.kernels.pair_counter import PairCounter
from epbackend.placement.pairs import Pairs

PAIRS_VARIABLE = "EPBACKEND_PAIRS"
"""Names workers the folder."""


@contextmanager
def counting_pairs(
    ranks: int, layers: int, name: str, numbering: str | None
) -> Iterator[Callable[[], Pairs]]:
    """Engines that are started inside count pairs; once they have ended, the call that is given says which.

    Args:
        ranks: processes of the engines, each of which leaves a file.
        layers: of the model, dense ones too.
        name: of the pairs.
        numbering: by whose numbers experts are counted.
    """
    with (
        tempfile.TemporaryDirectory(prefix="epbackend-pairs-") as folder,
        environment({PAIRS_VARIABLE: folder}),
    ):
        yield lambda: _read(Path(folder), ranks, layers, name, numbering)


def write_down(counters: Mapping[int, PairCounter]) -> None:
    """Leaves this worker's file, with the pairs of each layer by its number."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {str(layer): each.tokens_EE.numpy() for layer, each in counters.items()}
    np.savez_compressed(buffer, **arrays)
    replace_file(Path(os.environ[PAIRS_VARIABLE]) / f"{os.getpid()}.npz", buffer.getvalue())


def _read(folder: Path, ranks: int, layers: int, name: str, numbering: str | None) -> Pairs:
    """Raises EPError where a worker has left no file, or no token was counted."""
    files = sorted(folder.glob("[0-9]*.npz"))
    if len(files) != ranks:
        raise EPError(
            f"pairs: {len(files)} of {ranks} ranks have left their counts; record them on one machine, and see the log "
            "above for ranks that were killed"
        )
    sums: dict[int, np.ndarray] = {}
    for file in files:
        with np.load(file) as counted:
            for layer in counted.files:
                sums[int(layer)] = sums.get(int(layer), 0) + counted[layer]
    if not any(tokens_EE.any() for tokens_EE in sums.values()):
        raise EPError("pairs: nothing to record, no token was counted")
    experts = max(len(tokens_EE) for tokens_EE in sums.values())
    tokens_YEE = np.zeros((layers, experts, experts), dtype=np.int64)
    for layer, tokens_EE in sums.items():
        tokens_YEE[layer, : len(tokens_EE), : len(tokens_EE)] = tokens_EE
    return Pairs(tokens_YEE, name, numbering)

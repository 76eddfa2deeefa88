"""MindIE's hot spots of experts: a folder of csv files, one for each NPU, and `model_gen_config.json` beside them.

MindIE writes them with MINDIE_ENABLE_EXPERT_HOTPOT_GATHER=1 below MINDIE_EXPERT_HOTPOT_DUMP_PATH, in `prefill` and
`decode`. Every 8th step an NPU appends to `decode_<rank>.csv` the tokens that each of its experts has had since the
start, a line for each layer with experts: the last block is the sum. Where counts fall, the server was started again.
The experts are on the NPUs in order, because MindIE records without load balancing.

Letters: B blocks of a file, L experts of an NPU.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.formats.base import LoadsFormat
from epbackend.placement.formats.file import File, check_values
from epbackend.placement.formats.table import read_matrix
from epbackend.placement.loads import Loads

CONFIG = "model_gen_config.json"
LAYERS, EXPERTS, MAP = "num_moe_layers", "num_of_experts", "eplb_expert_map_file"
OF_RANK = re.compile(r"(?:prefill|decode)_(\d{1,5})\.csv")


def _read(file: File) -> Loads:
    layers, experts = (_count(file, name) for name in (LAYERS, EXPERTS))
    check_values((layers, experts))
    if MAP in file.keys:
        raise ConfigError(
            f"{MAP}: the experts were moved while this was recorded; record without load balancing"
        )
    of_rank = _files_of_ranks(file.path.parent)
    if [rank for rank, _ in of_rank] != list(range(len(of_rank))) or not of_rank:
        said = ", ".join(str(rank) for rank, _ in of_rank) or "none"
        raise ConfigError(f"the csv files beside it are of NPUs {said}; there must be one of each, from 0 on")
    tokens_YE = np.concatenate([_total_YL(path, layers) for _, path in of_rank], axis=1)
    if tokens_YE.shape[1] != experts:
        raise ConfigError(
            f"{EXPERTS}: {experts}, but the csv files have {tokens_YE.shape[1]} columns together; record without "
            "redundant experts, and give the files of all NPUs"
        )
    return Loads.of(tokens_YE, [file.path.resolve().parent.name])


def _files_of_ranks(folder: Path) -> list[tuple[int, Path]]:
    """The csv files of a folder by their NPUs; one that has two is there twice."""
    try:
        names = [each.name for each in folder.iterdir()]
    except OSError as error:
        raise ConfigError(f"the folder cannot be read: {error.strerror}") from None
    return sorted((int(found[1]), folder / name) for name in names if (found := OF_RANK.fullmatch(name)))


def _total_YL(path: Path, layers: int) -> np.ndarray:
    """Tokens of the experts of one NPU."""
    try:
        lines = read_matrix(File(path))
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    if len(lines) % layers:
        raise ConfigError(
            f"{path.name}: has {len(lines)} lines, no multiple of {LAYERS} {layers}; it is cut off"
        )
    blocks_BYL = lines.reshape(-1, layers, lines.shape[1])
    fell_B = (np.diff(blocks_BYL, axis=0) < 0).any(axis=(1, 2))
    return blocks_BYL[np.append(fell_B, True)].sum(axis=0)


def _count(file: File, name: str) -> int:
    value = file.json[name]
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name}: must be a whole number, at least 1")
    return value


LOADS = LoadsFormat("mindie-hotspots", lambda file: {LAYERS, EXPERTS} <= file.keys, _read)

"""What SGLang's expert distribution recorder dumps: a `torch.save` of `logical_count` [steps, layers, experts].

The file is a zip archive around a pickle. Before torch sees it, the archive's sizes are checked and the pickle is
listed, not run: it may name tensors only. Then torch reads it with `weights_only=True`.
"""

from __future__ import annotations

import pickletools
import zipfile
from typing import Any

from epbackend.errors import ConfigError, UnavailableError
from epbackend.placement.formats.base import LoadsFormat
from epbackend.placement.formats.file import BROKEN, MAX_BINARY_BYTES, ZIP, File, check_values, first_line
from epbackend.placement.loads import Loads

MAX_PICKLE_BYTES = 1 << 20
NAMING = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}
"""The opcodes that name something to import; torch.save writes the first one only."""
HARMLESS = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}


def _read(file: File) -> Loads:
    file.check_size(MAX_BINARY_BYTES)
    try:
        _check_archive(file)
    except BROKEN as error:
        raise ConfigError(f"is truncated or no recording of torch.save: {first_line(error)}") from None
    count: Any = _load(file).get("logical_count")
    if getattr(count, "ndim", None) not in (2, 3):
        raise ConfigError("logical_count: is missing; record with --expert-distribution-recorder-mode stat")
    check_values(tuple(count.shape))  # a tensor of few bytes may have any shape, by strides of 0
    steps = count if count.ndim == 3 else count[None]
    try:
        # Added up as they are stored, counts of half precision would lose tokens.
        total_YE = steps.double().sum(dim=0).numpy()
    except BROKEN as error:
        raise ConfigError(f"logical_count: is {count.dtype}, not counts: {first_line(error)}") from None
    return Loads.of(total_YE, [file.name])


def _check_archive(file: File) -> None:
    """Raises ConfigError for an archive that unpacks to more than itself, or whose pickle names more than tensors."""
    with zipfile.ZipFile(file.path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ConfigError("is a compressed archive, which torch.save never writes; it is not unpacked")
        if sum(member.file_size for member in members) > file.size:
            raise ConfigError("claims to hold more bytes than it has; it is not unpacked")
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise ConfigError("has no data.pkl of a sensible size; record with a torch of 1.6 or newer")
        content = archive.read(pickles[0])
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in NAMING and not (opcode.name == "GLOBAL" and _is_harmless(str(argument))):
            raise ConfigError(
                f"its pickle names {str(argument)[:60]!r}, which a recording of counts does not need: not loaded"
            )


def _is_harmless(name: str) -> bool:
    return name in HARMLESS or (name.startswith("torch ") and name.endswith("Storage"))


def _load(file: File) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise UnavailableError(
            "needs torch to be read; install it, or save the counts as npy where it is"
        ) from None
    try:
        content = torch.load(file.path, map_location="cpu", weights_only=True, mmap=True)
    except BROKEN as error:
        raise ConfigError(f"is damaged: {first_line(error)}") from None
    return content if isinstance(content, dict) else {}


LOADS = LoadsFormat(
    "sglang-pt",
    lambda file: file.kind == ZIP,
    _read,
    rank=lambda file: _load(file).get("rank"),
)

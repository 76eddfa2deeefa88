"""A checkpoint: what its config.json says, and whether its files are there and whole.

Reads no weight: of a safetensors file its header, which says what it holds and how long it must be. Imports no torch:
what is wrong is said before anything starts.
"""

from __future__ import annotations

import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epbackend.errors import UnavailableError

EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""The names under which the model families state their number of experts."""
SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
    "tokenization_*.py",
)
"""One of these holds a tokenizer, whatever its kind."""
LFS_POINTER = b"version https://git-lfs"
ZIP = b"PK\x03\x04"
"""How a file of torch.save begins."""
LONGEST_HEADER = 100_000_000
"""Of a safetensors file, in bytes; the library refuses more."""
QUANTIZED_TYPES = {"F8_E4M3", "F8_E5M2", "I8", "U8"}
SHOWN = 4
"""Names that an error lists before it only counts."""


def read_model_config(path: Path) -> dict[str, Any]:
    """The model's config.json. Raises UnavailableError where there is no such model."""
    file = path / "config.json"
    if not path.exists():
        raise UnavailableError(
            f"there is no model at {path}: give a directory with config.json and its weights"
        )
    if not file.is_file():
        raise UnavailableError(f"{path} is not a model directory: it has no config.json")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnavailableError(f"{file} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UnavailableError(f"{file} does not hold an object")
    return settings


def expert_count(settings: Mapping[str, Any]) -> int | None:
    """Routed experts of a model from its config.json; None for a dense model."""
    count = _said(settings, *EXPERT_COUNTS)
    return int(count) if count else None


def layer_count(settings: Mapping[str, Any]) -> int | None:
    """Layers of a model, dense ones too, from its config.json; None where it does not say."""
    count = _said(settings, "num_hidden_layers")
    return int(count) if count else None


def _said(settings: Mapping[str, Any], *names: str) -> Any:
    """What a config.json says under one of these names, at its top or of its text model; None where it says nothing."""
    levels = (settings, settings.get("text_config") or {})
    return next((level[name] for level in levels for name in names if level.get(name)), None)


def dense_layers(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers of a model that have no experts, by what the families say in config.json; none where none does."""
    text = settings.get("text_config") or settings
    layers = range(layer_count(settings) or 0)
    first = text.get("first_k_dense_replace") or 0
    step = text.get("decoder_sparse_step") or text.get("interleave_moe_layer_step") or 1
    every, alone = text.get("moe_layer_freq") or 1, set(text.get("mlp_only_layers") or ())
    if kinds := text.get("mlp_layer_types"):
        return tuple(layer for layer, kind in zip(layers, kinds, strict=False) if kind == "dense")
    if sparse := text.get("moe_layers"):  # of Llama 4
        return tuple(sorted(set(layers) - set(sparse)))
    if isinstance(every, list):  # a flag for each layer
        return tuple(layer for layer, sparse in zip(layers, every, strict=False) if not sparse)
    return tuple(
        layer for layer in layers if layer < first or layer % every or (layer + 1) % step or layer in alone
    )


def expert_width(text: Mapping[str, Any]) -> int | None:
    """The intermediate size of an expert, from a config.json or its text_config; None where it does not say."""
    return text.get("moe_intermediate_size") or text.get("intermediate_size")


def quantization(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json; None where weights are as they were trained."""
    return _said(settings, "quantization_config")


def check_checkpoint(path: str, *, weights: bool = True) -> None:
    """Raises UnavailableError, naming the file, where a checkpoint in the directory `path` cannot be loaded.

    That is: no weights, or a file of them that is missing, cut off, empty or a Git LFS pointer; tensors that the index
    promises and no file has; experts of which tensors are missing; quantized weights of which config.json says nothing;
    no tokenizer. `weights` False: they come later, from elsewhere.
    """
    folder = Path(path)
    settings = read_model_config(folder)
    _check_tokenizer(folder)
    if not weights:
        return
    types = _check_safetensors(folder)
    if types is None:
        _check_pickled(folder)
        return
    _check_experts(types, settings, path)
    if quantization(settings) is None and (odd := [name for name in types if types[name] in QUANTIZED_TYPES]):
        raise UnavailableError(
            f"{path}: config.json has no quantization_config, but {listed(odd)} are stored as {types[odd[0]]}; "
            "use the config.json that belongs to these weights"
        )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    dtype: str
    """In the words of safetensors: F32, BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    start: int
    """Its first byte, counted from the end of the header."""
    end: int
    """The byte after its last one."""


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    text: str
    """JSON as it stands in the file, with the spaces that fill it up."""
    tensors: Mapping[str, StoredTensor]

    @property
    def length(self) -> int:
        """Bytes of the text; 8 more come before it, and the tensors after it."""
        return len(self.text.encode())


def safetensors_header(file: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        UnavailableError: the file is not of that form, or not as long as its header says.
    """
    size = _size(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8 or LFS_POINTER.startswith(start):
            raise UnavailableError(_too_short(file, size))
        (length,) = struct.unpack("<Q", start)
        if length > LONGEST_HEADER:
            raise UnavailableError(f"{file} is no safetensors file; download it again")
        header = stream.read(length)
    if len(header) < length:
        raise UnavailableError(f"{file} is cut off: it has {size:,} bytes; download it again")
    try:
        text = header.decode()
        tensors = {
            name: StoredTensor(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in json.loads(text).items()
            if name != "__metadata__"
        }
        needed = 8 + length + max((tensor.end for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UnavailableError(f"{file} is no safetensors file; download it again") from None
    if size != needed:
        how = "is cut off" if size < needed else "is too long"
        raise UnavailableError(
            f"{file} {how}: it has {size:,} bytes, its header says {needed:,}; download it again"
        )
    return Header(text, tensors)


def safetensors_types(file: Path) -> dict[str, str]:
    """tensor -> its type, from the header of a safetensors file; raises as `safetensors_header` does."""
    return {name: tensor.dtype for name, tensor in safetensors_header(file).tensors.items()}


def _check_safetensors(folder: Path) -> dict[str, str] | None:
    """Types of all tensors; None for a checkpoint of another form. In the order in which LMDeploy looks."""
    if (folder / SAFETENSORS).is_file():
        return safetensors_types(folder / SAFETENSORS)
    if not (folder / (SAFETENSORS + INDEX)).is_file():
        return None
    types: dict[str, str] = {}
    for file, promised in shards(folder / (SAFETENSORS + INDEX)).items():
        found = safetensors_types(folder / file)
        if missing := [name for name in promised if name not in found]:
            raise UnavailableError(
                f"{folder / file} lacks {listed(missing)}, which {SAFETENSORS + INDEX} promises; download both again"
            )
        types |= found
    return types


def _check_pickled(folder: Path) -> None:
    if (folder / PICKLED).is_file():
        files: Iterable[str] = [PICKLED]
    elif (folder / (PICKLED + INDEX)).is_file():
        files = shards(folder / (PICKLED + INDEX))
    else:
        raise UnavailableError(
            f"{folder} has no weights: LMDeploy looks for {SAFETENSORS}, {SAFETENSORS + INDEX}, {PICKLED} or "
            f"{PICKLED + INDEX}"
        )
    for file in files:
        size = _size(folder / file)
        with (folder / file).open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
        if size < len(LFS_POINTER) or start == LFS_POINTER:
            raise UnavailableError(_too_short(folder / file, size))
        if start.startswith(ZIP):
            with (folder / file).open("rb") as stream:
                stream.seek(-min(size, 1 << 16), os.SEEK_END)
                if b"PK\x05\x06" not in stream.read():  # the directory, at the very end
                    raise UnavailableError(
                        f"{folder / file} is cut off: it has {size:,} bytes; download it again"
                    )


def shards(index: Path) -> dict[str, list[str]]:
    """file -> the tensors that the index promises in it."""
    promised: defaultdict[str, list[str]] = defaultdict(list)
    try:
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            promised[file].append(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnavailableError(f"{index} is no index: it must map tensors to files (weight_map)") from None
    if missing := [file for file in promised if not (index.parent / file).is_file()]:
        raise UnavailableError(
            f"{index.parent} lacks {listed(missing)} of the {len(promised)} files in {index.name}; download them"
        )
    return dict(sorted(promised.items()))


def _check_experts(names: Iterable[str], settings: Mapping[str, Any], path: str) -> None:
    """Every expert of a layer has tensors of the same names, and none is left out.

    Where experts are stored one by one; forms that stack them are left to LMDeploy.
    """
    experts = expert_count(settings) or 0
    parts: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        layer, experts_, rest = name.rpartition(".experts.")
        expert, dot, part = rest.partition(".")
        if experts_ and dot and expert.isdecimal():
            parts[layer][expert].add(part)
    for layer, of_expert in parts.items():
        whole = set().union(*of_expert.values())
        if lacking := [str(each) for each in range(experts) if of_expert.get(str(each)) != whole]:
            missing = sorted(whole - of_expert.get(lacking[0], set()))
            raise UnavailableError(
                f"{path}: {layer} lacks {listed(missing)} of experts {listed(lacking)}, and config.json says "
                f"{experts} experts; download the checkpoint again"
            )


def _check_tokenizer(folder: Path) -> None:
    found = [file for pattern in TOKENIZERS for file in folder.glob(pattern)]
    if not found:
        raise UnavailableError(f"{folder} has no tokenizer: it lacks tokenizer.json, or one of another kind")
    for file in found:
        if file.stat().st_size == 0:
            raise UnavailableError(f"{file} is empty; download it again")
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UnavailableError(_too_short(file, file.stat().st_size))


def _size(file: Path) -> int:
    if not os.access(file, os.R_OK):
        raise UnavailableError(f"{file} cannot be read: look at its permissions")
    return file.stat().st_size


def _too_short(file: Path, size: int) -> str:
    pointer = size and file.read_bytes()[: len(LFS_POINTER)] == LFS_POINTER
    what = "is a pointer of Git LFS, not the file itself: run git lfs pull" if pointer else "is cut off"
    return f"{file} {what} ({size:,} bytes)"


def listed(names: Iterable[str]) -> str:
    """The first SHOWN names; more are counted."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

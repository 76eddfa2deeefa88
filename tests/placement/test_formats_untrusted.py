"""Broken, truncated and hostile files: one clear error each, nothing run, no memory taken for what a header claims."""

import contextlib
import json
import os
import pickle
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement import plan
from epbackend.placement.formats import (
    LOADS,
    PLACEMENTS,
    ReadOptions,
    read,
    read_loads,
    read_placement,
    write,
)
from epbackend.placement.formats.pairs import read_pairs, write_pairs
from epbackend.placement.loads import Loads
from epbackend.placement.pairs import Pairs
from epbackend.placement.placement import Placement

MOST_MEMORY = 64 << 20
"""Far less than any of the files here asks for."""


@pytest.fixture
def refused(tmp_path):
    """Reads a file that must be refused in little memory; gives the message."""

    def check(content, reader=read_loads):
        path = tmp_path / "file"
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        tracemalloc.start()
        try:
            with pytest.raises(ConfigError) as caught:
                reader(path)
            assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
        finally:
            tracemalloc.stop()
        assert str(caught.value).startswith(f"{path}: ")
        return str(caught.value)

    return check


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("", "is empty"),
        (" \n", "is empty"),
        ("{", "truncated or broken JSON"),
        ('{"logical_count": [[1, 2], [3', "truncated or broken JSON"),
        ("[" * 100_000, "truncated or broken JSON"),
        ("{}", "JSON of none of these formats: sglang, sglang-pt, lmdeploy"),
        ('{"logical_count": 3}', r"logical_count: must be \[layers\]\[experts\]"),
        ('{"logical_count": [1, 2]}', "but has 1 levels of lists"),
        ('{"logical_count": [[[[1]]]]}', "but has 4 levels of lists"),
        ('{"logical_count": [[1, 2], [3]]}', "equally long"),
        ('{"logical_count": [[]]}', "none empty"),
        ('{"logical_count": [[1, "2"]]}', "of numbers, but holds '2'"),
        ('{"logical_count": [[1, null]]}', "of numbers, but holds 'None'"),
        ('{"logical_count": [[1, true]]}', "of numbers, but holds 'True'"),
        ('{"logical_count": [[1, [2]]]}', "of numbers, but holds"),
        ('{"logical_count": [[1, NaN]]}', "expert 1 of layer 0 in file is not a finite number"),
        ('{"logical_count": [[1, 1e999]]}', "is not a finite number"),
        ('{"logical_count": [[1, -1]]}', "is negative"),
        ('{"logical_count": [[1' + "0" * 400 + "]]}", "a number too large"),
        ('{"logical_count": [[1' + "0" * 5000 + "]]}", "truncated or broken JSON"),
        ('{"logical_count": [[1, 2]], "windows": ["a"]}', "windows: must be the names"),
        ('{"logical_count": [[[1, 2]]], "windows": ["a", "b"]}', "1 windows have 2 names"),
        ("[[1, 2], [3]]", "statistics: must be"),
        ("1,2\n3\n", "line 2: has 1 numbers, the first one has 2"),
        ("1,x\n", "line 1: 'x' is no number"),
        ("some text\n", "line 1: 'some text' is no number"),
        (",,\n", "has no number in any line"),
        ("1,2\n3," + "4" * 140_000, "line 2: is no csv: field larger than field limit"),
        ("1,2\r3,4\n", "line 1: is no csv: new-line character"),
        ("layer,expert,tokens\n", "has a header and no counts"),
        ("layer,expert,tokens\n0,0\n", "line 2: has 2 fields, the header 3"),
        ("layer,expert,tokens\n0,0,1\n0,0,1\n", "layer 0, expert 0: is there more than once"),
        ("layer,expert,tokens\n-1,0,1\n", "line 2: layer -1, expert 0: must be 0 or more"),
        ("layer,expert,tokens\n0,1.5,1\n", "line 2: '1.5' is no number"),
        ("layer,expert,tokens\n999999,999999,1\n", "more than the 67,108,864 numbers"),
        ("layer,expert,tokens\n0,99999999999999999999,1\n", "must be 0 or more, and sensible"),
        ("1,nan\n", "is not a finite number"),
        (b"\xff\xfe\x00\x01", "neither text nor a known binary format"),
        (pickle.dumps({"logical_count": [[1]]}), "is a pickle, which may run any code"),
        (b"PK\x03\x04 and nothing more", "truncated or no recording of torch.save"),
        (b"\x93NUMPY\x01\x00", "broken npy header"),
        (b"\x93NUMPY\x09\x00", "broken npy header|npy of version"),
    ],
)
def test_broken_loads_are_refused_with_the_reason(refused, content, message):
    assert re.search(message, refused(content))


def npy_header(shape, dtype="<f8"):
    """Of an array; the shape may be a text."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy_header((10**9, 61, 256)), "more than the 67,108,864 numbers"),
        (npy_header((2**62, 2**62)), "more than the 67,108,864 numbers"),
        (npy_header((61, 256)), "is truncated: a float64 array"),
        (npy_header((1, 2)) + b"\0" * 17, "is truncated"),
        (npy_header((2, 2), "|O"), "pickled objects are never loaded"),
        (npy_header((2,)) + b"\0" * 16, r"shape: \(2,\) is neither"),
        (npy_header((0, 4)), "none of them 0"),
        (npy_header((-2, -2)) + b"\0" * 32, r"is truncated: .* shape \(-2, -2\)"),
        (npy_header("(2, 3"), "broken npy header"),
        (npy_header("{[]: 1}"), "broken npy header"),
    ],
)
def test_broken_npy_is_refused_with_the_reason(refused, content, message):
    assert re.search(message, refused(content))


def test_a_large_file_is_not_read(tmp_path, refused):
    for head in (b'{"logical_count":', b"1,2\n", npy_header((2, 2)), b"PK\x03\x04"):
        with (tmp_path / "file").open("wb") as file:
            file.write(head)
            file.truncate(1 << 31)  # sparse: takes no room
        assert "2048 MiB, more than the" in refused(None)


@pytest.mark.parametrize(
    ("path", "message"), [("a" * 300, "cannot be read"), ("a\0b", "is no path of a file")]
)
def test_what_cannot_be_a_path_is_refused(path, message):
    with pytest.raises(ConfigError, match=message):
        read_loads(path)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ConfigError, match="is no regular file"):
            read_loads(path)


def recording(tmp_path, content):
    torch = pytest.importorskip("torch")
    torch.save(content(torch), tmp_path / "file")
    return (tmp_path / "file").read_bytes()


class Opens:
    """Would make a file when unpickled."""

    def __reduce__(self):
        return open, ("made-by-a-pickle", "w")


def test_code_in_a_recording_is_not_run(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = recording(tmp_path, lambda torch: {"logical_count": torch.ones(2, 2), "more": Opens()})
    assert "which a recording of counts does not need: not loaded" in refused(content)
    assert not (tmp_path / "made-by-a-pickle").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda torch: {"logical_count": torch.zeros(1).expand(10**9, 61, 256)}, "more than the 67,108,864"),
        (lambda torch: {"logical_count": torch.zeros(4)}, "logical_count: is missing; record with"),
        (lambda torch: {"records": []}, "logical_count: is missing"),
        (lambda torch: torch.zeros(2, 2), "logical_count: is missing"),
        (lambda torch: {"logical_count": torch.full((2, 2), -1)}, "is negative"),
        (lambda torch: {"logical_count": torch.nn.Parameter(torch.ones(2, 2))}, "names"),
    ],
)  # fmt: skip
def test_recordings_without_counts_are_refused(tmp_path, refused, content, message):
    assert message in refused(recording(tmp_path, content))


def test_truncated_recordings_are_refused(tmp_path, refused):
    content = recording(tmp_path, lambda torch: {"logical_count": torch.ones(100, 100)})
    for end in (30, 200, len(content) // 2, len(content) - 10):
        assert "truncated" in refused(content[:end])


def test_a_zip_bomb_is_not_unpacked(tmp_path, refused):
    with zipfile.ZipFile(tmp_path / "file", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * (1 << 20))
    assert "compressed archive" in refused(None)


def placement(**fields):
    whole = json.loads(Placement.even(layers=1, experts=2, ranks=2).to_json())
    return json.dumps({**whole, **fields})


def expert_map(devices, **fields):
    layer = {"layer_id": 0, "device_list": [{"device_expert": held} for held in devices]}
    return json.dumps({"moe_layer_count": 1, "layer_list": [layer], **fields})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (placement(experts=10**12), "no slot holds expert 2"),
        (placement(version=2), "version: 2 is unknown"),
        (placement(layers=[[[0], [10**30]]]), "numbered 0 to 1"),
        ('{"physical_to_logical_map": [[0, 1.5]]}', "must hold experts, whole numbers"),
        ('{"physical_to_logical_map": [[0, -1]]}', "must hold experts, whole numbers"),
        ('{"physical_to_logical_map": [[0, NaN]]}', "must hold experts, whole numbers"),
        ('{"physical_to_logical_map": [[0, 1000000000000]]}', "below the 2 slots"),
        ('{"physical_to_logical_map": [[0, 1], [0, 0]]}', "layer 1: layout: no slot holds expert 1"),
        (expert_map([[0], [10**12]]), r"layer_list\[0\]: expert 1000000000000 of 2 slots"),
        (expert_map([[0], ["1"]]), r"device_list\[1\].device_expert: must be a list of expert numbers"),
        (expert_map([[0], [-1]]), "numbered 0 to"),
        (expert_map([[0], [1]], moe_layer_count=2), "moe_layer_count: 2, but layer_list has 1 entries"),
        (expert_map([[0], [1]], layer_list=[]), "layer_list: must be a list of objects"),
        (expert_map([[0], [1]], layer_list=[{}]), r"layer_list\[0\].device_list: must be a list of objects"),
        (
            '{"a": 1}',
            "JSON of none of these formats: epbackend, sglang, vllm-ascend, mindie, omni, lmdeploy, sglang-pt",
        ),
    ],
)
def test_placements(refused, content, message):
    assert re.search(message, refused(content, lambda path: read_placement(path, ReadOptions(ranks=2))))


def test_a_pattern_that_leaves_an_expert_out_is_refused(tmp_path):
    pattern_RYE = np.zeros((2, 1, 3), dtype=np.int8)
    pattern_RYE[0, 0, 0] = pattern_RYE[1, 0, 1] = 1
    np.save(tmp_path / "pattern.npy", pattern_RYE)
    with pytest.raises(ConfigError, match="layer 0: layout: no slot holds expert 2"):
        read(tmp_path / "pattern.npy", "omni")


def test_slots_that_lmdeploy_cannot_fill_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("[[1, 2, 3]]")
    for slots in (2, 5):
        with pytest.raises(
            ConfigError, match=f"slots: {slots} must be a multiple of the 2 ranks, from 3 to 6"
        ):
            read(tmp_path / "a.json", options=ReadOptions(ranks=2, slots=slots))


NPUS = {"model_gen_config.json": '{"num_moe_layers": 1, "num_of_experts": 2}', "decode_0.csv": "1,2\n"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"decode_0.csv": ""}, "decode_0.csv: has no number in any line"),
        ({"decode_0.csv": "\n\n"}, "decode_0.csv: has no number in any line"),
        ({"prefill_0.csv": "1,2\n"}, "of NPUs 0, 0; there must be one of each"),
    ],
)
def test_hot_spots_that_say_nothing_or_twice_are_refused(tmp_path, files, message):
    for name, content in {**NPUS, **files}.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_loads(tmp_path)


@dataclass(frozen=True)
class GoodFile:
    path: Path
    content: bytes
    read: Callable[[Path], object]
    given: Path
    """What the reader is given: the file, or the folder that it is in."""


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    """One of each format."""
    folder = tmp_path_factory.mktemp("good")
    loads = Loads.of(np.arange(8).reshape(2, 4) ** 2, numbering="original")
    sized = ReadOptions(ranks=2, slots=4)
    files = []

    def add(name, reader, given=None):
        path = folder / name
        files.append(GoodFile(path, path.read_bytes(), reader, given or path))

    for name in (name for name, form in LOADS.items() if form.write):
        write(loads, folder / f"loads-{name}", name)
        add(f"loads-{name}", read_loads)
    for name in PLACEMENTS:
        write(plan(loads, ranks=2), folder / f"placement-{name}", name)
        add(f"placement-{name}", partial(read_placement, options=sized))
    for name in ("pairs.npz", "pairs.json"):
        write_pairs(Pairs(np.ones((2, 4, 4)), numbering="original"), folder / name)
        add(name, read_pairs)
    for name, content in NPUS.items():
        (folder / name).write_text(content)
        add(name, read_loads, folder)
    with contextlib.suppress(ImportError):
        import torch

        torch.save({"logical_count": torch.ones(3, 2, 4), "rank": 0}, folder / "recorded.pt")
        add("recorded.pt", read_loads)
    return files


@settings(max_examples=500, deadline=None)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:Reading `.npy`")
def test_a_damaged_file_is_read_or_refused_by_name(good_files, data):
    """A byte is another one, or the end is missing."""
    file = data.draw(st.sampled_from(good_files))
    at = data.draw(st.integers(0, len(file.content) - 1))
    byte = data.draw(st.none() | st.integers(0, 255) | st.sampled_from(b"[](){},:-'0 \n\r"))
    rest = b"" if byte is None else bytes([byte]) + file.content[at + 1 :]
    file.path.write_bytes(file.content[:at] + rest)
    said = ""
    try:
        file.read(file.given)
    except ConfigError as error:
        said = str(error)
    finally:
        file.path.write_bytes(file.content)
    assert re.fullmatch(rf"({re.escape(str(file.given))}: .+)?", said), "in one line"


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'sglnag' is no format, did you mean 'sglang'"):
        read(tmp_path / "a.json", "sglnag")

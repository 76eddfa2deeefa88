"""Whatever the arguments, the commands that need no engine end with an answer or a line that says what is wrong."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from epbackend.cli import app
from epbackend.names import PLANNERS, SPLITS
from epbackend.placement.formats import LOADS, PLACEMENTS, write
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Placement

COUNTS_YE = np.arange(24).reshape(3, 8) % 7
WINDOWS = {
    "loads": [COUNTS_YE],
    "windows": [COUNTS_YE, COUNTS_YE[:, ::-1]],
    "zeros": [COUNTS_YE * 0],
    "dense": [COUNTS_YE * [[0], [1], [1]]],
    "huge": [COUNTS_YE * 2**40],
    "one": [np.array([[3]])],
}
numbers = st.one_of(st.integers(-3, 12), st.sampled_from([0, 64, 2**31, 10**12]))
texts = st.sampled_from(
    ["", "x", "-1", "1.5", "nan", "inf", "1e400", "\u00fc", "0-2", "ring", "{", "[1]", "tokens"]
)
anything = st.one_of(numbers.map(str), texts)
objectives = st.one_of(
    st.sampled_from(["tokens", "activated", "activated:8", "activated:0", "placement.json"]), texts
)
OPTIONS = {
    "plan": {
        "--ranks": anything, "--slots": anything, "--algorithm": st.sampled_from([*PLANNERS.built_in, "", "x"]),
        "--objective": objectives, "--node-size": anything, "--budget": anything,
        "--search-ms": st.one_of(st.sampled_from(["0", "1", "-1", "nan", "inf"]), texts), "--seed": anything,
        "--current": st.sampled_from(["placement.json", "loads.json", "none.json"]),
        "--option": st.sampled_from(["topology=ring", "topology=9", "groups=0", "x", "=", "ranks=1", "a=b"]),
        "--json": st.none(),
    },
    "compare": {
        "--ranks": anything, "--slots": anything, "--objective": objectives, "--node-size": anything,
        "--search-ms": st.sampled_from(["0", "1", "-1", "nan", "inf"]), "--seed": anything, "--json": st.none(),
    },
    "simulate": {
        "--ranks": anything, "--slots": anything, "--model": st.sampled_from(["deepseek-v3", "kimi-k2", "", "x"]),
        "--tokens": anything, "--steps": anything, "--cycles": st.one_of(st.sampled_from(["0", "1", "3"]), texts),
        "--split": st.sampled_from([*SPLITS, "", "x"]), "--node-size": anything, "--threshold": texts,
        "--max-slots": anything, "--max-bytes": anything, "--json": st.none(),
    },
    "show": {"--ranks": anything},
    "convert": {
        "--to": st.one_of(st.sampled_from([*LOADS, *PLACEMENTS]), texts),
        "--from": st.one_of(st.sampled_from([*LOADS, *PLACEMENTS]), texts),
        "--ranks": anything, "--slots": anything, "--dense-layers": anything,
    },
}  # fmt: skip
FILES = [*(f"{name}.json" for name in WINDOWS), "placement.json", "none.json", "."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, windows in WINDOWS.items():
        write(
            Loads.of(windows, [str(index) for index in range(len(windows))]),
            folder / f"{name}.json",
            "sglang",
        )
    write(Placement.even(3, 8, 2, 10), folder / "placement.json", "epbackend")
    return folder


@st.composite
def calls(draw):
    """A command with files and options."""
    command = draw(st.sampled_from(list(OPTIONS)))
    files = draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=3))
    chosen = draw(st.dictionaries(st.sampled_from(list(OPTIONS[command])), st.none(), max_size=5))
    if draw(st.booleans()):  # mostly what can work, so that it is the rest that fails
        chosen |= {"--ranks": None}
        files = [name for name in files if name in ("loads.json", "zeros.json")] or ["loads.json"]
    words = []
    for option in chosen:
        value = draw(OPTIONS[command][option])
        words += [option] if value is None else [f"{option}={value}"]
    if command == "convert":
        files = [files[0], "out/converted"]
    if command == "show" and draw(st.booleans()):
        files = ["placement.json", *files]
    return command, files, words


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(call=calls())
def test_no_command_ends_in_a_traceback(folder, call):
    command, files, words = call
    paths = [str(folder / name) for name in files]
    plot = ["--plot", str(folder / "out" / "plot.png")] if command in ("compare", "show", "simulate") else []
    options = [word.replace("placement.json", str(folder / "placement.json")) for word in words]
    result = CliRunner().invoke(app, [command, *paths, *options, *plot])
    assert result.exception is None or isinstance(result.exception, SystemExit), (call, result.exception)
    if result.exit_code == 0 and "--json" in words:
        json.loads(result.stdout)
    assert result.exit_code in (0, 2), result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "zeros.json", "--ranks", "2"], "loads: no expert has had a token"),
        (["compare", "loads.json", "--ranks", "0"], "ranks: .*at least 1"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(folder, words, said):
    command, file, *options = words
    result = CliRunner().invoke(app, [command, str(folder / file), *options, "--plot", str(folder / "p.png")])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1

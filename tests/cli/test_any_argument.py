"""Whatever the arguments, commands end with an answer or a line that says what is wrong; no engine starts here."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from epbackend.cli import app
from epbackend.errors import ConfigError
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
        "--option": st.sampled_from(["topology=ring", "topology=9", "groups=0", "x", "=", "ranks=1", "a=b", "loads=x"]),
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
    "show": {"--ranks": anything, "--dense-layers": anything},
    "convert": {
        "--to": st.one_of(st.sampled_from([*LOADS, *PLACEMENTS]), texts),
        "--from": st.one_of(st.sampled_from([*LOADS, *PLACEMENTS]), texts),
        "--ranks": anything, "--slots": anything, "--dense-layers": anything,
    },
}  # fmt: skip
configs = st.sampled_from(
    ["good.yaml", "list.json", "mindie.json", "bytes.yaml", "cut.yaml", ".", "none.yaml"]
)
settings_of_engine = st.one_of(
    st.sampled_from(
        [
            "engine.dtype=float32", "engine=1", "engine.x=1", "ep_size=[", "placement.file=none", "placement.loads=.",
            "engine.cache_gb=nan", "engine.cache_gb=-1", "timeout_s=inf", "balance.on=true", "engine.extra={a: 1}",
            "engine.threads_per_rank=0", "..=1", "device={}", "engine.session_len=1e30", "dispatcher=[]",
            "placement.rank_speed=[1,2]",
        ]
    ),
    texts,
)  # fmt: skip
words = st.one_of(
    anything, st.sampled_from(["auto", "cpu", "cuda", "{prefill: 2, decode: 1}", "mc2,alltoall"])
)
ENGINE = {
    "--config": configs, "--device": words, "--ep-size": anything, "--ep-level": words, "--tp": anything,
    "--dp": anything, "--dispatcher": words, "--dtype": words, "--session-len": anything,
    "--max-batch-size": anything, "--log-level": words, "--set": settings_of_engine,
}  # fmt: skip
STARTING = {
    "generate": {"--max-new-tokens": anything, "--temperature": anything, "--json": st.none()},
    "chat": {"--max-new-tokens": anything, "--chat-template": words},
    "serve": {
        "--port": anything, "--host": texts, "--root-path": words, "--tool-call-parser": words,
        "--api-key-file": configs, "--reasoning-parser": words, "--chat-template": st.one_of(words, configs),
        "--max-log-len": anything,
        "--drain-seconds": anything, "--restart": anything, "--record": configs, "--ssl-keyfile": configs,
        "--ssl-certfile": configs, "--max-concurrent-requests": anything,
    },
    "record": {"--prompts": configs, "--out": configs, "--pairs": configs, "--max-new-tokens": anything},
    "calibrate": {"--out": configs, "--tokens": st.one_of(anything, st.sampled_from(["1,2", "2,1", ","]))},
    "renumber": {"--out": configs, "--loads": configs, "--ranks": anything, "--nodes": anything, "--undo": st.none()},
    "tune": {"--ep-size": anything, "--out": configs, "--form": words},
    "top": {"--interval": anything, "--once": st.none(), "--api-key": words},
    "config": {"--json": st.none()},
}  # fmt: skip
"""Commands that start an engine, or look at a model or a config -> their own options."""
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


@st.composite
def starts(draw):
    """A command of STARTING, with up to four options."""
    command = draw(st.sampled_from(list(STARTING)))
    options = STARTING[command] | (
        ENGINE if command in ("generate", "chat", "serve", "record", "calibrate") else {}
    )
    chosen = draw(st.lists(st.sampled_from(list(options)), max_size=4, unique=True))
    given = [(option, draw(options[option])) for option in chosen]
    flags = [option if value is None else f"{option}={value}" for option, value in given]
    models = st.sampled_from([*["tiny-qwen3-moe"] * 4, "none", ".", "good.yaml", ""])
    if command == "config":
        return [command, draw(st.sampled_from(["check", "show", "x"])), draw(configs), *flags]
    if command == "top":
        return [
            command,
            draw(st.sampled_from(["http://127.0.0.1:9", "http://", "x", "-1", "99999999"])),
            *flags,
        ]
    return [command, draw(models), *(["hello"] if command == "generate" else []), *flags]


@pytest.mark.slow
def test_no_command_that_starts_an_engine_ends_in_a_traceback(tmp_path, monkeypatch):
    """All that is checked before an engine starts; where nothing is wrong, it is stopped there."""

    def stop(*_):
        raise ConfigError("nothing is wrong")

    monkeypatch.setattr("epbackend.engines.lmdeploy.balance.starting_placement", stop)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text("device: cpu\nep_size: 2\n")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "mindie.json").write_text('{"BackendConfig": {"ModelDeployConfig": {"ModelConfig": [{}]}}}')
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "cut.yaml").write_text("a: [1")

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(words=starts())
    def call(words):
        result = CliRunner().invoke(app, words)
        assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
        assert result.exit_code in (0, 2), (words, result.output)
        assert result.output.strip(), words

    call()


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

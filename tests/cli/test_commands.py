"""The commands as a person runs them, with real engines.

In processes of their own, as far as the process matters: what it prints beside its ranks, Ctrl-C, what it leaves. The
others run in this process, which has loaded what each would load first, for 5 s of a core.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from epbackend.cli import main
from epbackend.cli.record import read_prompts
from epbackend.placement.formats.pairs import read_pairs
from epbackend.placement.objectives import read_table
from epbackend.placement.speeds import parse_speeds
from tests.helpers.patience import PATIENCE_S
from tests.helpers.pictures import drawn_share
from tests.helpers.processes import throttled_rank
from tests.helpers.ranks import free_port

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("forked_ranks")]

EPBACKEND = str(Path(sys.executable).with_name("epbackend"))
TWO_RANKS = {
    "device": "cpu",
    "ep_size": 2,
    "engine": {"dtype": "float32", "session_len": 256, "cache_gb": 0.05},
}


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [EPBACKEND, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Like `run`, in this process; `typed` is what a person types."""

    def run_here(
        *arguments: object, cwd: Path | None = None, typed: str = ""
    ) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.argv", ["epbackend", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        if cwd:
            monkeypatch.chdir(cwd)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code or 0, said.out, said.err)

    heeded = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield run_here
    for number, handler in heeded.items():
        signal.signal(number, handler)


def left_memory() -> set[str]:
    """Segments of shared memory that no process has mapped: those of other programs at work do not count."""
    mapped = ""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            mapped += (process / "maps").read_text()
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_") and name not in mapped}


@pytest.fixture
def config_file(tmp_path):
    def write(**settings):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**TWO_RANKS, **settings}))
        return path

    return write


def test_demo_gives_the_tokens_of_transformers_and_draws_pictures(tmp_path, run_here):
    before = left_memory()
    result = run_here("demo", "--json", "--max-new-tokens", 12, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["tokens_identical"] is True
    assert (said["ranks"], said["ep_level"], said["dispatcher"]) == (2, 2, "alltoall")
    assert len(said["answers"]) == 3
    assert said["seconds"] > said["start_seconds"] > 0
    placed = said["placement"]
    assert placed["tokens_identical"] is True
    assert placed["before"] == {name: said[name] for name in placed["before"]}
    assert placed["after"]["step_imbalance_mean"] < placed["before"]["step_imbalance_mean"]
    assert drawn_share(tmp_path / said["heat_map"], left=0.1, right=0.6, top=0.3, bottom=0.7) > 0.9
    assert drawn_share(tmp_path / placed["picture"], left=0.1, right=0.9, top=0.3, bottom=0.8) > 0.05
    assert len(json.loads(Path(tmp_path, placed["loads"]).read_text())["logical_count"]) == 4
    assert left_memory() <= before


@pytest.mark.slow
def test_demo_of_balance_moves_experts_and_keeps_the_tokens(tmp_path):
    before = left_memory()
    result = run("demo", "--balance", "--json", "--max-new-tokens", 10, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["tokens"] == 4 * 10 * sum(said["rounds"])
    assert said["tokens_identical"] is True
    assert said["ranks"] == 4
    assert said["migrations"] >= 3
    assert said["slots_moved"] >= said["migrations"]
    assert said["bytes_moved"] > 0
    assert said["imbalance_after"] < said["imbalance_before"]
    low, high = said["throughput_quartiles"]
    assert 0 < low <= said["throughput_ratio"] <= high
    assert said["balance"]["failed"] == 0
    assert said["step_ms"]["steps_moving"] > 0
    assert said["step_ms_without"]["steps_moving"] == 0
    assert drawn_share(tmp_path / said["picture"], left=0.1, right=0.9, top=0.2, bottom=0.8) > 0.001
    assert left_memory() <= before


def test_demo_shows_dispatcher_load_and_verdict(tmp_path, run_here):
    result = run_here(
        "demo", "--ranks", 1, "--model", "tiny-deepseek-v3", "--max-new-tokens", 4, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "replicated" in result.stdout
    assert "load of the ranks" in result.stdout
    assert "12 tokens beside Hugging Face's own generate: identical" in result.stdout


def test_generate_prints_one_object(config_file, run_here):
    result = run_here(
        "generate", "tiny-deepseek-v3", "--config", config_file(ep_level=1), "--prompt", "The", "--max-new-tokens", 5,
        "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert len(said["token_ids"]) == 5
    assert (said["device"], said["ep_size"], said["ep_level"]) == ("cpu", 2, 1)
    assert said["dispatcher"] == "replicated"
    assert len(said["expert_tokens_per_rank"]) == 2
    # 3 tokens of the prompt and 4 of the answer, 4 experts each in 3 layers: no token of the warm-up.
    assert sum(said["expert_tokens_per_rank"]) == (3 + 4) * 4 * 3
    assert (said["passes"], said["rounds"]) == (1, 1)
    assert said["tokens_per_second"] > 0


def test_generate_streams_text(config_file, run_here):
    result = run_here(
        "generate",
        "tiny-qwen3-moe",
        "-c",
        config_file(),
        "-p",
        "The state of",
        "--max-new-tokens",
        8,
        "--stream",
    )
    assert result.returncode == 0, result.stderr
    assert "load of the ranks" in result.stdout


def test_chat_answers_until_the_input_ends(config_file, run_here):
    typed = "The whale\n/new\nThe ship\n\n"
    talk = run_here("chat", "tiny-qwen3-moe", "-c", config_file(), "--max-new-tokens", 4, typed=typed)
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout.count("you:") == 4


def test_a_terminal_that_is_not_utf8_shows_what_it_can(run_here, monkeypatch, tmp_path):
    settings = tmp_path / "größe—2.yaml"
    settings.write_text("ep_size: 2\n")
    terminal = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(terminal, encoding="ascii", write_through=True))
    assert run_here("config", "check", settings).returncode == 0
    assert rb"gr\xf6\xdfe\u20142.yaml: OK" in terminal.getvalue()


def test_ctrl_c_stops_an_answer_and_then_ends_the_chat(config_file):
    talk = subprocess.Popen(
        [EPBACKEND, "chat", "tiny-qwen3-moe", "-c", str(config_file()), "--max-new-tokens", "200"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with talk:
        read_until(talk.stdout, b"you: ")
        talk.stdin.write(b"The whale\n")
        talk.stdin.flush()
        talk.stdout.read(8)  # the answer has begun
        os.killpg(talk.pid, signal.SIGINT)  # a terminal sends it to every process
        assert b"(stopped)" in read_until(talk.stdout, b"you: ")
        talk.stdin.write(b"The ship\n")
        talk.stdin.flush()
        talk.stdout.read(8)
        os.killpg(talk.pid, signal.SIGINT)
        read_until(talk.stdout, b"you: ")
        os.killpg(talk.pid, signal.SIGINT)
        assert talk.wait(timeout=PATIENCE_S) == 0


def read_until(stream, mark: bytes) -> bytes:
    """What comes up to the mark, and with it."""
    said = b""
    while not said.endswith(mark):
        piece = stream.read(1)
        assert piece, said
        said += piece
    return said


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({}, "/no/such/model", "there is no model at /no/such/model"),
        ({"ep_size": 3}, "tiny-qwen3-moe", "ep_size: 3 does not divide"),
        ({"ep_level": 3}, "tiny-qwen3-moe", "ep_level: must be 1"),
        ({"device": "cuda"}, "tiny-qwen3-moe", "cuda"),
        ({"engine": {"tp": 4, "dp": 2}}, "tiny-qwen3-moe", "tp"),
        ({"engine": {"cache_gb": 1e6}}, "tiny-qwen3-moe", "cache_gb"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(
    config_file, settings, model, message, run_here
):
    if settings.get("device") == "cuda":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
    result = run_here("generate", model, "--config", config_file(**settings), "--prompt", "x", "--json")
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param(("lines", "[INST] The whale\n\nThe ship\n"), marks=pytest.mark.slow, id="lines"),
        pytest.param(("list.json", '["The whale", "The ship"]'), id="json"),
    ],
)
def test_record_writes_the_loads_of_every_layer(config_file, tmp_path, prompts, run_here):
    file, text = prompts
    (tmp_path / file).write_text(text)
    result = run_here(
        "record", "tiny-deepseek-v3", "--config", config_file(), "--prompts", file, "--out", "loads.json",
        "--max-new-tokens", 4, "--pairs", "pairs.npz", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["loads"], said["pairs"], said["prompts"]) == ("loads.json", "pairs.npz", 2)
    counts = json.loads((tmp_path / "loads.json").read_text())["logical_count"]
    totals = [sum(layer) for layer in counts]
    assert totals[0] == 0  # a dense layer
    assert totals[1] == totals[2] == totals[3] > 0
    assert sum(totals) == sum(said["expert_tokens_per_rank"])
    pairs = read_pairs(tmp_path / "pairs.npz")
    assert pairs.loads_YE[0].sum() == 0
    assert (pairs.loads_YE[1:].sum(axis=1) == pairs.loads_YE[1].sum()).all()
    assert 0 < pairs.loads_YE[1].sum() <= totals[1]
    assert pairs.tokens_YEE[1:].sum() == pairs.topk * pairs.loads_YE[1:].sum()
    assert (pairs.loads_YE <= counts).all()


@pytest.mark.slow
def test_record_keeps_what_was_counted_where_a_prompt_cannot_be_answered(config_file, tmp_path, run_here):
    (tmp_path / "prompts").write_text("The ship\n" + "whale " * 300 + "\n")
    result = run_here(
        "record", "tiny-deepseek-v3", "--config", config_file(), "--prompts", "prompts", "--out", "loads.json",
        "--max-new-tokens", 4, "--session-len", 128, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 2
    assert "loads.json: is without 1 of 2 prompts; prompt 2, 'whale whale" in result.stderr
    assert "must be smaller than the model context length (128)" in result.stderr
    assert sum(map(sum, json.loads((tmp_path / "loads.json").read_text())["logical_count"])) > 0


def test_calibrate_times_the_experts_of_every_rank(config_file, tmp_path, run_here):
    result = run_here(
        "calibrate", "tiny-deepseek-v3", "--config", config_file(), "--out", "speeds.json", "--tokens", "1,16",
        "--batch", 64, "--json", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said.pop("out") == "speeds.json"
    assert json.loads((tmp_path / "speeds.json").read_text()) == said
    assert said["layer"] == 1  # the first with experts
    assert (len(said["rank_speed"]), max(said["rank_speed"])) == (2, 1.0)
    objective = read_table(tmp_path / "speeds.json")
    assert (objective.batch, objective.tokens_X, objective.experts_A) == (64, (1, 16), (1, 2, 4, 8, 16))
    assert objective.cost(16, 16) >= objective.cost(1, 1) > 0
    assert [len(times) for times in said["microseconds_by_rank"]] == [2, 2]


@pytest.mark.slow
def test_calibrate_finds_a_rank_that_gets_a_third_of_its_time(config_file, tmp_path, run_here):
    with throttled_rank(1, share=1 / 3):
        result = run_here(
            "calibrate", "tiny-qwen3-moe", "--config", config_file(), "--out", "speeds.json", cwd=tmp_path
        )
    assert result.returncode == 0, result.stderr
    fast, slow = parse_speeds(str(tmp_path / "speeds.json"))
    assert fast == 1.0
    assert slow < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ep-size", 1], "ep_size: 1"),
        (["--tokens", "16,1"], "tokens: '16,1' must be"),
        (["--tokens", "7"], "tokens: '7' must be"),
        (["--out", "config.json/speeds.json"], "out: config.json/speeds.json cannot be written"),
    ],
)
def test_calibrate_refuses_in_one_line(config_file, tmp_path, options, message, run_here):
    result = run_here(
        "calibrate",
        "tiny-qwen3-moe",
        "--config",
        config_file(),
        "--out",
        "speeds.json",
        *options,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "speeds.json").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("prompts", None, "cannot be read: No such file"),
        ("prompts", b"\xff", "cannot be read: 'utf-8' codec"),
        ("prompts", b"\n \n", "has none"),
        ("prompts", b'[\n  "The whale"\n]', "begins as a JSON list does: give it a name that ends in .json"),
        ("prompts.json", b"[1]", "list of texts"),
        ("prompts.json", b'"whale"', "list of texts"),
        ("prompts.json", b"[", "no JSON"),
        ("prompts.json", b"[" * 5000, "no JSON"),
    ],
)
def test_record_refuses_a_file_without_prompts(tmp_path, file, text, message, run_here):
    if text is not None:
        (tmp_path / file).write_bytes(text)
    result = run_here("record", "tiny-qwen3-moe", "--prompts", file, "--out", "loads.json", cwd=tmp_path)
    assert result.returncode == 2
    assert f"error: prompts: {file}" in result.stderr
    assert message in result.stderr


def test_lines_of_prompts_may_begin_as_they_like(tmp_path):
    (tmp_path / "prompts.txt").write_text("[INST] The whale [/INST]\n[1] The ship\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["[INST] The whale [/INST]", "[1] The ship"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("folder", "pairs: folder cannot be written"),
        ("prompts/pairs.npz", "pairs: prompts/pairs.npz cannot be written"),
        ("./loads.json", "pairs: loads.json is --out as well"),
        ("prompts", "pairs: prompts is given to --prompts as well"),
    ],
)
def test_record_refuses_pairs_that_would_be_lost_before_it_starts(
    tmp_path, config_file, pairs, message, run_here
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "prompts").write_text("The whale")
    result = run_here(
        "record", "tiny-qwen3-moe", "-c", config_file(), "--prompts", "prompts", "--out", "loads.json", "--pairs",
        pairs, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "loads.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", 600], "476"),  # its sessions have 512 tokens
        (["--balance", "--max-new-tokens", 1], "use 2 or more"),
        (["--out", "file"], "out: file/expert-load.png cannot be written"),
    ],
)
def test_demo_refuses_what_cannot_succeed(tmp_path, options, message, run_here):
    (tmp_path / "file").write_text("")
    result = run_here("demo", *options, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr


def test_doctor_lists_every_device_and_dispatcher(run_here):
    result = run_here("doctor", "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    cpu = {"usable": True, "reason": None, "no_collectives": None, "kernels": ["auto", "reference"]}
    assert said["devices"]["cpu"] == cpu
    assert {"cuda", "ascend"} <= said["devices"].keys()
    assert all(device["usable"] or device["reason"] for device in said["devices"].values())
    assert {"replicated", "allgather", "alltoall"} <= said["dispatchers"].keys()
    assert said["engine"]["usable"] is True
    assert said["packages"]["torch"]


def test_module_runs_like_the_command():
    arguments = ("config", "show", "--json")
    as_module = subprocess.run(
        [sys.executable, "-m", "epbackend", *arguments], capture_output=True, text=True
    )
    assert as_module.stdout == run(*arguments).stdout != ""


@pytest.mark.slow
def test_doctor_shows_the_dispatchers_of_a_deployment(config_file):
    said = json.loads(run("doctor", "--json", "--ep-size", 8, "--level", 2, "--dp", 8).stdout)
    for phase in ("prefill", "decode"):
        choice = said["choices"][phase]
        assert choice["name"] == "alltoall"
        assert {"replicated", "allgather", "mc2"} <= dict(choice["passed_over"]).keys()
    named = config_file(
        ep_level=2, dispatcher={"prefill": "auto", "decode": "mc2"}, engine={"max_batch_size": 8}
    )
    shown = run("doctor", "--config", named)
    assert shown.returncode == 0, shown.stderr
    assert "prefill: alltoall" in shown.stdout
    assert "decode: dispatcher mc2 is pinned but cannot be used: it needs an Ascend NPU" in shown.stdout


def wait_until_served(url: str, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=5).read()
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"no server at {url}: exit code {server.poll()}")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_and_leaves_nothing_behind(config_file, stop):
    before = left_memory()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [EPBACKEND, "serve", "tiny-qwen3-moe", "-c", str(config_file()), "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        wait_until_served(url, server)
        model = json.loads(urllib.request.urlopen(f"{url}/v1/models").read())["data"][0]["id"]
        request = {"model": model, "prompt": "The", "max_tokens": 4, "temperature": 0}
        answer = urllib.request.urlopen(
            urllib.request.Request(
                f"{url}/v1/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
            )
        )
        assert json.loads(answer.read())["usage"]["completion_tokens"] >= 4

        taken = run("serve", "tiny-qwen3-moe", "--port", port)
        assert taken.returncode == 2
        assert f"port {port}" in taken.stderr

        server.send_signal(stop)
        server.wait(timeout=PATIENCE_S)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    assert not processes_of_session(server.pid)
    assert left_memory() <= before


def processes_of_session(session: int) -> list[str]:
    """The processes that the session leader left behind, zombies aside, after a moment to go."""
    deadline = time.monotonic() + PATIENCE_S
    while (left := _stat_lines(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _stat_lines(session: int) -> list[str]:
    lines = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "stat").read_text() if entry.name.isdigit() else ""
        except OSError:
            continue
        fields = line.rpartition(")")[2].split()  # state, parent, process group, session, ...
        if fields and fields[0] != "Z" and int(fields[3]) == session:
            lines.append(line)
    return lines

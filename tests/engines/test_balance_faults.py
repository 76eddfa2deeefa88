"""What befalls ranks while experts move, each in a process tree of its own: nothing hangs, and no token is wrong.

The program that starts the engine changes a function of ours; ranks import that program, so the fault is in them too.
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port
from tests.helpers.engine_models import prompts
from tests.helpers.engines import await_model, balanced, complete
from tests.helpers.patience import PATIENCE_S

pytestmark = pytest.mark.slow

ASKING = """
import os, shlex, signal, subprocess, sys, time
import epbackend
from epbackend import EPConfig
from epbackend.balance import transfer
from epbackend.moe import LayerStats

{fault}

def main(model, config, migrations):
    from lmdeploy import GenerationConfig
    short = GenerationConfig(max_new_tokens=20, ignore_eos=True, do_sample=False)
    texts, first = (["the quick"], ["lazy dog parallel load"], ["expert says hello"]), {{}}
    with epbackend.pipeline(model, EPConfig.from_json(config)) as pipe:
        index = 0
        while pipe.balance().migrations < int(migrations):
            answers = [each.token_ids for each in pipe(texts[index % 3] * 4, gen_config=short, do_preprocess=False)]
            if first.setdefault(index % 3, answers) != answers:
                print("WRONG", flush=True)
            index += 1
            if index == 3:
                print("READY", flush=True)
                after_first_answers()
        print(pipe.balance(), flush=True)
        print("ALL MOVED", flush=True)

def after_first_answers():
    {later}

if __name__ == "__main__":
    main(*sys.argv[1:])
"""

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
SENDER = f"""
pack = transfer._pack
def killed(migration, move, *more):
    pack(migration, move, *more)
    if os.path.exists("go") and move.source != move.target:
        {KILL}
transfer._pack = killed
"""
RECEIVER = f"""
opened = transfer._opened
def killed(migration, move, *more):
    if os.path.exists("go") and move.source != move.target:
        {KILL}
    return opened(migration, move, *more)
transfer._opened = killed
"""
IN_COLLECTIVE = f"""
rows_on = LayerStats.rows_on
def killed(self, *arguments):
    if os.path.exists("go") and 0 in self.local_experts:
        {KILL}  # the other rank waits for its rows
    return rows_on(self, *arguments)
LayerStats.rows_on = killed
"""
SLOW = """
pack = transfer._pack
def slow(*arguments):
    print("SENDING", flush=True)
    time.sleep(3)
    pack(*arguments)
transfer._pack = slow
"""
FULL = """
size = int(os.environ.get("SHM_MB", 0))
if __name__ == "__main__" and size:
    del os.environ["SHM_MB"]
    again = shlex.join([sys.executable, *sys.argv])
    mounted = f"mount -t tmpfs -o size={size}m tmpfs /dev/shm && exec {again}"
    os.execvp("unshare", ["unshare", "-rm", "sh", "-c", mounted])
"""
FILL = 'subprocess.run(["dd", "if=/dev/zero", "of=/dev/shm/filler", "bs=1M"], stderr=subprocess.DEVNULL)'


def asking(fault="", later="pass"):
    return ASKING.format(fault=fault, later=later)


@pytest.mark.parametrize("fault", [SENDER, RECEIVER, IN_COLLECTIVE], ids=["sender", "receiver", "collective"])
def test_a_rank_that_is_killed_at_the_worst_moment_ends_the_call_by_its_name(
    fault, checkpoint, start_process, tmp_path
):
    settings = balanced(ep_size=2, ep_level=2, timeout_s=30)
    running = start_process(asking(fault), str(checkpoint("qwen3-moe")), settings.to_json(), "1000")
    (tmp_path / "go").touch()
    assert running.process.wait(timeout=PATIENCE_S) != 0
    running.assert_nothing_left()
    log = (tmp_path / "log").read_text()
    assert "WorkerError" in log
    assert "WRONG" not in log


def test_sigterm_during_a_migration_ends_the_server_in_order(checkpoint, start_process, tmp_path):
    """It does not wait for the migration, and requests that are under way get their answers."""
    port = free_port()
    script = SERVING.format(fault=SLOW)
    settings = balanced(ep_size=2, ep_level=2)
    running = start_process(script, str(checkpoint("qwen3-moe")), settings.to_json(), str(port), ready="")
    await_model(port)
    texts, deadline = prompts()[:4], time.monotonic() + PATIENCE_S
    first = [complete(port, text) for text in texts]
    while "SENDING" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        assert [complete(port, text) for text in texts] == first
    running.look()
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(complete, port, text) for text in texts]
        while not _under_way(port):
            assert time.monotonic() < deadline
        os.kill(running.process.pid, signal.SIGTERM)
        assert [each.result() for each in answers] == first
    assert running.process.wait(timeout=PATIENCE_S) == 0
    running.assert_nothing_left()


@pytest.mark.parametrize(
    ("megabytes", "what"),
    [(4, "the load report"), (30, "one of the buffers"), (90, "one of the buffers")],
    ids=["load report", "first buffer", "a rank has started"],
)
def test_shared_memory_without_room_is_said_at_once(
    megabytes, what, checkpoint, start_process, tmp_path, monkeypatch
):
    monkeypatch.setenv("SHM_MB", str(megabytes))
    settings = balanced(ep_size=2, ep_level=2).to_json()
    running = start_process(asking(FULL), str(checkpoint("qwen3-moe")), settings, "5", ready="no room")
    assert running.process.wait(timeout=PATIENCE_S) != 0
    running.assert_nothing_left()
    assert f"/dev/shm has no room for {what}" in (tmp_path / "log").read_text()


def test_shared_memory_that_others_fill_later_stops_nothing(checkpoint, start_process, tmp_path, monkeypatch):
    """What is needed of it was taken at the start."""
    monkeypatch.setenv("SHM_MB", "300")
    script, settings = asking(FULL, FILL), balanced(ep_size=2, ep_level=2).to_json()
    running = start_process(script, str(checkpoint("qwen3-moe")), settings, "10")
    assert running.process.wait(timeout=PATIENCE_S) == 0
    running.assert_nothing_left()
    assert "WRONG" not in (tmp_path / "log").read_text()


SERVING = """
import sys, time
from epbackend import EPConfig
from epbackend.balance import transfer
from epbackend.engines.lmdeploy import serve

{fault}

if __name__ == "__main__":
    model, config, port = sys.argv[1:]
    serve(model, EPConfig.from_json(config), port=int(port), model_name="tiny", log_level="ERROR")
"""


def _under_way(port: int) -> bool:
    """Whether the engine makes steps just now."""
    url = f"http://{LOOPBACK}:{port}/epbackend/status"
    before = requests.get(url, timeout=PATIENCE_S).json()["steps"]
    time.sleep(0.3)
    return requests.get(url, timeout=PATIENCE_S).json()["steps"] > before

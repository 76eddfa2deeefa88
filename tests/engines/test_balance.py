"""Pipelines whose experts move while they answer: the tokens of Hugging Face before, during and after."""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests

import epbackend
from benchmarks.faults import Case
from benchmarks.soak import soak
from epbackend.balance.recording import MOST_WINDOWS
from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port
from epbackend.errors import ConfigError, WorkerError
from epbackend.names import PHASES
from epbackend.placement.formats import read_loads
from epbackend.placement.placement import Placement
from tests.helpers.engine_models import EXPERTS, TOP_K, prompts
from tests.helpers.engines import GREEDY, await_model, balanced, complete, config
from tests.helpers.patience import PATIENCE_S
from tests.helpers.processes import ROOT, engine_workers, throttled_rank

pytestmark = pytest.mark.usefixtures("forked_ranks")


def generate_until(pipe, expected, done, parts=(range(0, 4), range(4, 8), range(8, 12))):
    """Answers prompts whose loads differ from round to round until `done(report)`; every answer must be right."""
    texts = prompts()
    deadline = time.monotonic() + PATIENCE_S
    round_ = 0
    while not done(pipe.balance()):
        assert time.monotonic() < deadline, pipe.balance()
        part = parts[round_ % len(parts)]
        answers = pipe([texts[index] for index in part], gen_config=GREEDY, do_preprocess=False)
        assert [answer.token_ids for answer in answers] == [expected[index] for index in part]
        round_ += 1


def await_counts(pipe):
    """The choices of each layer, once all have as many: a step that was under way ends, and no choice is ever lost."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        tokens_RYE = pipe.load().tokens_RYE
        assert tokens_RYE.shape[2] == EXPERTS
        assert (tokens_RYE >= 0).all()
        counts = set(tokens_RYE.sum(axis=(0, 2)).tolist())
        if len(counts) == 1 and not (count := counts.pop()) % TOP_K:
            return count
        assert time.monotonic() < deadline, counts


def test_experts_move_while_answers_stay_the_same_and_a_killed_planner_is_replaced(
    checkpoint, reference, tmp_path
):
    """Both on one engine, and what it reports and records of it."""
    recorded = {phase: tmp_path / f"loads-{phase}.json" for phase in PHASES}
    settings = balanced(ep_size=2, ep_level=2, balance={"record": str(tmp_path / "loads-{phase}.json")})
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), settings) as pipe:
        expected = reference("qwen3-moe")
        generate_until(pipe, expected, lambda report: report.migrations >= 1)
        os.kill(pipe._balancer.planner_pid, signal.SIGKILL)
        generate_until(pipe, expected, lambda report: report.planner_restarts >= 1)
        assert "planner was started anew" in pipe.balance().last_error
        done = pipe.balance().migrations
        generate_until(pipe, expected, lambda report: report.migrations > done)
        counted = await_counts(pipe)
    load = pipe.load()  # with what the engine still did after the last answer
    for phase, tokens_RYE in zip(PHASES, load.tokens_2RYE, strict=True):
        loads = read_loads(recorded[phase])
        assert 1 < loads.windows <= MOST_WINDOWS
        assert np.array_equal(loads.tokens_WYE.sum(axis=0), tokens_RYE.sum(axis=0))
        assert loads.numbering == "original"
    assert sorted(tmp_path.iterdir()) == sorted(recorded.values())
    report = pipe.balance()
    assert report.failed == 0
    assert report.slots_moved >= report.migrations == report.number
    assert report.bytes_moved > 0
    assert report.longest_flip_ms > 0
    assert report.imbalance_before > report.imbalance_after
    assert counted > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("qwen3-moe", balanced(ep_size=4, ep_level=1)),
        ("deepseek-v3", balanced(ep_size=4, ep_level=2)),
        ("deepseek-v3", balanced(balance={"redundant_experts": 0}, ep_size=2, ep_level=1)),
        ("qwen3-moe", balanced(ep_size=4, ep_level=2, placement={"split": "level"})),
        ("qwen3-moe", balanced({"dp": 2}, ep_size=2, ep_level=2)),
        ("mixtral", balanced(balance={"staging_mb": 0.03, "checksum": "sampled"}, ep_size=2, ep_level=2)),
    ],
    ids=["level 1", "deepseek", "no replicas", "level split", "dp 2", "small buffer"],
)
def test_experts_move_in_every_way_of_running(form, settings, checkpoint, reference):
    with epbackend.pipeline(str(checkpoint(form)), settings) as pipe:
        generate_until(pipe, reference(form), lambda report: report.migrations >= 3)
        assert pipe.balance().failed == 0


@pytest.mark.slow
def test_experts_move_while_a_rank_has_no_tokens_of_its_own(checkpoint, reference):
    """With dp 2 a single prompt goes to the first engine; the other one makes the same steps with nothing."""
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), balanced({"dp": 2}, ep_size=2, ep_level=2)) as pipe:
        expected = reference("qwen3-moe")
        generate_until(pipe, expected, lambda report: report.migrations >= 3, parts=([0], [4], [8]))
        assert pipe.balance().failed == 0


@pytest.mark.slow
def test_a_rank_that_sleeps_through_a_migration_costs_no_wrong_token(checkpoint, reference):
    """It wakes after the migration's timeout: what was under way has flipped on all ranks, or on none."""
    settings = balanced(balance={"timeout_s": 1.0}, ep_size=2, ep_level=2)
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), settings) as pipe:
        expected = reference("qwen3-moe")
        generate_until(pipe, expected, lambda report: report.migrations >= 1)
        for _ in range(3):
            worker = engine_workers()[1]
            worker.suspend()
            time.sleep(4.0)
            worker.resume()
            done = pipe.balance().migrations
            generate_until(pipe, expected, lambda report, done=done: report.migrations > done)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["even", "level"])
def test_a_rank_that_becomes_slow_is_relieved_and_gets_its_share_back(split, checkpoint, reference):
    """It is stopped most of the time, as under a limit of the processor, by who stands outside."""
    slow, measured = 2, {"speed_margin": 0.4, "window_steps": 32, "threshold": 0.02}
    settings = balanced(balance=measured, ep_size=4, ep_level=2, placement={"split": split})
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), settings) as pipe:
        before = pipe.load()

        def share() -> float:
            """Of the choices since the last call, the slow rank's over the mean rank's."""
            nonlocal before
            now = pipe.load()
            tokens_R = now.since(before).tokens_RYE.sum(axis=(1, 2))
            before = now
            return tokens_R[slow] / max(tokens_R.mean(), 1)

        with throttled_rank(slow, share=0.25):
            generate_until(pipe, reference("qwen3-moe"), lambda report: share() < 0.75 and report.rank_speed)
            assert pipe.balance().rank_speed[slow] < 0.6
        generate_until(pipe, reference("qwen3-moe"), lambda report: share() > 0.9)
        assert pipe.balance().failed == 0


MOVING = """
import sys
import epbackend
from epbackend import EPConfig
from lmdeploy import GenerationConfig

def main(model, config):
    with epbackend.pipeline(model, EPConfig.from_json(config)) as pipe:
        short = GenerationConfig(max_new_tokens=20, ignore_eos=True, do_sample=False)
        texts = ["the quick"], ["lazy dog parallel load"], ["expert says hello"]
        for index in range(100000):
            pipe(texts[index % 3] * 4, gen_config=short, do_preprocess=False)
            if pipe.balance().migrations >= 2:
                print("READY", flush=True)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_while_experts_move_ends_the_call_by_name_and_leaves_nothing(
    rank, checkpoint, start_process, tmp_path
):
    settings = balanced(ep_size=2, ep_level=2)
    running = start_process(MOVING, str(checkpoint("qwen3-moe")), settings.to_json())
    running.look()
    running.workers()[rank].kill()
    assert running.process.wait(timeout=PATIENCE_S) != 0
    running.assert_nothing_left()
    assert WorkerError.__name__ in (tmp_path / "log").read_text()


SERVING = """
import sys
from epbackend import EPConfig
from epbackend.engines.lmdeploy import serve

if __name__ == "__main__":
    model, config, port = sys.argv[1:]
    serve(model, EPConfig.from_json(config), port=int(port), model_name="tiny", log_level="ERROR")
"""


@pytest.mark.slow
@pytest.mark.parametrize("dp", [1, 2])
def test_a_server_moves_experts_while_it_answers_and_leaves_nothing(dp, checkpoint, start_process):
    """By itself, and at once when a client asks; a start with the placement that it then has is possible."""
    port = free_port()
    settings = balanced({"dp": dp}, ep_size=2, ep_level=2)
    running = start_process(SERVING, str(checkpoint("qwen3-moe")), settings.to_json(), str(port), ready="")
    await_model(port)
    url, texts, first = f"http://{LOOPBACK}:{port}/epbackend", prompts()[:6], {}
    deadline = time.monotonic() + PATIENCE_S
    while (report := requests.get(f"{url}/status", timeout=PATIENCE_S).json()["balance"])["migrations"] < 3:
        assert time.monotonic() < deadline, report
        for text in texts:
            answer = complete(port, text)
            assert first.setdefault(text, answer) == answer
    assert report["failed"] == 0
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(complete, port, text) for text in texts]
        asked = requests.post(f"{url}/rebalance", timeout=PATIENCE_S)
        assert [answer.result() for answer in answers] == [first[text] for text in texts]
    assert asked.status_code in (200, 202)
    assert asked.json()["windows"] > report["windows"]
    placement = Placement.from_json(requests.get(f"{url}/placement", timeout=PATIENCE_S).text)
    assert placement != Placement.even(len(placement.layers), EXPERTS, 2, EXPERTS + 4)
    running.look()
    os.kill(running.process.pid, signal.SIGTERM)
    running.process.wait(timeout=PATIENCE_S)
    running.assert_nothing_left()


@pytest.mark.slow
def test_half_a_minute_of_the_soak_passes():
    """Of `make soak`: mixed requests at a server whose experts move, beside those at one where nothing moves."""
    assert soak(Case(ep=2, timeout_s=120.0), minutes=0.5).faults() == []


@pytest.mark.slow
def test_nothing_is_left_when_the_parent_is_killed_while_experts_move(checkpoint, start_process):
    running = start_process(MOVING, str(checkpoint("qwen3-moe")), balanced(ep_size=2).to_json())
    running.look()
    running.process.kill()
    running.process.wait(timeout=PATIENCE_S)
    running.assert_nothing_left()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"balance": {"on": True, "max_mb": 0.01}}, r"balance\.max_mb: 0\.01 MB are less than one expert"),
        ({"balance": {"on": True, "staging_mb": 0.001}}, r"balance\.staging_mb: .*set 0\.0246 or more"),
        ({"balance": {"on": True, "redundant_experts": 3}}, r"balance\.redundant_experts: 3 .*use 4"),
        (
            {"balance": {"on": True, "record": "/dev/null/f"}},
            r"balance\.record: /dev/null/f cannot be written",
        ),
        ({"balance": {"on": True}, "ep_size": EXPERTS}, r"balance\.on: each of the 16 ranks has one expert"),
    ],
)
def test_what_cannot_move_is_said_before_anything_is_started(settings, said, checkpoint):
    with pytest.raises(ConfigError, match=said):
        epbackend.pipeline(str(checkpoint("qwen3-moe")), config(**{"ep_size": 4, **settings}))


def test_without_balance_there_is_no_report_and_by_hand_the_model_is_missing(monkeypatch):
    with pytest.raises(ConfigError, match=r"use epbackend\.pipeline"):
        epbackend.enable(balanced(ep_size=2))


def test_the_documentation_names_every_setting():
    text = (ROOT / "docs" / "balance.md").read_text(encoding="utf-8")
    fields = type(balanced(ep_size=2).balance).model_fields
    assert set(re.findall(r"`balance\.([a-z_]+)`", text)) == set(fields)

"""What stands for an engine, or for a server, in a process that the code under test starts, ends and talks to.

The processes are forks of one that has loaded LMDeploy, as those of `forked_engines` are; this module is small because
each of them imports it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from lmdeploy.messages import Response

from epbackend.config import EPConfig
from epbackend.engines.lmdeploy import dp_pipeline, pipelines, processes
from epbackend.engines.lmdeploy.server import serve
from epbackend.errors import ConfigError, EngineFailedError, WorkerError
from tests.helpers.ranks import forking

TWO_ENGINES = EPConfig.load({"device": "cpu", "ep_size": 2, "engine": {"dp": 2, "log_level": "ERROR"}})


class Echo:
    """An engine: two parts a prompt, the second what a logits processor makes of it."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def stream_infer(self, prompts: list[str], gen_config: Any, **_: Any) -> Iterator[Response]:
        configs = gen_config if isinstance(gen_config, list) else [gen_config] * len(prompts)
        for index, (prompt, each) in enumerate(zip(prompts, configs, strict=True)):
            if prompt == "fails":
                raise ValueError("no such token")
            if prompt == "is lost":
                raise WorkerError("rank 1 was killed")
            processors = each.logits_processors if each is not None else None
            yield Response("answer to ", 0, 0, index=index)
            yield Response(processors[0](prompt) if processors else prompt, 0, 0, index=index)

    def close(self) -> None:
        pass


@contextmanager
def two_echoes() -> Iterator[dp_pipeline.ReplicatedPipeline]:
    """A pipeline with dp 2 whose engines are no more than Echo."""
    with forked(), mock.patch.object(dp_pipeline, "_serve_pipe", _serve_echo):
        pipe = dp_pipeline.ReplicatedPipeline("none", TWO_ENGINES)
    with pipe:
        yield pipe


@contextmanager
def scripted_servers() -> Iterator[None]:
    """Servers with `restart` load no model: each start does what the next line of the file "script" in its folder says.

    That is "killed", "fails" or "cannot" (start); anything else ends as after a signal.
    """
    with (
        forked(),
        mock.patch.object(serve, "_serve_child", _serve_script),
        mock.patch.object(serve, "RESTART_AFTER_S", 0.0),
    ):
        yield


@contextmanager
def forked() -> Iterator[None]:
    """Processes that `processes` starts meanwhile are forks."""
    with mock.patch.object(processes, "multiprocessing", SimpleNamespace(get_context=lambda _: forking())):
        yield


_serve_pipe, _serve_child = dp_pipeline._serve_pipe, serve._serve_child


def _serve_echo(*arguments: Any) -> None:
    with mock.patch.object(pipelines, "ExpertParallelPipeline", Echo):
        _serve_pipe(*arguments)


def _serve_script(failed: Connection, serving: serve.Serving) -> None:
    with mock.patch.object(serve, "_serve_once", _do_next):
        _serve_child(failed, serving)


def _do_next(serving: serve.Serving) -> None:
    script = Path(serving.model_path) / "script"
    now, _, later = script.read_text().partition("\n")
    script.write_text(later)
    if now == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if now == "fails":
        raise EngineFailedError("rank 1 ended")
    if now == "cannot":
        raise ConfigError("engine.dp: cannot be 3")

"""Generating with `engine.dp` > 1: several engines, each with its own requests, that share the experts."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, cast

from epbackend.balance.balancer import BalanceReport
from epbackend.config import EPConfig
from epbackend.engines.lmdeploy import balance
from epbackend.engines.lmdeploy.load.report import LoadReport, SharedStats
from epbackend.engines.lmdeploy.processes import start_engines, stop_engines
from epbackend.engines.lmdeploy.requests.checks import check_call
from epbackend.engines.lmdeploy.shown_log import ShownLog
from epbackend.engines.placement import warm_splits
from epbackend.errors import EPError, WorkerError
from epbackend.placement.placement import Placement

if TYPE_CHECKING:
    from lmdeploy import GenerationConfig
    from lmdeploy.messages import Response

CLOSING_S = 10.0
"""Time that the engines have for closing by themselves; Ray takes a few seconds."""


@dataclass(frozen=True)
class _Work:
    """Prompts for one engine; `index` is the place of each among all."""

    prompts: list[Any]
    index: list[int]
    gen_config: Any
    arguments: dict[str, Any]


class ReplicatedPipeline:
    """dp engines behind `infer` and `stream_infer` of LMDeploy's pipeline; prompts go round. For one caller at a time.

    An engine without requests takes part in the others' steps with an empty batch, so all are closed together.
    """

    def __init__(
        self, model_path: str, config: EPConfig, placement: Placement | None = None, **kwargs: Any
    ) -> None:
        self._log = ShownLog(config.engine.log_level)
        warm_splits(config)
        self._board: SharedStats | None = SharedStats.of(config)
        self._balancer = balance.start(config, self._board, placement)
        self._broken = False
        self._experts_told = bool(config.engine.extra.get("enable_return_routed_experts"))
        ends = [Pipe() for _ in range(config.engine.dp)]
        self._engines = [ours for ours, _ in ends]
        self._processes = start_engines(
            config,
            self._board,
            _serve_pipe,
            [
                (theirs, model_path, config.to_json(), rank, placement, kwargs)
                for rank, (_, theirs) in enumerate(ends)
            ],
        )
        for _, theirs in ends:
            theirs.close()
        atexit.register(self.close)
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def __call__(self, prompts: Any, gen_config: GenerationConfig | None = None, **kwargs: Any) -> Any:
        return self.infer(prompts, gen_config, **kwargs)

    def infer(self, prompts: Any, gen_config: GenerationConfig | None = None, **kwargs: Any) -> Any:
        """One Response for a single prompt, a list of them for a list.

        Raises:
            WorkerError: an engine died, before or meanwhile.
            ConfigError: an argument, or an option of the GenerationConfig, would be ignored.
            EPError: the pipeline is closed.
        """
        whole: dict[int, Response] = {}
        for part in self.stream_infer(prompts, gen_config=gen_config, stream_response=False, **kwargs):
            whole[part.index] = whole[part.index].extend(part) if part.index in whole else part
        return whole[0] if _is_single(prompts) else [whole[index] for index in sorted(whole)]

    def stream_infer(
        self, prompts: Any, gen_config: GenerationConfig | list | None = None, **kwargs: Any
    ) -> Iterator[Response]:
        """Parts of the responses as they come; `index` tells the prompt of each. Raises as `infer` does."""
        if self._board is None:
            raise EPError("this pipeline is closed; make another one")
        prompts = [prompts] if _is_single(prompts) else list(prompts)
        check_call(len(prompts), gen_config, kwargs, experts_told=self._experts_told)
        busy = []
        for rank, engine in enumerate(self._engines):
            index = list(range(rank, len(prompts), len(self._engines)))
            if index:
                configs = [gen_config[i] for i in index] if isinstance(gen_config, list) else gen_config
                self._send(engine, _Work([prompts[i] for i in index], index, configs, kwargs))
                busy.append(engine)
        try:
            while busy:
                for engine in cast("list[Connection]", wait(busy)):
                    part = self._receive(engine)
                    if part is None:
                        busy.remove(engine)
                    else:
                        yield part
        except (GeneratorExit, KeyboardInterrupt):
            # The rest is not wanted, and the next call must not find it in the pipes.
            for engine in busy:
                while self._receive(engine) is not None:
                    pass
            raise

    def load(self) -> LoadReport:
        """What the experts of every rank did so far; after `close`, in all steps that the engines made."""
        if self._board is not None:
            self._last_load = self._board.report()
        return self._last_load

    def balance(self) -> BalanceReport:
        """What moving experts has done so far; still readable after `close`. Raises EPError where it is off."""
        if self._balancer is None:
            raise EPError("no expert moves here: set balance.on: true, with ep_size > 1")
        return self._balancer.report()

    def close(self) -> None:
        """Ends all engines and their processes. A second call does nothing."""
        if self._board is None:
            return
        atexit.unregister(self.close)
        for engine, process in zip(self._engines, self._processes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):  # it may have ended just now
                    engine.send(None)
        # An engine cannot finish a step that another one has left.
        stop_engines(self._processes, grace_s=0 if self._broken else CLOSING_S)
        # Both read all steps that the engines made.
        self.load()
        if self._balancer is not None:
            self._balancer.close()
        self._board.remove()
        self._board = None
        self._log.close()

    def __getattr__(self, name: str) -> Any:
        from lmdeploy.pipeline import Pipeline

        if not name.startswith("_") and hasattr(Pipeline, name):
            raise AttributeError(
                f"a pipeline with engine.dp > 1 has no {name}: its engines share one list of prompts; call it in a "
                "pipeline with dp: 1, or serve the model and ask the server"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __enter__(self) -> ReplicatedPipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _await_ready(self) -> None:
        waiting = list(self._engines)
        while waiting:
            for engine in cast("list[Connection]", wait(waiting)):
                self._receive(engine)
                waiting.remove(engine)

    def _send(self, engine: Connection, work: _Work) -> None:
        try:
            engine.send(work)
        except OSError:
            raise self._death(engine) from None

    def _receive(self, engine: Connection) -> Response | None:
        """A part of a response, or None at the end of the work."""
        try:
            received = engine.recv()
        except (EOFError, OSError):
            raise self._death(engine) from None
        if isinstance(received, BaseException):
            self._broken = True
            raise received
        return received

    def _death(self, engine: Connection) -> WorkerError:
        self._broken = True
        rank = self._engines.index(engine)
        process = self._processes[rank]
        process.join(timeout=1)
        return WorkerError(
            f"the engine process of dp rank {rank} ended with exit code {process.exitcode}; its log is above"
        )


def _is_single(prompts: Any) -> bool:
    """Whether this is one prompt: a text, a text with its images, or the messages of one chat."""
    return (
        isinstance(prompts, str)
        or (isinstance(prompts, tuple) and len(prompts) == 2)
        or (isinstance(prompts, list) and prompts != [] and isinstance(prompts[0], dict))
    )


def _serve_pipe(
    connection: Connection,
    model_path: str,
    config_json: str,
    dp_rank: int,
    placement: Placement | None,
    kwargs: dict[str, Any],
) -> None:
    """An engine process: answers the work that comes through the pipe until it is stopped."""
    from epbackend.engines.lmdeploy.pipelines import ExpertParallelPipeline

    try:
        config = EPConfig.from_json(config_json)
        pipe = ExpertParallelPipeline(model_path, config, dp_rank, placement, **kwargs)
        connection.send(None)
        while (work := connection.recv()) is not None:
            for part in pipe.stream_infer(work.prompts, gen_config=work.gen_config, **work.arguments):
                connection.send(replace(part, index=work.index[part.index]))
            connection.send(None)
        pipe.close()
    except EPError as error:
        connection.send(error)
    except Exception as error:
        connection.send(
            WorkerError(f"the engine of dp rank {dp_rank} failed: {type(error).__name__}: {error}")
        )
        raise

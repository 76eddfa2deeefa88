"""Generating with `engine.dp` > 1: several engines, each with its own requests, that share the experts."""

from __future__ import annotations

import atexit
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, cast

import cloudpickle

from epbackend.balance.balancer import BalanceReport
from epbackend.config import EPConfig
from epbackend.engines.lmdeploy import balance
from epbackend.engines.lmdeploy.balance import report_of
from epbackend.engines.lmdeploy.load.report import SharedStats
from epbackend.engines.lmdeploy.processes import start_engines, stop_engines
from epbackend.engines.lmdeploy.requests.checks import check_call
from epbackend.engines.lmdeploy.shown_log import ShownLog
from epbackend.engines.load_report import LoadReport
from epbackend.engines.placement import warm_splits
from epbackend.errors import ConfigError, EPError, WorkerError
from epbackend.placement.placement import Placement

if TYPE_CHECKING:
    from lmdeploy import GenerationConfig
    from lmdeploy.messages import Response

logger = logging.getLogger("epbackend")

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
        self._failure: EPError | None = None
        """What no call can get over."""
        self._open = False
        """Whether a call is under way."""
        self._busy: list[Connection] = []
        """Engines whose part of a call has not been read to its end."""
        self._experts_told = bool(config.engine.extra.get("enable_return_routed_experts"))
        with contextlib.ExitStack() as started:
            started.enter_context(ShownLog(config.engine.log_level))
            warm_splits(config)
            self._stats: SharedStats | None = SharedStats.of(config)
            started.callback(self._stats.remove)
            self._balancer = balance.start(config, self._stats, placement)
            if self._balancer is not None:
                started.callback(self._balancer.close)
            started.callback(self.load)  # it and the balancer read all steps that the engines made
            self._start_engines(model_path, config, placement, kwargs)
            started.callback(self._end_engines)
            self._await_ready()
            self._started = started.pop_all()
        atexit.register(self.close)

    def __call__(self, prompts: Any, gen_config: GenerationConfig | None = None, **kwargs: Any) -> Any:
        return self.infer(prompts, gen_config, **kwargs)

    def infer(self, prompts: Any, gen_config: GenerationConfig | None = None, **kwargs: Any) -> Any:
        """One Response for a single prompt, a list of them for a list.

        Raises:
            WorkerError: an engine died, before or meanwhile.
            ConfigError: an argument, or an option of the GenerationConfig, would be ignored or cannot be pickled.
            EPError: the pipeline is closed, another call is under way, or an engine could not answer.
        """
        whole: dict[int, Response] = {}
        for part in self.stream_infer(prompts, gen_config=gen_config, stream_response=False, **kwargs):
            whole[part.index] = whole[part.index].extend(part) if part.index in whole else part
        return whole[0] if _is_single(prompts) else [whole[index] for index in sorted(whole)]

    def stream_infer(
        self, prompts: Any, gen_config: GenerationConfig | list | None = None, **kwargs: Any
    ) -> Iterator[Response]:
        """Parts of the responses as they come; `index` tells the prompt of each. Raises as `infer` does."""
        if self._failure is not None:
            raise self._failure
        if self._open:
            raise EPError(
                "another call of this pipeline is under way, and its answers would be mixed up with this one's: read "
                "what stream_infer returned to its end, or close() it"
            )
        prompts = [prompts] if _is_single(prompts) else list(prompts)
        check_call(len(prompts), gen_config, kwargs, experts_told=self._experts_told)
        shares = [
            _share(prompts, range(first, len(prompts), len(self._engines)), gen_config, kwargs)
            for first in range(min(len(self._engines), len(prompts)))
        ]
        self._open = True
        try:
            self._drain()  # of a call whose end was interrupted
            for engine, share in zip(self._engines, shares, strict=False):
                self._busy.append(engine)
                with self._whole_message(engine):
                    engine.send_bytes(share)
            for part in self._received():
                if isinstance(part, EPError):
                    raise part
                yield part
        finally:
            self._open = False
            self._drain()

    def load(self) -> LoadReport:
        """What the experts of every rank did so far; after `close`, in all steps that the engines made."""
        if self._stats is not None:
            self._last_load = self._stats.report()
        return self._last_load

    def balance(self) -> BalanceReport:
        """What moving experts has done so far; still readable after `close`. Raises EPError where it is off."""
        return report_of(self._balancer)

    def close(self) -> None:
        """Ends all engines and their processes. A second call does nothing."""
        if self._stats is None:
            return
        atexit.unregister(self.close)
        self._started.close()
        self._stats = None
        self._failure = EPError("this pipeline is closed; make another one")

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

    def _start_engines(
        self, model_path: str, config: EPConfig, placement: Placement | None, arguments: dict[str, Any]
    ) -> None:
        assert self._stats is not None
        ends = [Pipe() for _ in range(config.engine.dp)]
        self._engines = [ours for ours, _ in ends]
        self._processes = start_engines(
            config,
            self._stats,
            _serve_pipe,
            [
                (theirs, model_path, config.to_json(), rank, placement, arguments)
                for rank, (_, theirs) in enumerate(ends)
            ],
        )
        for _, theirs in ends:
            theirs.close()

    def _end_engines(self) -> None:
        for engine, process in zip(self._engines, self._processes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):  # it may have ended just now
                    engine.send_bytes(b"")
        # An engine cannot finish a step that another one has left.
        stop_engines(self._processes, grace_s=0 if self._failure else CLOSING_S)

    def _await_ready(self) -> None:
        self._busy = list(self._engines)
        for error in self._received():
            assert isinstance(error, EPError)
            self._failure = error
            raise error

    def _received(self) -> Iterator[Response | EPError]:
        """Parts of responses from the busy engines, and the errors by which an engine ended its own, until all have."""
        while self._busy:
            for engine in cast("list[Connection]", wait(self._busy)):
                with self._whole_message(engine):
                    received = engine.recv()
                if isinstance(received, WorkerError):
                    self._failure = received
                    raise received
                if received is None or isinstance(received, EPError):
                    self._busy.remove(engine)
                if received is not None:
                    yield received

    def _drain(self) -> None:
        """What is left of a call that ended early is not wanted, and the next one must not find it in the pipes."""
        if self._failure is None:
            for _ in self._received():
                pass

    @contextlib.contextmanager
    def _whole_message(self, engine: Connection) -> Iterator[None]:
        """After a message that was cut off, nothing can be read any more."""
        try:
            yield
        except (EOFError, OSError):
            self._failure = self._failure or self._death(engine)
            raise self._failure from None
        except BaseException:
            self._failure = EPError("this pipeline was interrupted within a message; make another one")
            raise

    def _death(self, engine: Connection) -> WorkerError:
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


def _share(prompts: list[Any], places: range, gen_config: Any, arguments: dict[str, Any]) -> bytes:
    """What the engine that answers the prompts at these places gets: all of it, before any engine gets a word.

    Raises:
        ConfigError: something of it cannot be pickled.
    """
    index = list(places)
    configs = [gen_config[i] for i in index] if isinstance(gen_config, list) else gen_config
    try:
        return cloudpickle.dumps(_Work([prompts[i] for i in index], index, configs, arguments))
    except Exception as error:  # whatever an object's own pickling raises
        given = {"prompts": prompts, "gen_config": gen_config, **arguments}
        name = next((name for name, value in given.items() if not _can_be_pickled(value)), "prompts")
        raise ConfigError(
            f"{name}: cannot be pickled ({error}), and with engine.dp > 1 the engines are processes of their own"
        ) from error


def _can_be_pickled(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:
        return False
    return True


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
        while packed := connection.recv_bytes():
            connection.send(_answer(pipe, packed, connection, dp_rank))
        pipe.close()
    except EPError as error:
        connection.send(error)
    except Exception as error:
        connection.send(
            WorkerError(f"the engine of dp rank {dp_rank} failed: {type(error).__name__}: {error}")
        )
        raise


def _answer(pipe: Any, packed: bytes, connection: Connection, dp_rank: int) -> EPError | None:
    """Sends the parts of the responses. What is returned ends the call: None, or why it fails, alone.

    Raises:
        WorkerError: the engine has failed.
    """
    try:
        work: _Work = cloudpickle.loads(packed)
        for part in pipe.stream_infer(work.prompts, gen_config=work.gen_config, **work.arguments):
            connection.send(replace(part, index=work.index[part.index]))
    except WorkerError:
        raise
    except EPError as error:
        return error
    except Exception as error:
        logger.exception("a call failed")
        return EPError(f"the engine of dp rank {dp_rank} cannot answer: {type(error).__name__}: {error}")
    return None

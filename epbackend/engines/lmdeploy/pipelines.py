"""One engine with expert parallelism, in the form of LMDeploy's pipeline."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator
from typing import Any

from lmdeploy import Pipeline
from lmdeploy.messages import Response
from lmdeploy.serve.managers.session_manager import Session

from epbackend.balance.balancer import BalanceReport
from epbackend.config import EPConfig
from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.balance import report_of
from epbackend.engines.lmdeploy.lmdeploy_config import engine_config
from epbackend.engines.lmdeploy.requests.checks import check_call
from epbackend.engines.lmdeploy.state import active, current
from epbackend.engines.load_report import LoadReport
from epbackend.errors import ConfigError, EPError
from epbackend.placement.placement import Placement


class ExpertParallelPipeline(Pipeline):
    """LMDeploy's pipeline; in addition it reports the load of the experts, and fails by an error when a rank dies.

    Close it, or use it as a context manager: that ends its processes and disables the plug. So a process has one.
    """

    def __init__(
        self,
        model_path: str,
        config: EPConfig,
        dp_rank: int = 0,
        placement: Placement | None = None,
        **kwargs: Any,
    ) -> None:
        """Starts the engine; `kwargs` are those of LMDeploy's pipeline.

        Raises:
            ConfigError: this process has another one; or as `plug.enable`.
            UnavailableError: as `plug.enable`.
            WorkerError: a worker process died while starting.
        """
        if (state := current()) is not None and state.of_pipeline:
            raise ConfigError(
                "this process has a pipeline already: close it first, or make the other one in a process of its own"
            )
        plug.enable(config, placement)
        active().of_pipeline = True
        self._closed = False
        self._final_load: LoadReport | None = None
        kwargs.setdefault("log_level", config.engine.log_level)
        try:
            super().__init__(model_path, backend_config=engine_config(config, dp_rank), **kwargs)
        except BaseException:
            plug.disable()
            raise
        self._balancer = active().balancer
        atexit.register(self.close)

    def load(self) -> LoadReport:
        """What the experts of every rank did so far; after `close`, in all steps that the engine made."""
        return self._final_load or active().load_report()

    def balance(self) -> BalanceReport:
        """What moving experts has done so far; still readable after `close`.

        Raises:
            EPError: it is off, or this is one of several engines, whose starter has the report.
        """
        return report_of(self._balancer)

    def infer(self, *args: Any, **kwargs: Any) -> Any:
        """As LMDeploy's.

        Raises:
            WorkerError: a worker process died, before or meanwhile.
            ConfigError: an argument, or an option of the GenerationConfig, would be ignored.
            EPError: the pipeline is closed.
        """
        responses = super().infer(*args, **kwargs)
        self._raise_failure()
        return responses

    def stream_infer(self, *args: Any, **kwargs: Any) -> Iterator[Response]:
        """As LMDeploy's; raises as `infer` does."""
        for response in super().stream_infer(*args, **kwargs):
            if response.finish_reason == "error":
                self._raise_failure()
            yield response

    def get_ppl(self, *args: Any, **kwargs: Any) -> list[float]:
        """As LMDeploy's; raises as `infer` does."""
        if self._closed:
            raise EPError("this pipeline is closed; make another one")
        try:
            return super().get_ppl(*args, **kwargs)
        except ValueError:
            self._raise_failure()
            raise

    def close(self) -> None:
        """Ends the engine and its processes, and disables the plug. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            super().close()
        finally:
            # The engine may still have made a step after the last answer: what was counted is final only now.
            # Nothing to keep where the report is another process's, or the plug was disabled before.
            with contextlib.suppress(EPError):
                self._final_load = active().load_report()
            plug.disable()

    def _request_generator(
        self, prompts: Any, sessions: Any = None, gen_config: Any = None, **kwargs: Any
    ) -> Iterator[dict]:
        if self._closed:
            raise EPError("this pipeline is closed; make another one")
        count = 1 if self._is_single(prompts) else len(prompts)
        check_call(count, gen_config, kwargs, experts_told=self.backend_config.enable_return_routed_experts)
        # LMDeploy draws the requests in its event loop, where an error would leave the caller waiting.
        requests = list(super()._request_generator(prompts, sessions, gen_config, **kwargs))
        for session in _sessions(requests):
            session.epoch = None  # it may have been left before
        return iter(requests)

    def _infer(self, requests: Any, multiplex: bool, pbar: Any = None, loop: Any = None) -> Iterator[Any]:
        """As LMDeploy's; what is not read to its end (`break`, Ctrl-C) is not computed to its end either."""
        requests = list(requests)
        sessions = _sessions(requests)
        answers = super()._infer(iter(requests), multiplex, pbar, loop)
        if not multiplex:  # each is an iterator of its own
            answers = (self._read(each, sessions) for each in answers)
        return self._read(answers, sessions)

    def _read(self, answers: Iterator[Any], sessions: list[Session]) -> Iterator[Any]:
        try:
            yield from answers
        except BaseException:
            if not self._closed:
                self._run(coro=_leave(sessions))
            raise

    def _raise_failure(self) -> None:
        state = current()
        if state is not None and state.failure is not None:
            raise state.failure


def _sessions(requests: list[dict[str, Any]]) -> list[Session]:
    return [each["session_id"] for each in requests if isinstance(each["session_id"], Session)]


async def _leave(sessions: list[Session]) -> None:
    """Ends the requests of these sessions, which LMDeploy would compute to their end."""
    for session in sessions:
        if session._handle is None:
            session.epoch = -1  # no engine's: LMDeploy drops the request when its turn comes
        else:
            await session.async_abort()

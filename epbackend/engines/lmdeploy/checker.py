"""LMDeploy's checks of the machine, with the plug where they run.

On a GPU it checks in a process of its own, which keeps CUDA out of this one: Ray and mp executors need no context
here. It is spawned, and knows nothing of what was replaced in its starter. What is pickled for it is a bound method
of the checker; being ours, it brings the plug along.
"""

from __future__ import annotations

from lmdeploy.pytorch.engine.engine_checker import EngineChecker

from epbackend.engines.lmdeploy import plug


class PluggedChecker(EngineChecker):
    """All of LMDeploy's checks, in whatever process."""

    def _handle_impl(self) -> None:
        plug.enable_worker()
        super()._handle_impl()

"""What is done behind each step of the engine: experts' counters are written down, and its end on a GPU is watched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from epbackend.dispatch.ranks import RankGroup
from epbackend.dispatch.sentry import watch
from epbackend.engines.lmdeploy.patching import patch
from epbackend.engines.lmdeploy.plug import active


@patch(
    "lmdeploy.pytorch.engine.model_agent.agent:model_forward",
    why="layers in a captured graph neither report what they did nor fail in time; here a step is over either way",
    when="always",
    fingerprint="590e0f33e595",
)
def steps_are_counted(original: Callable) -> Callable:
    @functools.wraps(original)
    def model_forward(*args: Any, stream: Any = None, **kwargs: Any) -> Any:
        output = original(*args, stream=stream, **kwargs)
        with torch.cuda.stream(stream or torch.cuda.current_stream()):
            active().load_writer.step()
            if active().device == "cuda":
                _watch_step()
        return output

    return model_forward


def _watch_step() -> None:
    """Marks the step's end, which a replayed graph does not: a rank that is lost becomes an error there too."""
    from lmdeploy.pytorch.distributed import get_dist_manager

    group = get_dist_manager().current_context().ep_gpu_group
    if group is not None:
        watch("a step of the engine", RankGroup.of(group), active().config.timeout_s)

"""The plug into LMDeploy's PyTorch engine.

    with pipeline("tiny-qwen3-moe", config) as pipe:        # the whole of it
        print(pipe(["Once"])[0].text, pipe.load().tokens_per_rank)

    enable(config)                                          # or by hand
    pipe = lmdeploy.pipeline(model, backend_config=engine_config(config))
    ...
    pipe.close(); disable()

- `plug` enables and disables; `state` holds what is enabled.
- `patching` and `patches` change LMDeploy and put it back.
- `lmdeploy_config` makes LMDeploy's configuration from ours; `hub` finds a model, and `checks` refuses what cannot work
  with its files (`epbackend.checkpoint`), before any process is started.
- `operators` are our experts, `devices` gives them to each device; `weight_check` sees to it that all are loaded.
- `workers` brings the plug into the ranks, and watches over them.
- `load` counts what the layers do, and brings it back; `balance` lets experts move while the engine serves.
- `pipelines` and `dp_pipeline` run a model for Python, `server` for clients, the last two with the help of `processes`;
  `requests` is what may be asked and what is answered.
- `turbomind` is LMDeploy's other engine, from the same config: it needs none of the above but the checkpoint's checks.
- `handover` runs a program that knows none of this: `epbackend run`.

Importing this package imports neither LMDeploy nor torch: what is wrong with a checkpoint is said before that.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epbackend.checkpoint import check_checkpoint
from epbackend.config import EPConfig
from epbackend.engines.lmdeploy.hub import locate
from epbackend.engines.lmdeploy.patching import check_version
from epbackend.engines.lmdeploy.processes import check_port, check_starts
from epbackend.engines.lmdeploy.server.front import Front
from epbackend.engines.lmdeploy.shown_log import ShownLog
from epbackend.engines.load_report import LoadReport

if TYPE_CHECKING:
    from lmdeploy import Pipeline

    from epbackend.engines.lmdeploy.dp_pipeline import ReplicatedPipeline
    from epbackend.engines.lmdeploy.lmdeploy_config import engine_config
    from epbackend.engines.lmdeploy.pipelines import ExpertParallelPipeline
    from epbackend.engines.lmdeploy.plug import disable, enable
    from epbackend.placement.placement import Placement

__all__ = ["Front", "LoadReport", "disable", "enable", "engine_config", "pipeline", "serve"]

_HOME = {"disable": "plug", "enable": "plug", "engine_config": "lmdeploy_config"}
"""What is imported on first use: it needs torch."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def pipeline(
    model: str, config: EPConfig, **kwargs: Any
) -> ExpertParallelPipeline | ReplicatedPipeline | Pipeline:
    """A pipeline for a model: a directory, a name in the hub, or the name of a model that comes with epbackend.

    Further arguments go to LMDeploy's pipeline (chat_template_config, log_level, ...). With `engine.dp` > 1 the
    engines run in processes of their own and share the prompts. With `engine.backend: turbomind` it is LMDeploy's own.

    Raises:
        UnavailableError: no such model or device, or LMDeploy is not the release it must be.
        ConfigError: the model does not suit the settings, or memory does not suffice for the cache.
        WorkerError: a worker process died while starting.
    """
    EPConfig.require(config)
    if config.engine.backend == "turbomind":
        from epbackend.engines.lmdeploy import turbomind

        return turbomind.pipeline(model, config, **kwargs)
    path, placement = _checked(model, config, serving=False)
    if config.engine.dp > 1:
        from epbackend.engines.lmdeploy.dp_pipeline import ReplicatedPipeline

        return ReplicatedPipeline(path, config, placement, **kwargs)
    from epbackend.engines.lmdeploy.pipelines import ExpertParallelPipeline

    return ExpertParallelPipeline(path, config, placement=placement, **kwargs)


def serve(
    model: str,
    config: EPConfig,
    host: str = "127.0.0.1",
    port: int = 23333,
    record: Path | None = None,
    front: Front | None = None,
    **kwargs: Any,
) -> None:
    """Serves a model by LMDeploy's OpenAI API until SIGINT or SIGTERM; see `server.serve_model`.

    `record` is a file for the experts' loads, written now and then and at the end: what a placement is planned on.
    `front` is what clients see of the server; the model is called what it is called here, if that says nothing else.
    """
    EPConfig.require(config)
    check_port(host, port)
    front = front or Front()
    front = replace(front, model_name=front.model_name or model)
    front.check()
    if config.engine.backend == "turbomind":
        from epbackend.engines.lmdeploy import turbomind

        return turbomind.serve(model, config, host, port, front, record=record, **kwargs)
    path, placement = _checked(model, config, serving=True)
    from epbackend.engines.lmdeploy.load.recording import Recording
    from epbackend.engines.lmdeploy.server.serve import serve_model

    recording = Recording.of(record, path, config.ep_size) if record else None
    serve_model(path, config, host, port, placement, recording, front, **kwargs)


def _checked(model: str, config: EPConfig, *, serving: bool) -> tuple[str, Placement | None]:
    """The model's directory and its placement, once all that can be known beforehand is known to be right.

    The quick checks come first: those of files need no torch.
    """
    check_starts(config)
    check_version()
    path = locate(model)
    check_checkpoint(path, weights=not config.engine.extra.get("empty_init"))
    from epbackend.engines.lmdeploy.balance import starting_placement
    from epbackend.engines.lmdeploy.checks import check_deployment

    custom = bool(config.engine.extra.get("custom_module_map"))
    with ShownLog(config.engine.log_level):
        placement = check_deployment(path, config, serving=serving, custom_models=custom)
        return path, starting_placement(path, config, placement)

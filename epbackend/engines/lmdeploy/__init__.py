"""The plug into LMDeploy's PyTorch engine.

    with pipeline("tiny-qwen3-moe", config) as pipe:        # the whole of it
        print(pipe(["Once"])[0].text, pipe.load().tokens_per_rank)

    enable(config)                                          # or by hand
    pipe = lmdeploy.pipeline(model, backend_config=engine_config(config))
    ...
    pipe.close(); disable()

- `plug` enables and disables; `state` holds what is enabled.
- `patching` and `patches` change LMDeploy and put it back.
- `lmdeploy_config` makes LMDeploy's configuration from ours and finds a model; `checks` refuses what cannot work before
  any process is started.
- `operators` are our experts; `backend_cpu` (with `attention` and `torch_cuda_shim`), `backend_cuda` and
  `backend_ascend` give them to each device.
- `workers` and `ray_workers` bring the plug into the processes that LMDeploy starts; `process_guard` ends these.
- `stats_writer` and `load_report` bring back what the layers count; `recording` saves it.
- `balance` lets experts move while the engine serves.
- `pipelines`, `dp_pipeline` and `server` run a model, the last two with the help of `processes`.

Importing this package does not import LMDeploy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from epbackend.config import EPConfig
from epbackend.engines.lmdeploy.balance import check_server, starting_placement
from epbackend.engines.lmdeploy.lmdeploy_config import engine_config
from epbackend.engines.lmdeploy.load_report import LoadReport
from epbackend.engines.lmdeploy.patching import check_version
from epbackend.engines.lmdeploy.plug import disable, enable
from epbackend.engines.placement import finished_placement

if TYPE_CHECKING:
    from epbackend.engines.lmdeploy.dp_pipeline import ReplicatedPipeline
    from epbackend.engines.lmdeploy.pipelines import ExpertParallelPipeline

__all__ = ["LoadReport", "disable", "enable", "engine_config", "pipeline", "serve"]


def pipeline(model: str, config: EPConfig, **kwargs: Any) -> ExpertParallelPipeline | ReplicatedPipeline:
    """A pipeline for a model: a directory, a name in the hub, or the name of a model that comes with epbackend.

    Further arguments go to LMDeploy's pipeline (chat_template_config, log_level, ...). With `engine.dp` > 1 the
    engines run in processes of their own and share the prompts.

    Raises:
        UnavailableError: no such model or device, or LMDeploy is not the release it must be.
        ConfigError: the model does not suit the settings, or memory does not suffice for the cache.
        WorkerError: a worker process died while starting.
    """
    from epbackend.engines.lmdeploy.checks import check_model, check_packages
    from epbackend.engines.lmdeploy.lmdeploy_config import locate

    check_version()
    path, placement = locate(model), finished_placement(config)
    check_model(path, config, placement)
    check_packages(config, serving=False)
    placement = starting_placement(path, config, placement)
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
    **kwargs: Any,
) -> None:
    """Serves a model by LMDeploy's OpenAI API until SIGINT or SIGTERM; see `server.serve_model`.

    `record` is a file for the experts' loads, written now and then and at the end: what a placement is planned on.
    """
    from epbackend.engines.lmdeploy.checks import check_model, check_packages
    from epbackend.engines.lmdeploy.lmdeploy_config import locate
    from epbackend.engines.lmdeploy.recording import Recording
    from epbackend.engines.lmdeploy.server import serve_model

    check_version()
    path, placement = locate(model), finished_placement(config)
    check_model(path, config, placement)
    check_packages(config, serving=True)
    check_server(config)
    placement = starting_placement(path, config, placement)
    recording = Recording.of(record, path, config.ep_size) if record else None
    serve_model(path, config, host, port, placement, recording, **kwargs)

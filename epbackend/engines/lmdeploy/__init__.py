"""The plug into LMDeploy's PyTorch engine.

    with pipeline("tiny-qwen3-moe", config) as pipe:        # the whole of it
        print(pipe(["Once"])[0].text, pipe.load().tokens_per_rank)

    enable(config)                                          # or by hand
    pipe = lmdeploy.pipeline(model, backend_config=engine_config(config))
    ...
    pipe.close(); disable()

One idea a file. `plug` switches on and off; `patching` and `patches` change LMDeploy and put it back; `engine`
turns our settings into LMDeploy's, `locate` finds a model, `checks` refuses what cannot work before anything starts.
`operators` are LMDeploy's requests for experts answered, one for each form of weights, `moe` (with `layers`) what they
share, `graphs` their place in captured prefill; `backends` puts them into each device. `attention` (with
`attention_plan`) and `sampling` are the CPU's other operators, `cuda_on_cpu` and `threads` the rest of it. `workers`
(with `notifier`), `ray_workers`, `engine_process` and `checker` bring the plug into the processes LMDeploy starts,
`guard` ends them, `counters`, `load_writer` and `load` bring back what their layers count. `pipelines`, `replicas` and
`server` (both on `deployment`) run a model; `recording` writes down what its experts did.
Importing this package does not import LMDeploy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from epbackend.config import EPConfig
from epbackend.engines.lmdeploy.engine import engine_config
from epbackend.engines.lmdeploy.load import LoadReport
from epbackend.engines.lmdeploy.patching import check_version
from epbackend.engines.lmdeploy.plug import disable, enable
from epbackend.engines.placement import finished_placement

if TYPE_CHECKING:
    from epbackend.engines.lmdeploy.pipelines import ExpertParallelPipeline
    from epbackend.engines.lmdeploy.replicas import ReplicatedPipeline

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
    from epbackend.engines.lmdeploy.locate import locate

    check_version()
    path, placement = locate(model), finished_placement(config)
    check_model(path, config, placement)
    check_packages(config, serving=False)
    if config.engine.dp > 1:
        from epbackend.engines.lmdeploy.replicas import ReplicatedPipeline

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
    from epbackend.engines.lmdeploy.locate import locate
    from epbackend.engines.lmdeploy.recording import Recording
    from epbackend.engines.lmdeploy.server import serve_model

    check_version()
    path, placement = locate(model), finished_placement(config)
    check_model(path, config, placement)
    check_packages(config, serving=True)
    recording = Recording.of(record, path, config.ep_size) if record else None
    serve_model(path, config, host, port, placement, recording, **kwargs)

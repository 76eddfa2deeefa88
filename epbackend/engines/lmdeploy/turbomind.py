"""TurboMind, LMDeploy's other engine, from the same config (`engine.backend: turbomind`): CUDA only, written in C++.

It spreads experts by itself, a contiguous block to each rank, without replicas and without a hook from Python: the
settings of our data path, of placement and of balance are refused (`config.checks`), and what balances it is a
checkpoint whose experts are numbered for it (`epbackend renumber`). LMDeploy's own pipeline and server run it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from epbackend.checkpoint import check_checkpoint, expert_count, read_model_config
from epbackend.config import EPConfig
from epbackend.engines.lmdeploy.hub import locate
from epbackend.engines.lmdeploy.patching import check_version
from epbackend.engines.lmdeploy.server.front import DRAIN_S, Front
from epbackend.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from lmdeploy import Pipeline, TurbomindEngineConfig


def pipeline(model: str, config: EPConfig, **kwargs: Any) -> Pipeline:
    """LMDeploy's pipeline with TurboMind; further arguments go to it. It reports no load of experts.

    Raises:
        UnavailableError: no GPU, no compiled TurboMind, too few GPUs, or no such model; before anything is loaded.
        ConfigError: TurboMind does not know the model, or cannot spread it so.
    """
    path = _checked(model, config)
    import lmdeploy

    kwargs.setdefault("log_level", config.engine.log_level)
    return lmdeploy.pipeline(path, backend_config=engine_config(config), **kwargs)


def serve(
    model: str,
    config: EPConfig,
    host: str,
    port: int,
    front: Front,
    *,
    record: Path | None = None,
    restart: int = 0,
    drain_seconds: float = DRAIN_S,
    **kwargs: Any,
) -> None:
    """LMDeploy's own server with TurboMind; further arguments go to its `api_server.serve`. Raises as `pipeline` does,
    and ConfigError for what only a server of the PyTorch engine can: record, restart, drain_seconds."""
    for name, asked in (
        ("record", record is not None),
        ("restart", restart > 0),
        ("drain_seconds", drain_seconds != DRAIN_S),
    ):
        if asked:
            raise ConfigError(f"{name}: LMDeploy's server with TurboMind cannot do that; leave it out")
    path = _checked(model, config)
    from lmdeploy.serve.openai import api_server

    arguments = {"log_level": config.engine.log_level, **front.engine_arguments(path), **kwargs}
    with front.shown():
        api_server.serve(
            path,
            backend="turbomind",
            backend_config=engine_config(config),
            server_name=host,
            server_port=port,
            **arguments,
        )


def engine_config(config: EPConfig) -> TurbomindEngineConfig:
    """LMDeploy's configuration of TurboMind.

    Raises:
        ConfigError: the sizes, or a field in `engine.extra`, are none that TurboMind takes.
    """
    from lmdeploy import TurbomindEngineConfig
    from lmdeploy.turbomind.parallel_config import derive_parallel_config

    engine = config.engine
    context = engine.extra.get("cp", 1)
    sizes = parallel_sizes(config)
    settings: dict[str, Any] = {
        **sizes,
        "dtype": engine.dtype,
        "session_len": engine.session_len,
        "max_batch_size": engine.max_batch_size,
        "max_prefill_token_num": engine.max_prefill_token_num,
        "cache_max_entry_count": engine.cache_max_entry_count,
        "cache_block_seq_len": engine.block_size,
        "enable_prefix_caching": engine.enable_prefix_caching,
    }
    try:
        derive_parallel_config(cp=context, **sizes)
        given = {name: value for name, value in settings.items() if value is not None}
        return TurbomindEngineConfig(**given | engine.extra)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"engine.extra: TurboMind refuses it: {' '.join(str(error).split())}") from None


def parallel_sizes(config: EPConfig) -> dict[str, int]:
    """dp, tp, ep and device_num as TurboMind counts them: its tp is that of an attention group, also beside ep.

    device_num is said, because TurboMind would otherwise take fewer GPUs where fewer are free.
    """
    world = config.world_size
    context = config.engine.extra.get("cp", 1)
    shared = config.engine.dp * (context if config.ep_size > 1 and isinstance(context, int) else 1)
    return {
        "dp": config.engine.dp,
        "tp": max(1, world // max(1, shared)),
        "ep": config.ep_size,
        "device_num": world,
    }


def check_machine(config: EPConfig) -> None:
    """Raises UnavailableError where TurboMind cannot run here, and says why."""
    import torch

    here = torch.cuda.device_count()
    if not here:
        raise UnavailableError(
            "engine.backend: turbomind needs a CUDA GPU, and torch finds none here; write engine.backend: pytorch"
        )
    check_extension()
    nodes = config.engine.extra.get("nnodes", 1)
    needed = config.world_size // nodes if isinstance(nodes, int) and nodes > 0 else config.world_size
    if here < needed:
        raise UnavailableError(f"engine.backend: turbomind needs {needed} GPUs here, and torch finds {here}")


def check_extension() -> None:
    """Raises UnavailableError where the compiled part of TurboMind is missing, or does not load."""
    from lmdeploy import turbomind

    if not turbomind.is_available():
        raise UnavailableError(
            f"engine.backend: LMDeploy's compiled TurboMind does not load: {turbomind._import_error}; install "
            "LMDeploy's CUDA wheel and the libraries that it names, or write engine.backend: pytorch"
        )


def check_model(path: str, config: EPConfig) -> None:
    """Raises ConfigError for a model that TurboMind does not know (LMDeploy would take its other engine), or cannot
    spread over so many ranks."""
    from lmdeploy.turbomind.supported_models import is_supported

    if not is_supported(path):
        raise ConfigError(
            f"engine.backend: TurboMind does not know the model at {path}; write engine.backend: pytorch"
        )
    experts = expert_count(read_model_config(Path(path)))
    if config.ep_size > 1 and (experts is None or experts % config.ep_size):
        raise ConfigError(
            f"ep_size: {config.ep_size} does not divide the {experts or 0} experts of {path}; use a divisor"
        )


def _checked(model: str, config: EPConfig) -> str:
    """The model's directory, once all that can be known beforehand is known to be right."""
    check_version()
    check_machine(config)
    path = locate(model)
    check_checkpoint(path, weights=not config.engine.extra.get("empty_init"))
    check_model(path, config)
    return path

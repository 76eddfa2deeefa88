"""Expert parallelism for LMDeploy's PyTorch engine on CUDA, Ascend and CPU, with one config.

import epbackend

config = epbackend.EPConfig.load("configs/cpu-demo.yaml")
with epbackend.pipeline("tiny-qwen3-moe", config) as pipe:
    print(pipe(["The state of the Union is"])[0].text)
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded on first use: the data path must import where pydantic and LMDeploy are not installed.
_HOME = {
    "EPConfig": "epbackend.config",
    "ExpertParallelMoE": "epbackend.moe",
    "enable": "epbackend.engines.lmdeploy",
    "disable": "epbackend.engines.lmdeploy",
    "pipeline": "epbackend.engines.lmdeploy",
    "serve": "epbackend.engines.lmdeploy",
}

__all__ = ["EPConfig", "ExpertParallelMoE", "__version__", "disable", "enable", "pipeline", "serve"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'epbackend' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

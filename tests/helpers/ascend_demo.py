"""`make demo-ascend`: the demo's prompts, answered by a LMDeploy pipeline on NPUs, emulated or real.

LMDeploy and its Ascend backend, dlinfer and torch-npu are the unmodified packages; only CANN is ours, unless the device
is npu. Every token is set against Hugging Face's own float32 `generate`. The last line is one JSON object.

    python -m tests.helpers.ascend_demo --device A2 --ranks 2 --level 2 --dispatcher mc2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

from tests.helpers import ascend


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    engine = {
        "dtype": arguments.dtype,  # LMDeploy has no float32 on Ascend
        "session_len": 512,
        "max_batch_size": 8,
        "cache_gb": 0.1,
        "log_level": "ERROR",
    }
    return {
        "device": "ascend",
        "ep_size": arguments.ranks,
        "ep_level": arguments.level,
        "dispatcher": arguments.dispatcher,
        "engine": engine,
    }


def demo(arguments: argparse.Namespace) -> dict[str, Any]:
    from epbackend.cli.demo import PROMPTS, greedy_tokens, run_lmdeploy
    from epbackend.cli.loads import facts
    from epbackend.config import EPConfig
    from epbackend.engines.lmdeploy.devices import dlinfer_package
    from epbackend.models import resolve

    start = time.perf_counter()
    config = EPConfig.load(settings(arguments))
    run = run_lmdeploy(arguments.model, config, arguments.tokens, talk=True)
    expected = greedy_tokens(resolve(arguments.model), PROMPTS, arguments.tokens)
    return {
        **facts(config, run.load),
        "tokens_identical": run.token_ids == expected,
        "tokens": sum(map(len, run.token_ids)),
        "ranks": config.ep_size,
        "dtype": arguments.dtype,
        "chip": arguments.device,
        "dlinfer": dlinfer_package.installed(),
        "bridged": [
            gap.name
            for name, gap in dlinfer_package.GAPS.items()
            if gap.bridged and dlinfer_package.lacks(name)
        ],
        "torch_npu": version("torch-npu"),
        "torch": version("torch"),
        "lmdeploy": version("lmdeploy"),
        "start_seconds": round(run.start_seconds, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=ascend.PLATFORMS, default="A2")
    parser.add_argument("--model", default="tiny-qwen3-moe")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--dispatcher", default="auto")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.device != ascend.REAL and ascend.MARK not in os.environ:
        if reason := ascend.missing(arguments.device):
            sys.exit(f"skipped: {reason}")
        environment = os.environ | ascend.environment(arguments.device, arguments.ranks)
        command = [sys.executable, "-W", "ignore", "-m", __spec__.name, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment).returncode)
    result = demo(arguments)
    print(json.dumps(result), flush=True)
    sys.exit(0 if result["tokens_identical"] else 1)


if __name__ == "__main__":
    main()

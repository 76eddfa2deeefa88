"""A MoE model run by transformers, its experts spread over ranks, each with prompts of its own.

    torchrun --nproc-per-node 2 examples/transformers_torchrun.py [MODEL] [CONFIG.yaml]

Without a config: an all-to-all between the ranks, experts in order. `ep_size` and `engine.dp` are the number of ranks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from epbackend import EPConfig
from epbackend.config.files import read_mapping
from epbackend.device import get_device
from epbackend.engines.transformers import distributed_config, spread_experts
from epbackend.models import resolve
from epbackend.placement import Loads
from epbackend.placement.formats import write

PROMPTS = ("Fellow-Citizens of the Senate", "Call me Ishmael", "def bisect_left(a, x")


def main(model: str = "tiny-qwen3-moe", config_file: str | None = None) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    settings = read_mapping(config_file) if config_file else {"device": "cpu", "ep_level": 2}
    config = EPConfig.load({**settings, "ep_size": ranks, "engine": {"dp": ranks}})

    path = resolve(model)
    spread = distributed_config(config)  # from here on this rank's own device is the current one
    place = get_device(config.device).torch_device(int(os.environ["LOCAL_RANK"]))
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=spread, device_map=place)
    tokenizer = AutoTokenizer.from_pretrained(path)
    experts = spread_experts(model)
    rank = experts.ranks.rank

    for first in range(0, len(PROMPTS), ranks):
        if first + rank >= len(PROMPTS):
            experts.join_generate()  # nothing to answer, but the others need this rank's experts
            continue
        inputs = tokenizer(PROMPTS[first + rank], return_tensors="pt").to(place)
        answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        print(f"rank {rank}: {tokenizer.decode(answer[0])!r}", flush=True)

    load = experts.load()  # all ranks together
    if rank == 0:
        print(f"expert tokens of each rank: {load.tokens_per_rank}")
        loads = Loads.of(load.loads_YE(model.config.num_hidden_layers, ranks), ["example"])
        write(loads, Path("loads.json"), "sglang")  # what `placement.loads` in a config plans on
    experts.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    main(*sys.argv[1:])

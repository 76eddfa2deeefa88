"""A model run by transformers on several processes of this machine, which answer prompts together and end.

For a deployment start a script by torchrun instead (examples/transformers_torchrun.py); this is for the demo and for
measurements on a CPU. Each rank has prompts of its own.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessException
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from epbackend.config import EPConfig
from epbackend.device import get_device
from epbackend.engines.load_report import LoadReport
from epbackend.engines.transformers import distributed_config, spread_experts
from epbackend.errors import WorkerError


@dataclass(frozen=True)
class Generated:
    """What the ranks answered, prompt by prompt."""

    token_ids: list[list[int]]
    texts: list[str]
    seconds: float
    """From the first prompt to the last answer."""
    load: LoadReport


def generate(model_path: str, config: EPConfig, prompts: Sequence[str], max_new_tokens: int) -> Generated:
    """Each prompt continued greedily in float32 by exactly so many tokens, on `ep_size` processes of this machine.

    `engine.dp` is `ep_size`: a batch for each rank.

    Raises:
        WorkerError: a process failed; its own error is in the text.
    """
    with tempfile.TemporaryDirectory(prefix="epbackend-") as folder:
        multiprocessing.set_forkserver_preload(
            [__name__]
        )  # forks of one that has loaded torch and transformers
        arguments = (config.ep_size, folder, model_path, config.to_json(), list(prompts), max_new_tokens)
        try:
            multiprocessing.start_processes(_rank, arguments, config.ep_size, start_method="forkserver")
        except ProcessException as error:
            raise WorkerError(f"a rank failed: {str(error).strip()}") from error
        parts = [pickle.loads(_answers(folder, rank).read_bytes()) for rank in range(config.ep_size)]
    found = {number: answer for answers, _, _ in parts for number, answer in answers.items()}
    token_ids, texts = zip(*(found[number] for number in range(len(prompts))), strict=True)
    return Generated(list(token_ids), list(texts), max(seconds for _, seconds, _ in parts), parts[0][2])


def _rank(
    rank: int, ranks: int, folder: str, model_path: str, config_text: str, prompts: list[str], new: int
) -> None:
    """One process: its prompts one after the other, beside those of the others."""
    disable_progress_bar()
    set_verbosity_error()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    config = EPConfig.from_json(config_text)
    if ranks > 1:
        backend = get_device(config.device).collective_backend
        store = f"file://{folder}/store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks)
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, distributed_config=distributed_config(config)
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    experts = spread_experts(model)
    start = time.perf_counter()
    answers = {}
    for first in range(0, len(prompts), ranks):
        if (number := first + rank) >= len(prompts):
            experts.join_generate()
            continue
        inputs = tokenizer(prompts[number], return_tensors="pt")
        done = model.generate(
            **inputs,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        token_ids = done[0, inputs.input_ids.shape[1] :].tolist()
        answers[number] = token_ids, tokenizer.decode(token_ids)
    seconds = time.perf_counter() - start
    load = experts.load()
    experts.close()
    if ranks > 1:
        dist.destroy_process_group()
    _answers(folder, rank).write_bytes(pickle.dumps((answers, seconds, load)))


def _answers(folder: str, rank: int) -> Path:
    return Path(folder) / f"answers-{rank}.pickle"

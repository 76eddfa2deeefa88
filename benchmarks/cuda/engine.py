"""LMDeploy's whole engine alone and with the plug, in turns on one GPU, at the shape of Qwen3-30B.

    python -m benchmarks.cuda.engine [--turns 5] [--seconds 240] [--layers 8] [--only WORDS] [--out FILE]

Both engines live at once, each in a process of its own, and are asked one after the other, first this one, then that:
what the host or the clocks do meanwhile happens to both. An engine that is not asked computes nothing. They have the
same settings, and the same random weights without a checkpoint; each turn brings other texts. What is compared are
neighbours: the median over turns of the plug's time as a share of LMDeploy's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import save_file

from benchmarks.cuda.report import Report, machine_facts

ALONE, PLUG = "LMDeploy", "with the plug"
RESULTS = Path(__file__).parents[1] / "results"
TOKENIZER = Path(__file__).parents[2] / "epbackend/models/tiny_qwen3_moe"
START_S = 240.0
"""In which an engine must have started; the first also compiles Triton's kernels."""
TEXT = "One day, a girl named Sue went to the park with her dog. "

SHAPES: dict[str, dict[str, int]] = {
    "qwen3-30b": {
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "tiny": {  # for trying this file without a GPU
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


@dataclass(frozen=True)
class Case:
    """Requests that are sent at once."""

    requests: int
    new_tokens: int
    sentences: int
    """Of each text."""

    @property
    def name(self) -> str:
        return f"{self.requests} x {self.new_tokens}" + (", long texts" if self.sentences > 1 else "")

    def texts(self, turn: int) -> list[str]:
        return [f"{turn} {request} " + TEXT * self.sentences for request in range(self.requests)]


CASES = (Case(64, 128, 1), Case(1, 128, 1), Case(256, 128, 1), Case(16, 128, 1), Case(64, 1, 20))
"""The most telling ones first; the last is prefill."""


def write_model(folder: Path, shape: str, layers: int) -> None:
    """A checkpoint whose file of weights holds none (`random_weights`), with the tokenizer of a tiny model."""
    for file in TOKENIZER.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    settings = json.loads((TOKENIZER / "config.json").read_text())
    settings.pop("num_local_experts")
    settings |= SHAPES[shape] | {"num_hidden_layers": layers, "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({}, folder / "model.safetensors")


def random_weights(model: torch.nn.Module, *_: Any, device: torch.device | None = None, **__: Any) -> None:
    """Stands for LMDeploy's `load_model_weights`: the same weights in every process, by their names."""
    from lmdeploy.pytorch.weight_loader.model_weight_loader import process_weights_after_loading

    model.to(device)
    with torch.inference_mode():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                draw = torch.Generator(weight.device).manual_seed(crc32(name.encode()))
                weight.normal_(0, 0.02, generator=draw)
            else:
                weight.fill_(1)
    model.eval()
    process_weights_after_loading(model)


def start_engine(side: str, folder: str, device: str) -> Any:
    """A pipeline, both kinds with the same engine configuration."""
    import lmdeploy
    from lmdeploy.pytorch.engine.model_agent import agent

    import epbackend
    from epbackend import EPConfig
    from epbackend.engines.lmdeploy.lmdeploy_config import engine_config

    agent.load_model_weights = random_weights
    engine = {"dtype": "bfloat16", "session_len": 2048, "max_batch_size": 256, "cache_blocks": 2048}
    config = EPConfig.load({"device": device, "ep_size": 1, "ep_level": 1, "engine": engine})
    if side == PLUG:
        return epbackend.pipeline(folder, config)
    return lmdeploy.pipeline(folder, backend_config=engine_config(config), log_level=config.engine.log_level)


def serve(side: str, folder: str, device: str, asked: Connection) -> None:
    """A process with one engine: answers each (case, turn) with what it took, until it is sent None."""
    from lmdeploy import GenerationConfig

    began = time.perf_counter()
    pipe = start_engine(side, folder, device)
    asked.send({"start_s": time.perf_counter() - began})
    while (request := asked.recv()) is not None:
        case, turn = request
        settings = GenerationConfig(max_new_tokens=case.new_tokens, do_sample=False, ignore_eos=True)
        texts = case.texts(turn)
        began = time.perf_counter()
        answers = pipe(texts, gen_config=settings, do_preprocess=False)
        ms = (time.perf_counter() - began) * 1e3
        tokens_in = sum(each.input_token_len for each in answers)
        asked.send({"ms": ms, "in": tokens_in, "out": sum(len(each.token_ids) for each in answers)})
    pipe.close()


class Engine:
    """The other end of `serve`. Use it as a context manager."""

    def __init__(self, side: str, folder: str, device: str) -> None:
        self._connection, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(side, folder, device, theirs)
        )
        self._process.start()
        theirs.close()
        self._side = side

    def answer(self, timeout_s: float = START_S) -> dict[str, Any]:
        """Raises RuntimeError where the engine ended, or takes longer than that."""
        try:
            if self._connection.poll(timeout_s):
                return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"the engine {self._side} ended with exit code {self._process.exitcode}; its log is above"
            ) from None
        raise RuntimeError(f"the engine {self._side} did not answer in {timeout_s:.0f} s")

    def ask(self, case: Case, turn: int) -> dict[str, Any]:
        self._connection.send((case, turn))
        return self.answer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._process.is_alive():
            self._connection.send(None)
            self._process.join(timeout=20)
        self._process.terminate()
        self._process.join(timeout=10)
        self._process.kill()


def race(
    sides: Mapping[str, Callable[[Case, int], dict[str, Any]]],
    cases: tuple[Case, ...],
    turns: int,
    deadline: float,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Every case by every side, turn after turn, a row each; no turn of a case begins behind the deadline.

    Turn 0 warms up: graphs are captured and kernels compiled for its sizes.
    """
    for turn in range(turns + 1):
        for case in cases:
            if time.monotonic() > deadline:
                return
            order = list(sides)[:: 1 if turn % 2 else -1]
            for side in order:
                write({"case": case.name, "by": side, "turn": turn, **sides[side](case, turn)})


def table(rows: list[dict[str, Any]]) -> str:
    """Best milliseconds of each side, and the median over turns of the second one's share of the first."""
    sides = list(dict.fromkeys(row["by"] for row in rows))
    lines = [f"{'requests x new tokens':24}" + "".join(f"{side:>16}" for side in sides) + "   plug / alone"]
    for case in dict.fromkeys(row["case"] for row in rows):
        ms = {
            side: {r["turn"]: r["ms"] for r in rows if (r["case"], r["by"]) == (case, side)} for side in sides
        }
        pairs = [turn for turn in ms[sides[0]] if turn and all(turn in each for each in ms.values())]
        if not pairs:
            continue
        line = f"{case:24}" + "".join(f"{min(ms[side][turn] for turn in pairs):13.1f} ms" for side in sides)
        if {ALONE, PLUG} <= set(sides):
            shares = [ms[PLUG][turn] / ms[ALONE][turn] for turn in pairs]
            line += f"{median(shares):9.3f}  ({min(shares):.3f} to {max(shares):.3f}, {len(pairs)} turns)"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.engine")
    parser.add_argument("--turns", type=int, default=5, help="of each case and side, after one to warm up")
    parser.add_argument("--seconds", type=float, default=240, help="no turn begins later than that")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the plug's side alone"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "cuda-engine.json")
    asked = parser.parse_args()
    deadline = time.monotonic() + asked.seconds
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # A process for each engine, before it starts: it imports all of LMDeploy to see whether the GPU works.
    os.environ.setdefault("LMDEPLOY_ENABLE_CHECK_ENV", "0")
    on_gpu = asked.device == "cuda"
    machine = machine_facts() if on_gpu else {"gpu": None}
    report = Report(asked.out, machine | {"shape": asked.shape, "layers": asked.layers})
    cases = tuple(case for case in CASES if asked.only in case.name)

    def write(row: dict[str, Any]) -> None:
        report.add(row)
        print(json.dumps(row), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), asked.shape, asked.layers)
        sides: dict[str, Callable[[Case, int], dict[str, Any]]] = {}
        with contextlib.ExitStack() as engines:
            for side in (ALONE, PLUG) if on_gpu else (PLUG,):
                engine = engines.enter_context(Engine(side, folder, asked.device))
                started = engine.answer()  # one after the other: each takes its share of what memory is free
                print(f"{side}: started in {started['start_s']:.0f} s", flush=True)
                sides[side] = engine.ask
            race(sides, cases, asked.turns, deadline, write)
    print(table(report.rows))


if __name__ == "__main__":
    main()

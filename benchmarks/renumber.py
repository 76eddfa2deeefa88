"""How fast a checkpoint is renumbered, beside `cp -r` of the same folder: both read from the page cache, in turns.

`python -m benchmarks.renumber [GIGABYTES] [FOLDER]`: 2 GB by default, in a temporary folder. Experts are stored one by
one (only names change), and stacked (rows change places). Results go to `renumber`.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import save_file

from benchmarks.report import OURS, PEER, command_line, print_table, save
from epbackend.placement.loads import Loads
from epbackend.placement.warmup import warm_up
from epbackend.renumber import plan_renumbering, write

EXPERTS, HIDDEN, WIDTH = 128, 2048, 768  # of Qwen3-30B-A3B, whose layer has 1.2 GB of experts in bfloat16
PARTS = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
REPETITIONS = 3


def make(folder: Path, gigabytes: float, *, stacked: bool) -> Path:
    """A checkpoint of about that size with a layer in each file, random bytes as 16-bit numbers."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    layer_bytes = EXPERTS * sum(2 * rows * columns for rows, columns in PARTS.values())
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    weight_map = {}
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp"
        tensors = {f"{mlp}.gate.weight": _drawn(draw, (EXPERTS, HIDDEN))}
        for part, shape in PARTS.items():
            if stacked:
                tensors[f"{mlp}.experts.{part}"] = _drawn(draw, (EXPERTS, *shape))
            else:
                tensors |= {f"{mlp}.experts.{e}.{part}.weight": _drawn(draw, shape) for e in range(EXPERTS)}
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"num_experts": EXPERTS, "num_hidden_layers": layers}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def main(gigabytes: float, folder: str | None) -> None:
    """Measures, prints a table, and saves it."""
    warm_up()
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for form in ("one by one", "stacked"):
            model = make(Path(temporary) / "model", gigabytes, stacked=form == "stacked")
            size = sum(file.stat().st_size for file in model.iterdir())
            out = Path(temporary) / "out"
            layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
            loads = Loads.of(np.random.default_rng(1).lognormal(4, 1, (layers, EXPERTS)).round())

            def copy(model: Path = model, out: Path = out) -> None:
                subprocess.run(["cp", "-r", model, out], check=True)

            def renumber(model: Path = model, out: Path = out, loads: Loads = loads) -> None:
                write(plan_renumbering(str(model), loads, ranks=8), out)

            copy()  # so that all is in the page cache
            shutil.rmtree(out)
            seconds = {"cp -r": [], "renumber": []}
            for _ in range(REPETITIONS):
                seconds["cp -r"].append(timed(copy, out))
                seconds["renumber"].append(timed(renumber, out))
            for name, each in seconds.items():
                rows.append(
                    {"experts": form, "what": name, "GB": size / 1e9, "seconds": statistics.median(each),
                     "GB/s": size / 1e9 / statistics.median(each)}
                )  # fmt: skip
            shutil.rmtree(model)
    print_table("renumbering a checkpoint, median of 3", rows)
    save("renumber", {"rows": rows}, picture(rows))


def timed(work: Callable[[], None], out: Path) -> float:
    """Seconds until `out` is written, planning included; it is removed then."""
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def picture(rows: list[dict]) -> Figure:
    """GB/s as bars."""
    figure = Figure(figsize=(5, 2.2))
    axes = figure.subplots()
    labels = [f"{row['what']}, {row['experts']}" for row in rows]
    axes.barh(labels, [row["GB/s"] for row in rows], color=[PEER, OURS] * 2)
    axes.set_xlabel("GB/s")
    axes.invert_yaxis()
    return figure


def _drawn(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return draw.integers(0, 1 << 16, shape, dtype=np.uint16)


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("gigabytes", nargs="?", type=float, default=2.0, help="size of each checkpoint")
    parser.add_argument(
        "folder", nargs="?", help="whose file system is measured, instead of that of temporary files"
    )
    given = parser.parse_args()
    main(given.gigabytes, given.folder)

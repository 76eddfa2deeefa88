"""What every measurement does: its command line, and with its figures machine, table, JSON, picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from epbackend.kernels.cpu.choice import processor

RESULTS = Path(__file__).parent / "results"
OURS, PEER = "#1b6ca8", "#b9c0c7"


def command_line(what: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows `what`, the docstring of the benchmark, as it is written."""
    return argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)


def machine() -> dict[str, Any]:
    """Where the figures come from; they mean nothing without it."""
    return {
        "date": date.today().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 1),
    }


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """One line a row, one column a key of the first row."""
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="right" if isinstance(rows[0][key], int | float) else "left")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console()
    Console(width=console.width if console.is_terminal else 200).print(table)


def figure(value: float, target: float | None, digits: int = 4) -> str:
    """The value, and whether it meets its target if there is one."""
    text = f"{value:.{digits}f}"
    return text if target is None else f"{text} ({'ok' if value <= target else 'MISSED'}: {target:g})"


def save(name: str, figures: dict[str, Any], picture: Figure) -> None:
    """Write results/NAME.json and results/NAME.png."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")
    picture.savefig(RESULTS / f"{name}.png", dpi=130, bbox_inches="tight")
    Console().print(f"written: {RESULTS / name}.json and .png")

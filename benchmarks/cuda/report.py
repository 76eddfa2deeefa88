"""What a run on a GPU has measured so far, in one JSON file that is whole after every row."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton


def machine_facts() -> dict[str, Any]:
    """Where and when; the GPU must be there."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "host_cores": os.cpu_count(),
    }


class Report:
    """{"machine": facts, "rows": [...]} in a file, written anew with each row: a run may be cut off at any time."""

    def __init__(self, file: Path, machine: dict[str, Any]) -> None:
        self.file, self.machine = file, machine
        self.rows: list[dict[str, Any]] = []
        file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        whole = self.file.with_suffix(".part")
        whole.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")
        whole.replace(self.file)

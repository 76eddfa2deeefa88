"""Emulated NPUs for every process that Python starts with this folder in PYTHONPATH, as if they were in the machine.

The first import of torch_npu, which torch itself makes where it finds one, loads the emulated CANN before the wheel
(`tests.helpers.cann`). EMULATED_NPUS says which chip and how many: "A3:2".
"""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder


class EmulationFirst(MetaPathFinder):
    """Finds nothing; whoever looks for torch_npu finds it behind the emulated CANN."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torch_npu":
            sys.meta_path.remove(self)
            from tests.helpers import cann

            chip, _, count = os.environ["EMULATED_NPUS"].partition(":")
            cann.load_libraries(chip, int(count))
        return None


if "EMULATED_NPUS" in os.environ:
    sys.meta_path.insert(0, EmulationFirst())

"""The compiled searches: when they are loaded, and that a change of their source is noticed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from epbackend.placement import search

MODULES = sorted(Path(search.__file__).parent.glob("l*.py"))


def test_placement_is_imported_without_numba():
    code = "import sys, epbackend.placement; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_no_compiled_function_comes_from_another_module(module):
    """numba keeps machine code by the file of its entry function, so a change in another file would go unnoticed."""
    imported = {
        name.name
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("epbackend")
        for name in node.names
    }
    assert imported <= {"entry", "inner"}

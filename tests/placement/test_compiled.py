import os
import subprocess
import sys

from epbackend.placement.compiled import _forget_stale


def test_placement_comes_without_numba():
    code = "import sys, epbackend.placement; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_code_older_than_any_source_is_forgotten(tmp_path):
    cache = tmp_path / "__pycache__"
    cache.mkdir()
    for path, age in (
        (tmp_path / "a.py", 10),
        (tmp_path / "b.py", 5),
        (cache / "old.nbi", 7),
        (cache / "new.nbi", 2),
    ):
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    _forget_stale(tmp_path)
    assert [path.name for path in cache.iterdir()] == ["new.nbi"]

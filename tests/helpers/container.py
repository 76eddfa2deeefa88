"""A command in the surroundings of a container: a mount namespace in which only a small /tmp can be written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

# Python itself may lie in a home that others may not enter: it is mounted again below an open folder of that name.
_SCRIPT = """
set -e
python=$1 home=$2 megabytes=$3; shift 3
mount --make-rprivate /
if ! setpriv --reuid 65534 --regid 65534 --clear-groups test -x "$python/bin"; then
  mount -t tmpfs -o mode=755,size=1m box /mnt
  mkdir /mnt/python
  mount --bind "$python" /mnt/python
  mount -t tmpfs -o mode=755,size=1m box "$home"
  mkdir -p "$python"
  mount --bind /mnt/python "$python"
  mount -o remount,ro "$home"
fi
mount -t tmpfs -o mode=1777,size="$megabytes"m box /tmp
mount -o remount,bind,ro /
cd /tmp
exec setpriv --reuid 65534 --regid 65534 --clear-groups \\
  env -i PATH=/usr/bin:/bin HOME=/nonexistent LANG=C.UTF-8 "$@"
"""
_TOOLS = ("unshare", "setpriv", "mount")


def contained(*command: str, megabytes: int = 16) -> list[str]:
    """The command as another user, with a read-only root, no home, and a /tmp of so many megabytes."""
    python = Path(sys.base_prefix).resolve()
    home = Path("/", *python.parts[1:2])
    return [
        "unshare",
        "--mount",
        "sh",
        "-c",
        _SCRIPT,
        "box",
        str(python),
        str(home),
        str(megabytes),
        *command,
    ]


@cache
def no_containers() -> str | None:
    """Why `contained` cannot run here; None if it can."""
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found"
    tried = subprocess.run(contained("true"), capture_output=True, text=True)
    return tried.stderr.strip() or "it fails" if tried.returncode else None

"""Compare what is installed in this environment with the pins under requirements/; used by `make setup`.

Exits with 1 and one line a difference, or prints one line when all is as pinned.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker

REQUIREMENTS = Path(__file__).parent.parent / "requirements"


def pins(*files: str) -> dict[str, str]:
    """The `name==version` lines of requirement files that hold for this platform, as {name: version}."""
    lines = "\n".join((REQUIREMENTS / file).read_text() for file in files)
    found = re.findall(r"^([\w.-]+)==([^\s;]+)(?: *; *([^#\n]+))?", lines, flags=re.MULTILINE)
    return {
        name: version for name, version, marker in found if not marker or Marker(marker.strip()).evaluate()
    }


def differences(pinned: dict[str, str]) -> list[str]:
    found = []
    for name, version in pinned.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name}: {version} is pinned, nothing is installed")
            continue
        # torch's CPU build calls itself 2.13.0+cpu
        if installed.partition("+")[0] != version:
            found.append(f"{name}: {version} is pinned, {installed} is installed")
    return found


def main() -> int:
    pinned = pins("cpu.txt", "lmdeploy.txt")
    found = differences(pinned)
    if not found and _torch_is_cuda_build():
        found = [
            "torch: the CUDA build was installed (several GB). For the CPU build: "
            "make distclean && make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu"
        ]
    print("\n".join(found) or f"set-up: {len(pinned)} packages are as pinned")
    return 1 if found else 0


def _torch_is_cuda_build() -> bool:
    import torch

    return torch.version.cuda is not None


if __name__ == "__main__":
    sys.exit(main())

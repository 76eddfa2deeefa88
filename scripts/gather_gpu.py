"""Gather into one folder what a GPU machine without network needs to run LMDeploy with epbackend.

    python scripts/gather_gpu.py                          # out/gpu, for Python 3.12 on x86-64 Linux (glibc 2.28)
    python scripts/gather_gpu.py --python 3.11 --with transformers numpy ray

The folder holds LMDeploy's Python part, the wheels of what its PyTorch engine imports beside the packages that are
taken to be installed there (--there), and this checkout with its tiny models. scripts/gpu_folder/README.md tells how to
use it. Versions are those pinned under requirements/; LMDeploy's files come from this environment (`make setup`). The
checkout is left out by --no-checkout, where another one will be on the machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from check_setup import pins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FIXED = Path(__file__).parent / "gpu_folder"
THERE = ("torch", "triton", "transformers", "numpy")
ENGINE = (
    *("mmengine-lite", "pybase64", "pyzmq", "shortuuid", "prometheus_client", "pillow", "requests", "tqdm"),
    *("xgrammar", "apache-tvm-ffi", "psutil", "pydantic", "pyyaml", "rich", "cloudpickle"),
    *("pytest", "pytest-timeout", "pytest-xdist", "execnet", "hypothesis"),
)
"""What is imported while an engine runs and is tested. Plans for placements want numba, the commands typer and
matplotlib, dp > 1 ray: --with."""
PINS = ("cpu.txt", "lmdeploy.txt", "gpu.txt")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)] + ["manylinux2014_x86_64"]


def wanted(python: str, there: Iterable[str], extra: Iterable[str]) -> dict[str, str]:
    """{name: version} of the wheels to fetch: all that is needed, as the metadata installed here tell.

    What is installed on the machine counts with all that it needs, which its own installation has brought.
    """
    pinned = {canonicalize_name(name): version for name, version in pins(*PINS).items()}
    not_here = {canonicalize_name(name) for name in pins("gpu.txt")}
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found = {canonicalize_name(name) for name in there}
    waiting, fetched = [canonicalize_name(name) for name in (*ENGINE, *extra)], {}
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            fetched[name] = pinned[name]
            needs = (
                [] if name in not_here else [Requirement(line) for line in distribution(name).requires or []]
            )
            waiting += [
                canonicalize_name(r.name) for r in needs if not r.marker or r.marker.evaluate(environment)
            ]
    return dict(sorted(fetched.items()))


def download(packages: dict[str, str], python: str, wheels: Path) -> None:
    """Fetch the wheels, without what they need: that is in the list already."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += [
        "--only-binary=:all:",
        "--implementation",
        "cp",
        "--python-version",
        python,
        "--dest",
        str(wheels),
    ]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *(f"{name}=={version}" for name, version in packages.items())], check=True)


def pack_lmdeploy(wheels: Path) -> None:
    """LMDeploy as a wheel without its compiled files, which are TurboMind's."""
    installed = distribution("lmdeploy")
    compiled = (".so", ".a", ".pyc")
    with zipfile.ZipFile(
        wheels / f"lmdeploy-{installed.version}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED
    ) as archive:
        for file in installed.files or []:
            inside = not file.as_posix().startswith("..")  # else a script of the environment's bin
            if inside and file.suffix not in compiled:
                archive.write(file.locate(), file.as_posix())


def copy_checkout(target: Path) -> None:
    """The files that git tracks, as they are now."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, tracked.stdout.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def gather(out: Path, python: str, there: list[str], extra: list[str], checkout: bool = True) -> None:
    """Make the folder anew."""
    shutil.rmtree(out, ignore_errors=True)
    wheels = out / "wheels"
    wheels.mkdir(parents=True)
    there = sorted(set(there) - set(extra))
    packages = wanted(python, there, extra)
    download(packages, python, wheels)
    pack_lmdeploy(wheels)
    if checkout:
        copy_checkout(out / "epbackend")
    shutil.copytree(FIXED, out, dirs_exist_ok=True)
    facts = {"python": python, "there": there, "wheels": packages}
    (out / "gathered.json").write_text(json.dumps(facts, indent=1))


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--python", default="3.12", help="the GPU machine's, as 3.12")
    parser.add_argument(
        "--there", nargs="*", default=list(THERE), metavar="NAME", help="installed on that machine"
    )
    parser.add_argument(
        "--with", nargs="*", default=[], dest="extra", metavar="NAME", help="gather these as well"
    )
    parser.add_argument(
        "--no-checkout", dest="checkout", action="store_false", help="leave this checkout out"
    )
    parser.add_argument(
        "--limit-mb", type=float, default=45.0, help="the most that the folder may take (MiB)"
    )
    given = parser.parse_args()
    if given.out.exists() and not (given.out / "gathered.json").exists():
        return f"{given.out} exists and was not made by this script: name another folder with --out"
    gather(given.out, given.python, given.there, given.extra, given.checkout)
    size = megabytes(given.out)
    if size > given.limit_mb:
        largest = sorted((given.out / "wheels").iterdir(), key=lambda file: -file.stat().st_size)[:5]
        names = ", ".join(f"{file.name} {file.stat().st_size / 2**20:.1f}" for file in largest)
        return (
            f"{given.out} takes {size:.0f} MiB, and --limit-mb is {given.limit_mb:g}. The largest: {names}. "
            "Name what the machine has with --there, or raise the limit"
        )
    print(
        f"{given.out}: {size:.0f} MiB for Python {given.python}; . {given.out}/activate.sh on the GPU machine"
    )
    return None


if __name__ == "__main__":
    sys.exit(main())

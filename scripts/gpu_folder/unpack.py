"""Unpack the wheels beside this file into a directory and compile them, once: python3 unpack.py SITE.

Needs nothing but Python. Compiled on all cores, because each of an engine's processes would do it again otherwise.
"""

import compileall
import json
import shutil
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

HERE = Path(__file__).parent


def trouble() -> str | None:
    """Why the wheels are not for this Python, or what they need is missing; None if all is well."""
    gathered = json.loads((HERE / "gathered.json").read_text())
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version != gathered["python"]:
        return f"the wheels are for Python {gathered['python']}, and this is {version}: gather with --python {version}"
    missing = []
    for name in gathered["there"]:
        try:
            distribution(name)
        except PackageNotFoundError:
            missing.append(name)
    return (
        f"not installed here: {', '.join(missing)}; gather with --with {' '.join(missing)}"
        if missing
        else None
    )


def unpack(wheel: Path, site: Path) -> None:
    """What `pip install --target` does, without scripts and compiled files."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for data in site.glob("*.data"):
        for part in ("purelib", "platlib"):
            if (data / part).is_dir():
                shutil.copytree(data / part, site, dirs_exist_ok=True)
        shutil.rmtree(data)


def main(site: Path) -> str | None:
    if reason := trouble():
        return reason
    wheels = sorted((HERE / "wheels").glob("*.whl"))
    done = site / "unpacked.json"
    names = [wheel.name for wheel in wheels]
    if not done.exists() or json.loads(done.read_text()) != names:
        for wheel in wheels:
            unpack(wheel, site)
        # A few files are for other versions of Python, which is no matter.
        compileall.compile_dir(site, quiet=2, workers=0)
        done.write_text(json.dumps(names))
    return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

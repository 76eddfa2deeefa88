"""Compile the emulated CANN libraries against the headers in the torch-npu wheel, once for each content."""

from __future__ import annotations

import fcntl
import hashlib
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
LIBRARIES = {
    "libascendcl.so": ("runtime.cpp",),
    "libacl_op_compiler.so": ("compiler.cpp",),
    "libhccl.so": ("communicator.cpp", "collectives.cpp"),
    "libopapi.so": ("objects.cpp",),
    "libge_runner.so": (),
    "libgraph.so": (),
    "libacl_tdt_channel.so": (),
    "libatb.so": (),
}
"""Each library that the wheel is linked with or opens, and what it is made of; the empty ones are only asked for."""

HARMLESS = ("Msprof", "aclAppLog")
"""Profiling and logging: their stubs succeed and do nothing."""


def missing() -> str | None:
    """Why the libraries cannot be built here; None if they can."""
    if platform.machine() != "x86_64":
        return f"the emulated CANN has trampolines for x86_64 only, and this is {platform.machine()}"
    absent = [tool for tool in ("g++", "nm") if shutil.which(tool) is None]
    if absent:
        return f"the emulated CANN is C++ and needs {' and '.join(absent)} (apt-get install g++ binutils)"
    return None


def build(wheel: Path, operators: Iterable[str]) -> Path:
    """The folder of the libraries, for the wheel unpacked in `wheel` and the aclnn `operators` that Python emulates."""
    operators = sorted(operators)
    sources = sorted(NATIVE.iterdir())
    version = next(wheel.glob("torch_npu-*.dist-info")).name
    content = [Path(__file__).read_bytes(), *(source.read_bytes() for source in sources)]
    key = hashlib.sha256(b"\0".join([*content, version.encode(), *(name.encode() for name in operators)]))
    done = wheel / "cann" / key.hexdigest()[:16]
    done.parent.mkdir(exist_ok=True)
    with (done.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ranks start together
        if not done.exists():
            half_done = done.with_suffix(".building")
            shutil.rmtree(half_done, ignore_errors=True)
            half_done.mkdir()
            _build(wheel / "torch_npu", operators, half_done)
            half_done.rename(done)
    return done


def _build(torch_npu: Path, operators: list[str], out: Path) -> None:
    (out / "trampolines.S").write_text(_trampolines(operators))
    for library, sources in LIBRARIES.items():
        inputs = [str(NATIVE / source) for source in sources]
        if library == "libopapi.so":
            inputs.append(str(out / "trampolines.S"))
        _compile(torch_npu, out / library, inputs)
    # The wheel names functions that the tests never reach: they get stubs that fail and say so.
    (out / "stubs.c").write_text(_stubs(_undefined(torch_npu) - _defined(out / "libascendcl.so")))
    _run("g++", "-x", "c", "-c", "-fPIC", "-w", "-o", str(out / "stubs.o"), str(out / "stubs.c"))
    _compile(torch_npu, out / "libascendcl.so", [str(NATIVE / "runtime.cpp"), str(out / "stubs.o")])


def _compile(torch_npu: Path, library: Path, inputs: list[str]) -> None:
    include = torch_npu / "include"
    headers = [f"-I{include}", f"-I{include / 'third_party' / 'hccl' / 'inc'}"]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", *headers, f"-Wl,-soname,{library.name}"]
    _run("g++", *flags, "-o", str(library), *(inputs or ["-x", "c++", "/dev/null"]), "-lrt")


def _trampolines(operators: list[str]) -> str:
    """Each operator exports NAME and NAMEGetWorkspaceSize, which jump through a table that Python fills."""
    symbols = table_symbols(operators)
    lines = ["\t.text"]
    for index, symbol in enumerate(symbols):
        lines += [f"\t.globl {symbol}", f"\t.type {symbol},@function", f"{symbol}:"]
        lines += ["\tmovq operator_table@GOTPCREL(%rip), %r11", f"\tjmp *{8 * index}(%r11)"]
    lines += ["\t.data", "\t.globl operator_table", "\t.balign 8", "operator_table:"]
    lines += [f"\t.zero {8 * len(symbols)}", '\t.section .note.GNU-stack,"",@progbits']
    return "\n".join(lines) + "\n"


def table_symbols(operators: Iterable[str]) -> list[str]:
    """The symbols of the operator table, in its order."""
    return [symbol for name in sorted(operators) for symbol in (f"{name}GetWorkspaceSize", name)]


def _stubs(symbols: set[str]) -> str:
    lines = ["#include <stdio.h>"]
    for symbol in sorted(symbols):
        said = f'fprintf(stderr, "[emulated CANN] {symbol} is not emulated\\n"); return 507899;'
        lines.append(f"int {symbol}(void) {{ {'return 0;' if symbol.startswith(HARMLESS) else said} }}")
    return "\n".join(lines) + "\n"


def _undefined(torch_npu: Path) -> set[str]:
    """The CANN functions that the wheel's libraries need."""
    names = ("libtorch_npu.so", "libtensorpipe.so", "libop_plugin_atb.so")
    libraries = [*(torch_npu / "lib" / name for name in names), *torch_npu.glob("_C*.so")]
    prefixes = ("acl", "rt", "Msprof", "_ZN3atb")
    needed = {name for library in libraries for name in _symbols(library, "--undefined-only", "U")}
    return {name for name in needed if name.startswith(prefixes)}


def _defined(library: Path) -> set[str]:
    return set(_symbols(library, "--defined-only", "T"))


def _symbols(library: Path, which: str, kind: str) -> Iterable[str]:
    for line in _run("nm", "-D", which, str(library)).splitlines():
        *_, found, name = line.split()
        if found == kind:
            yield name.split("@")[0]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building the emulated CANN failed: {' '.join(command)}\n{done.stderr}")
    return done.stdout

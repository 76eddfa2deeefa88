"""Runs a program that knows no plug, LMDeploy's own commands above all, with expert parallelism: `epbackend run`.

The program says how many ranks there are, in LMDeploy's own engine config. So nothing is enabled before it makes an
engine; then its config and ours become one, and it goes on with an engine config that the plug can serve.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epbackend.checkpoint import check_checkpoint
from epbackend.config import EPConfig
from epbackend.config.issues import ConfigIssue, config_error
from epbackend.config.lmdeploy_fields import FIELDS_SET_BY_US
from epbackend.config.overrides import Override, with_overrides
from epbackend.device import get_device
from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.checks import check_adapters, check_deployment
from epbackend.engines.lmdeploy.lmdeploy_config import REFUSED_ENGINE_FIELDS, engine_config
from epbackend.engines.lmdeploy.patches.requests import patch_loaded_server
from epbackend.engines.lmdeploy.patching import Patches, check_version
from epbackend.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from lmdeploy import PytorchEngineConfig

SETTINGS_VARIABLE = "EPBACKEND_RUN"
"""Holds the settings of `epbackend run` (JSON, only those that were given), for the servers of dp > 1."""
SIZES_OF_PARTS = ("attn_tp_size", "mlp_tp_size", "moe_tp_size")
"""LMDeploy's fields that no setting of ours decides alone: they stay as the program has them."""

_hooks = Patches()
_engines = 0
"""Engines of this process that the plug is on for."""


def run(command: Sequence[str], config: EPConfig) -> None:
    """Runs `lmdeploy ...`, `python script.py ...`, `[python] -m module ...` or `script.py ...` in this process.

    `config`: what was set, of which the program's own engine config may say more, but nothing else.

    Raises:
        ConfigError: it is none of these commands; or, once the program makes an engine, the two contradict each other.
        UnavailableError: LMDeploy is not the release whose hooks are known, or there is no such script.
    """
    kind, name, arguments = _parsed(command)
    os.environ[SETTINGS_VARIABLE] = config.model_dump_json(exclude_unset=True)
    install()
    sys.argv = [name, *arguments]
    if kind == "lmdeploy":
        from lmdeploy.cli.entrypoint import run as lmdeploy_command

        lmdeploy_command()
    elif kind == "module":
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(name).resolve().parent))
        runpy.run_path(name, run_name="__main__")


def install() -> None:
    """Makes this process's engines ask for the plug; a second call does nothing."""
    if _hooks.applied:
        return
    check_version()
    # Imported late: the table imports LMDeploy, whose release has to be checked first.
    from epbackend.engines.lmdeploy.patches import cpu, of_run

    config = _settings()
    device = get_device(config.device).name
    early = (cpu.lmdeploy_uncompiled, cpu.engine_config_accepts_cpu) if device == "cpu" else ()
    _hooks.apply((*early, *of_run()))


def run_server(*args: Any, **kwargs: Any) -> None:
    """Stands for `launch_server._run_server`, in a process of its own: installs the hooks, then runs the original."""
    install()
    _hooks.original("dp-server")(*args, **kwargs)


def with_the_plug(original: Callable) -> Callable:
    """For `AsyncEngine.__init__`: the plug is on for this engine, whose config both sides agree on."""

    @functools.wraps(original)
    def plugged(self: Any, model_path: str, *args: Any, **kwargs: Any) -> None:
        plug_in(model_path, kwargs.get("backend_config"))
        try:
            original(self, model_path, *args, **kwargs)
            # The plug's own patch of this function came too late for this call.
            patch_loaded_server()
        except BaseException:
            unplug()
            raise

    return plugged


def letting_go(original: Callable) -> Callable:
    """For `AsyncEngine.close`."""

    @functools.wraps(original)
    def close(self: Any) -> None:
        try:
            original(self)
        finally:
            unplug()

    return close


def plug_in(model_path: str, theirs: PytorchEngineConfig | None) -> None:
    """Enables the plug for an engine that is about to start, and brings its config into line, in place.

    Raises:
        ConfigError: it is not for LMDeploy's PyTorch engine, it contradicts what `epbackend run` was told, or the model
            does not suit it.
    """
    global _engines
    from lmdeploy import PytorchEngineConfig

    if not isinstance(theirs, PytorchEngineConfig):
        raise ConfigError(
            f"epbackend run: the engine is made with {type(theirs).__name__}, but experts are spread in LMDeploy's "
            "PyTorch engine: give a PytorchEngineConfig, or on the command line --backend pytorch"
        )
    config = combined(_settings(), theirs)
    check_checkpoint(model_path, weights=not theirs.empty_init)
    check_adapters(config, theirs.adapters)
    custom = theirs.custom_module_map is not None
    placement = check_deployment(model_path, config, serving=False, custom_models=custom)
    plug.enable(config, placement)
    _engines += 1
    if config.world_size > 1:
        print(f"epbackend: experts of {model_path} on {config.world_size} ranks", file=sys.stderr)
    ours = engine_config(config, theirs.dp_rank)
    for name in [*FIELDS_SET_BY_US, *config.engine.extra]:
        if name not in SIZES_OF_PARTS:
            setattr(theirs, name, getattr(ours, name))


def unplug() -> None:
    """An engine is closed: disables the plug with the last one."""
    global _engines
    _engines = max(0, _engines - 1)
    if _engines == 0:
        plug.disable()


def combined(config: EPConfig, theirs: PytorchEngineConfig) -> EPConfig:
    """What both say; a field that has LMDeploy's default was not set.

    Raises:
        ConfigError: they contradict each other, or together say what cannot work.
    """
    given = config.model_dump(mode="json", exclude_unset=True)
    found, issues = [], []
    for name, value in _set_fields(theirs).items():
        setting = FIELDS_SET_BY_US.get(name)
        if name in REFUSED_ENGINE_FIELDS:
            raise ConfigError(f"{name}: {REFUSED_ENGINE_FIELDS[name]}; remove it")
        if setting is None or name in SIZES_OF_PARTS:
            if config.engine.extra.get(name, value) != value:
                issues.append(_contradiction(f"engine.extra.{name}", config.engine.extra[name], name, value))
            continue
        if (said := _at(given, setting)) not in (None, "auto", value):
            issues.append(_contradiction(setting, said, name, value))
        found.append(Override(setting, value, f"LMDeploy's {name}"))
    if issues:
        raise config_error(issues, "epbackend run")
    origins = {each.setting: each.origin for each in found}
    return EPConfig.model_validate(
        with_overrides(given, found), context={"source": "epbackend run", "origins": origins}
    )


def _contradiction(setting: str, said: Any, name: str, value: Any) -> ConfigIssue:
    reason = f"epbackend run was told {said}, and the program gives LMDeploy {name} {value}: keep one of them"
    return ConfigIssue(setting, reason)


def _set_fields(theirs: PytorchEngineConfig) -> dict[str, Any]:
    """The fields that differ from LMDeploy's defaults."""
    differing = {}
    for each in fields(theirs):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        value = getattr(theirs, each.name)
        if each.name not in ("dp_rank", "kernel_block_size") and value is not None and value != default:
            differing[each.name] = value
    return differing


def _at(settings: Mapping[str, Any], setting: str) -> Any:
    """The value at a dotted name; None where there is none."""
    value: Any = settings
    for name in setting.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _settings() -> EPConfig:
    return EPConfig.from_json(os.environ[SETTINGS_VARIABLE])


def _parsed(command: Sequence[str]) -> tuple[str, str, Sequence[str]]:
    """What kind of program it is (lmdeploy, module or script), its name, and its arguments."""
    words = list(command)
    if words and Path(words[0]).name in ("python", "python3"):
        words = words[1:]
    match words:
        case [word, *arguments] if Path(word).name == "lmdeploy":
            return "lmdeploy", word, arguments
        case ["-m", "lmdeploy", *arguments]:
            return "lmdeploy", "lmdeploy", arguments
        case ["-m", module, *arguments]:
            return "module", module, arguments
        case [script, *arguments] if script.endswith(".py"):
            if not Path(script).is_file():
                raise UnavailableError(f"epbackend run: there is no script {script}")
            return "script", script, arguments
    said = " ".join(command) or "nothing"
    raise ConfigError(
        f"epbackend run: got {said}; write lmdeploy ..., python script.py ... or python -m module ..., and options of "
        "epbackend before it"
    )

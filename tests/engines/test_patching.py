"""Enabling changes LMDeploy as the table says; disabling puts back every object; a hook that moved is named."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from importlib import metadata

import pytest
import torch

import epbackend
from epbackend import EPConfig
from epbackend.device.cpu import CpuDevice
from epbackend.engines.lmdeploy import patching, plug, state
from epbackend.engines.lmdeploy.lmdeploy_config import executor
from epbackend.engines.lmdeploy.load.report import STATS_VARIABLE
from epbackend.engines.lmdeploy.operators import layer_being_built
from epbackend.engines.lmdeploy.patches import PATCHES, every_patch, needed
from epbackend.errors import ConfigError, EPError, UnavailableError

RAY = EPConfig.load({"device": "cpu", "ep_size": 2, "engine": {"dp": 2}})
MP = EPConfig.load({"device": "cpu", "ep_size": 2})


@pytest.mark.parametrize(
    "each", [each for each in every_patch() if each.when != "ascend"], ids=lambda each: each.name
)
def test_every_hook_is_the_one_it_was_written_for(each):
    each.check()
    owner, name = each.find()
    theirs = each.target.startswith("lmdeploy") and getattr(owner, name).__module__.startswith("lmdeploy")
    assert each.fingerprint or not theirs, "LMDeploy's own hooks carry a fingerprint"


@pytest.mark.parametrize(
    "each", [each for each in PATCHES if each.module.startswith(patching.MODELS)], ids=lambda each: each.name
)
def test_a_source_read_from_its_file_is_the_one_of_the_imported_hook(each):
    owner, name = each.find()
    assert patching.source_in_file(each.target) == inspect.getsource(getattr(owner, name))


def test_models_and_processors_cost_no_import_before_they_are_asked_for():
    script = """
        import shutil
        import sys
        import tempfile
        from dataclasses import replace
        import transformers
        import epbackend
        from epbackend import EPConfig
        from epbackend.engines.lmdeploy import patches, patching
        from epbackend.errors import UnavailableError

        finders = [*sys.meta_path]
        config = EPConfig.load({"device": "cpu", "ep_size": 2})
        epbackend.enable(config)
        assert "lmdeploy.pytorch.models.qwen3_5_moe" not in sys.modules
        assert "transformers.modeling_utils" not in sys.modules, "seconds of import in every rank"
        from lmdeploy.pytorch.models.deepseek_v2 import DeepseekV2DecoderLayer, DeepseekV2MoE
        assert "epbackend" in DeepseekV2MoE.__init__.__code__.co_filename
        assert "epbackend" in DeepseekV2DecoderLayer.__init__.__code__.co_filename

        from lmdeploy.model import HFChatTemplate
        from epbackend.models import resolve
        model = resolve("tiny-qwen3-moe")
        assert "hello" in HFChatTemplate(model).get_prompt("hello")
        assert "transformers.processing_utils" not in sys.modules, "two seconds of import in every parent"
        with tempfile.TemporaryDirectory() as folder:
            untold = shutil.copytree(model, folder + "/model", ignore=shutil.ignore_patterns("*.jinja"))
            try:
                HFChatTemplate(untold)
            except ValueError as error:
                assert "chat_template" in str(error)
            else:
                raise AssertionError("there is no chat template")
        assert "transformers.processing_utils" in sys.modules, "a processor may have one"
        assert transformers.AutoProcessor.__name__ == "AutoProcessor", "transformers' own"

        epbackend.disable()
        assert "epbackend" not in DeepseekV2MoE.__init__.__code__.co_filename
        assert sys.meta_path == finders, "no hook is left"

        changed = next(each for each in patches.PATCHES if each.name == "glm4-moe-sums-once")
        assert changed.waits
        try:
            patching.Patches().apply([replace(changed, fingerprint="0" * 12)])
        except UnavailableError as error:
            assert "glm4-moe-sums-once" in str(error)
        else:
            raise AssertionError("another source was not seen")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize(
    "each", [each for each in PATCHES if each.name.endswith("tells-its-layer")], ids=lambda each: each.name
)
def test_a_layer_tells_its_number_to_what_is_built_in_it(each):
    told = []
    init = each.build(lambda self, config, layer_idx, prefix="": told.append(layer_being_built(None)))
    init(None, None, 7, prefix="model.layers.7")
    init(None, config=None, layer_idx=8)
    assert told == [7, 8]


def test_every_patch_has_a_name_of_its_own_and_a_reason():
    assert len({each.name for each in every_patch()}) == len(every_patch())
    assert all(each.why for each in every_patch())


def test_our_log_has_the_level_of_the_engines():
    log = logging.getLogger("epbackend")
    for level in ("INFO", "WARNING"):
        epbackend.enable(EPConfig.load({"device": "cpu", "engine": {"log_level": level}}))
        assert log.isEnabledFor(logging.INFO) is (level == "INFO")
        assert log.hasHandlers()
        epbackend.disable()


@pytest.mark.parametrize("config", [MP, RAY], ids=["mp", "ray"])
def test_disable_puts_back_every_object(config):
    places = [(each, *each.find()) for each in PATCHES if each.when != "ascend"]
    originals = [inspect.getattr_static(owner, name) for _, owner, name in places]
    code = [getattr(original, "__code__", None) for original in originals]
    environment = dict(os.environ)
    log = logging.getLogger("epbackend")
    level, handlers = log.level, [*log.handlers]

    epbackend.enable(config)
    replaced = {
        each.target
        for (each, owner, name), original in zip(places, originals, strict=True)
        if inspect.getattr_static(owner, name) is not original
    }
    expected = {each.target for each in needed("cpu", config.ep_size, executor(config))}
    assert replaced == expected
    assert os.environ != environment

    epbackend.disable()
    assert [inspect.getattr_static(owner, name) for _, owner, name in places] == originals
    assert [getattr(original, "__code__", None) for original in originals] == code
    assert dict(os.environ) == environment
    assert (log.level, log.handlers) == (level, handlers)
    assert isinstance(torch.cuda.Stream, type)
    assert not torch.cuda.is_available()


def test_enabling_twice_is_enabling_once():
    epbackend.enable(MP)
    epbackend.enable(EPConfig.from_json(MP.to_json()))
    with pytest.raises(ConfigError, match="disable"):
        epbackend.enable(RAY)
    epbackend.disable()
    epbackend.disable()
    epbackend.enable(RAY)
    assert state.active().config == RAY


def test_a_process_started_from_one_with_an_engine_counts_its_own_load(monkeypatch):
    monkeypatch.setenv(STATS_VARIABLE, "2:somebody-elses")
    epbackend.enable(MP)
    assert state.active().load_report().calls == 0
    epbackend.disable()
    assert os.environ[STATS_VARIABLE] == "2:somebody-elses"


def test_nothing_is_active_before_enable():
    with pytest.raises(EPError, match=r"epbackend\.enable"):
        state.active()


def test_each_deployment_gets_its_own_patches():
    cpu_one, cuda_two, ascend_two = (
        {each.name for each in needed(*deployment)}
        for deployment in (("cpu", 1, "uni"), ("cuda", 2, "ray"), ("ascend", 2, "mp"))
    )
    assert "deepseek-v2-sums-once" in cuda_two & ascend_two
    assert "deepseek-v2-sums-once" not in cpu_one
    assert "deep-ep-not-demanded" in cuda_two
    assert "deep-ep-not-demanded" not in cpu_one | ascend_two
    assert not any(name.startswith("torch-cuda") for name in cuda_two | ascend_two)
    assert "mp-notifier" not in cpu_one | cuda_two
    assert {"backend-with-our-experts", "steps-are-counted"} <= cpu_one & cuda_two & ascend_two


def test_a_moved_hook_is_named_and_nothing_is_changed(monkeypatch):
    from lmdeploy.pytorch import config as target

    moved = replace(PATCHES[1], name="moved", target="lmdeploy.pytorch.config:gone_away")
    changed = replace(PATCHES[1], name="changed", fingerprint=hashlib.sha256(b"").hexdigest()[:12])
    original = target.is_bf16_supported
    for broken, said in ((moved, "gone_away"), (changed, "another")):
        patches = patching.Patches()
        with pytest.raises(UnavailableError, match=rf"{broken.name}.*0\.18\.0.*{said}"):
            patches.apply([PATCHES[1], broken])
        assert target.is_bf16_supported is original


def test_a_package_that_lmdeploy_imports_is_named_where_it_is_missing(monkeypatch):
    def without_ray(name):
        raise ModuleNotFoundError("No module named 'ray'", name="ray.util")

    monkeypatch.setattr(patching, "import_module", without_ray)
    with pytest.raises(UnavailableError, match=r"^ray is not installed.*pip install ray$"):
        PATCHES[1].find()


@pytest.mark.parametrize("installed", ["0.17.2", "0.19.0"])
def test_other_releases_are_refused_by_name(installed, monkeypatch):
    monkeypatch.setattr(patching, "version", lambda _: installed)
    with pytest.raises(UnavailableError, match=rf"{installed}.*0\.18\.0.*pip install"):
        epbackend.enable(MP)


def test_without_lmdeploy_enabling_names_what_to_install(monkeypatch):
    def missing(_):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(patching, "version", missing)
    with pytest.raises(UnavailableError, match=r"not installed.*pip install"):
        epbackend.enable(MP)


def test_importing_the_plug_does_not_import_lmdeploy():
    program = "import sys, epbackend.engines.lmdeploy; print('lmdeploy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_functions_of_lmdeploy_are_compiled_only_where_the_plug_is_not(monkeypatch):
    compiled = []

    def compile(model, **options):
        compiled.append(options)
        return model

    def helper(x):
        return x + 1

    monkeypatch.setattr(torch, "compile", compile)
    epbackend.enable(MP)
    helper.__module__ = "lmdeploy.pytorch.nn.norm"
    decorated = torch.compile(dynamic=True)(helper)
    assert (decorated(1), compiled) == (2, [])
    torch.compile(test_enabling_twice_is_enabling_once)
    assert compiled == [{}]
    epbackend.disable()
    epbackend.enable(MP)
    assert (decorated(1), compiled) == (2, [{}])
    epbackend.disable()
    assert (decorated(1), decorated(2), compiled) == (2, 3, [{}, {"dynamic": True}])


def test_a_failed_check_of_lmdeploy_raises_instead_of_ending_the_process():
    """LMDeploy itself would end the process."""
    from lmdeploy.pytorch.check_env.base import BaseChecker

    epbackend.enable(MP)
    with pytest.raises(ConfigError, match=r"Dist.*no good"):
        BaseChecker().log_and_exit(mod_name="Dist", message="no good")
    with pytest.raises(ConfigError, match=r"PyTorch failed: not there \(RuntimeError: no GPU\)"):
        BaseChecker().log_and_exit(RuntimeError("no GPU"), "PyTorch", "not there")


def test_a_device_without_a_plug_is_refused(monkeypatch):
    """LMDeploy would run its own experts there, unnoticed."""

    class Other(CpuDevice):
        name = "other"

    monkeypatch.setattr(plug, "get_device", lambda _: Other())
    with pytest.raises(UnavailableError, match=r"device: other has no plug into LMDeploy.*cuda, ascend, cpu"):
        epbackend.enable(EPConfig(ep_size=2))

"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import gc
import os
from collections import Counter
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import pytest

# A check in a helper says what it found, as one in a test does. Before the first of them is imported.
pytest.register_assert_rewrite("tests.helpers")

from tests.helpers import ascend

if find_spec("hypothesis"):  # a machine with a GPU may have torch, triton and pytest alone
    import hypothesis

    # A machine that does other work as well is slow at any moment, which says nothing about the code.
    hypothesis.settings.register_profile(
        "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.register_profile(
        "interpreter", hypothesis.settings.get_profile("busy"), max_examples=8
    )
    hypothesis.settings.load_profile("busy")


def pytest_addoption(parser):
    parser.addoption(
        "--ascend",
        choices=ascend.PLATFORMS,
        help="where tests of the ascend device run: on an emulated A3 or A2, or on real NPUs",
    )


WHOLE_FAILURES = "EPBACKEND_WHOLE_FAILURES"
"""Set in the environment: a failure is told in so many lines at once, instead of in one."""


class FailuresAtOnce:
    """Says why a test failed as soon as it has: a run that is cut off prints no summary."""

    def __init__(self, terminal) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report):
        if not report.failed:
            return
        lines = report.longreprtext.splitlines()
        if most := int(os.environ.get(WHOLE_FAILURES, 0)):
            said = [
                line
                for title, text in report.sections
                for line in (f"-- {title}", *text.splitlines()[-most:])
            ]
            reasons = "\n".join(lines[-most:] + said)
        else:
            reasons = " ".join([line for line in lines if line.startswith("E ")][:3])
        self._terminal.write_line(f"\n{report.nodeid}: {reasons}")


@pytest.hookimpl(trylast=True)  # after pytest's own, which makes the reporter
def pytest_configure(config):
    gc.disable()  # until all is imported and collected: 800,000 objects that stay, and are looked at again and again
    if terminal := config.pluginmanager.get_plugin("terminalreporter"):
        config.pluginmanager.register(FailuresAtOnce(terminal))
    # Pinned, so that no test depends on what this processor is fast at; its own tests try each product.
    os.environ.setdefault("EPBACKEND_CPU_PRODUCT", "onednn")
    if os.environ.get("TRITON_INTERPRET") and find_spec("triton"):
        import_module("tests.helpers.quick_interpreter")
    # A process that a test starts, and that a signal like SIGSEGV ends, leaves the Python stack of all its threads.
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    platform = config.getoption("--ascend")
    if platform is None:
        return
    if reason := ascend.missing(platform):
        pytest.exit(f"skipped: {reason}", returncode=0)
    ascend.start(platform)


def pytest_collection_modifyitems(items):
    """Long files first, so that none of several workers ends up with one alone."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter):
    """Why tests were skipped, a line each: a device that is missing skips hundreds for one reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, tests in reasons.most_common():
        terminalreporter.write_line(f"SKIPPED {tests}: {reason}")


@pytest.fixture(scope="session")
def ranks(request):
    """`ranks.run(size, function, *args)` runs a function on processes joined by gloo, or by HCCL."""
    from tests.helpers.ranks import RankPool  # torch, without which tests can fail, and say why, in less time

    platform = request.config.getoption("--ascend")
    pool = RankPool("hccl", partial(ascend.start, platform)) if platform else RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def forked_ranks():
    """For modules that start many engines in this process: what happens in their ranks, not how those are started."""
    from tests.helpers.forked_engines import forked_engines  # LMDeploy, which a machine with a GPU may lack

    with forked_engines():
        yield

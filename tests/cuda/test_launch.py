"""Launches name every argument of a kernel, and what is missing or unknown is an error before anything is launched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.kernels.triton.launch import named_launch

pytestmark = pytest.mark.cpu


@pytest.fixture
def launched():
    """A kernel of three arguments, and what its `run` was called with."""
    calls = []

    def run(*arguments, **options):
        calls.append((arguments, options))

    kernel = SimpleNamespace(arg_names=["rows", "width", "BLOCK"], run=run, fn=SimpleNamespace(__name__="k"))
    return named_launch(kernel), calls


def test_arguments_are_passed_by_position_in_the_kernels_order(launched):
    kernel, calls = launched
    kernel[(4,)](BLOCK=16, rows=1, width=2)
    kernel[(5, 2)](rows=1, width=2, BLOCK=16, num_warps=8)
    kernel[(1,)](rows=1, width=2, BLOCK=16, num_warps=8, num_stages=2)
    assert calls == [
        ((1, 2, 16), {"grid": (4, 1, 1), "warmup": False}),
        ((1, 2, 16), {"grid": (5, 2, 1), "warmup": False, "num_warps": 8}),
        ((1, 2, 16), {"grid": (1, 1, 1), "warmup": False, "num_warps": 8, "num_stages": 2}),
    ]


def test_bound_arguments_are_passed_with_each_launch(launched):
    kernel, calls = launched
    kernel.bind(BLOCK=16).bind(rows=3)[(1,)](width=2)
    assert calls == [((3, 2, 16), {"grid": (1, 1, 1), "warmup": False})]
    with pytest.raises(TypeError, match="k has no argument COLUMNS"):
        kernel.bind(COLUMNS=1)


@pytest.mark.parametrize(
    ("positional", "named"),
    [
        ((), {"rows": 1, "width": 2}),
        ((), {"rows": 1, "width": 2, "BLOCK": 16, "hue": 3}),
        ((1,), {"width": 2, "BLOCK": 16}),
    ],
    ids=["missing", "unknown", "positional"],
)
def test_wrong_arguments_raise_before_the_launch(launched, positional, named):
    kernel, calls = launched
    with pytest.raises(TypeError):
        kernel[(1,)](*positional, **named)
    assert not calls

"""Which rows of a step are tokens of requests: an idle engine's are not, nor what fills a captured graph up.

With dp > 1 an engine without a request joins the others' steps with a made-up batch, which LMDeploy marks. A captured
graph has a size, up to which LMDeploy fills a batch with made-up tokens. Where a call is exact, it gets the tokens of
requests alone; a captured call asks the device, where each step says anew how many there are. A warm-up's tokens are
computed like those of requests.

Letters: M rows of the largest captured call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class RealTokens:
    """Of the step under way in this process."""

    def __init__(self) -> None:
        self.warming_up = False
        self._place_M1: Tensor | None = None
        """0, 1, ...; None until a captured call is expected."""
        self._padding_M1: Tensor | None = None
        """Whether a row is none. Graphs read it, so it stays where it is."""

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Inside, made-up tokens are computed like others: kernels are to be compiled, and memory is to be measured."""
        self.warming_up = True
        try:
            yield
        finally:
            self.warming_up = False

    @torch.inference_mode(False)
    def expect(self, most: int, device: torch.device) -> None:
        """Static calls with up to so many rows will come; to be called before the first of them."""
        if self._place_M1 is None or len(self._place_M1) < most:
            self._place_M1 = torch.arange(most, dtype=torch.int64, device=device)[:, None]
            self._padding_M1 = torch.zeros(most, 1, dtype=torch.bool, device=device)

    def are_in(self, step: Any) -> bool:
        """Whether the batch of LMDeploy's step context is of requests; of a warm-up's it is said as well."""
        return self.warming_up or not step.is_dummy

    @torch.inference_mode(False)
    def begin_step(self, step: Any, tokens: int) -> None:
        """Tell the device that the first `tokens` rows are those of the step's batch, and the rest is filling."""
        if self._place_M1 is not None:
            torch.ge(self._place_M1, tokens if self.are_in(step) else 0, out=self._padding_M1)

    def padding(self, rows: int) -> Tensor | None:
        """padding_T1 (bool) for a static call with so many rows; None where none was expected."""
        return None if self._padding_M1 is None else self._padding_M1[:rows]

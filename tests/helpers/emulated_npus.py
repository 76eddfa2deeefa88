"""Importing it starts the emulated CANN in this process, with the NPUs of EMULATED_NPUS ("A3:4").

So a process can be told to do it by the name of a module alone: the one that ranks are forked from.
"""

from __future__ import annotations

import os

from tests.helpers import cann

chip, _, count = os.environ["EMULATED_NPUS"].partition(":")
cann.start(chip, int(count))

"""What a long test is doing, for a run that may be cut off: lines in the file that EPBACKEND_TEST_NOTES names."""

from __future__ import annotations

import os
import time

NOTES = "EPBACKEND_TEST_NOTES"


def note(text: str) -> None:
    """Write it down with the time and the test; without such a file it is printed, and pytest shows it on a failure."""
    line = f"{time.strftime('%H:%M:%S')} {os.environ.get('PYTEST_CURRENT_TEST', '')}: {text}"
    if file := os.environ.get(NOTES):
        with open(file, "a") as notes:  # one write: tests of several workers keep their lines apart
            notes.write(f"{line}\n")
    else:
        print(line)

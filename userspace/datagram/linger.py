# SPDX-License-Identifier: Apache-2.0
"""Whether a reader should wait a moment before it reads, as a NIC does that moderates its interrupts.

A reader that is woken for every packet pays a wake-up, a system call and Python's share for each.  One
that sleeps first, while packets come fast, pays once for all that came meanwhile.
"""

from __future__ import annotations

import time
from typing import Final

#: Packets that must be expected while it sleeps: for one, the timer costs what the wake-up would have.
LEAST: Final = 2


class Linger:
    """How fast packets come, told from the latest batch and how long it took to come together."""

    __slots__ = ("_began", "_last")

    def __init__(self) -> None:
        self._began = 0.0  # of the latest call, seconds
        self._last = 0

    def received(self, count: int) -> None:
        """What the latest call to receive brought."""
        self._last = count

    def wait(self, seconds: float, maximum: int) -> None:
        """Sleep so long if packets come so fast that it makes a larger batch.

        Not after a full batch: more is there already.
        """
        now = time.monotonic()
        last = self._last
        if 0 < last < maximum and last * seconds >= LEAST * (now - self._began):
            time.sleep(seconds)
        self._began = now

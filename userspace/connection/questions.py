# SPDX-License-Identifier: Apache-2.0
"""What was asked of one peer, and what became of it: answered, answered late, or failed.

    questions = Questions(first=0)
    sequence = questions.ask(now)            # goes with the ping
    questions.answer(sequence)               # when it was asked; None: not open
    for asked in questions.expire(now - patience): ...       # these have failed
    questions.late(sequence)                 # True, once, for an answer to one of the last that failed

Sequences come from the network and may be any number: only one that is open, or has failed and is one of
the last :data:`REMEMBERED`, counts as an answer, and only once.  So neither an invented answer nor one that
is sent again keeps a dead peer alive.

Questions are answered or fail in the order in which they were asked, but for reordering, so what is kept is a
short list of times and a row of bits.

:class:`LossRate` is the loss of the last so many of anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

#: Sequences back from the oldest open one whose failing is remembered: six seconds at ten a second, longer
#: than any answer travels that is worth having.
REMEMBERED: Final = 64
_MASK: Final = (1 << REMEMBERED) - 1
_NONE: Final[Sequence[float]] = ()

#: Outcomes that are assumed before there are any, and how many of these are losses: with none lost of the
#: last 32, the bound is 10 %.
_PRIOR: Final = 8.0
_PRIOR_LOST: Final = 4.0


class Questions:
    """Open questions to one peer, and which of the last ones failed; see the module.

    The list of open ones is as long as the caller asks without expiring.
    """

    __slots__ = ("_asked", "_failed", "sequence")

    def __init__(self, first: int = 0) -> None:
        #: Of the next question.
        self.sequence = first
        self._asked: list[float | None] = []  # when; None: not open any more.  The last is sequence - 1
        self._failed = 0  # bit 0 is the sequence before the first in the list

    def ask(self, now: float) -> int:
        """Ask one; its sequence."""
        sequence = self.sequence
        self.sequence = sequence + 1
        self._asked.append(now)
        return sequence

    def answer(self, sequence: int) -> float | None:
        """It is open no more; when it was asked.  None when it was not open."""
        asked = self._asked
        place = sequence - self.sequence + len(asked)
        if not 0 <= place < len(asked) or (at := asked[place]) is None:
            return None
        if place:
            asked[place] = None
        else:
            self._shift()
        return at

    def _shift(self) -> int:
        """The first one leaves the list, as not failed, with those behind it that are not open; how many."""
        asked, count = self._asked, 1
        while count < len(asked) and asked[count] is None:
            count += 1
        del asked[:count]
        self._failed = self._failed << count & _MASK
        return count

    def expire(self, before: float) -> Sequence[float]:
        """Those that were asked then or earlier have failed: when they were asked."""
        asked = self._asked  # the first one is open, always
        if not asked or (first := asked[0]) is None or first > before:
            return _NONE
        expired: list[float] = []
        while asked and (first := asked[0]) is not None and first <= before:
            expired.append(first)
            count = self._shift()
            self._failed |= 1 << count - 1 & _MASK
        return expired

    def late(self, sequence: int) -> bool:
        """Whether it has failed, lately, and nobody has said so since; then it has not failed any more."""
        place = self.sequence - len(self._asked) - 1 - sequence
        if not 0 <= place < REMEMBERED or not self._failed >> place & 1:
            return False
        self._failed ^= 1 << place
        return True

    def recent(self, sequence: int) -> bool:
        """Whether it is one of the last that were asked, whatever became of it."""
        return 0 < self.sequence - sequence <= REMEMBERED

    def withdraw(self) -> int:
        """All that are open were never asked; how many."""
        count = self.open
        self._failed = self._failed << len(self._asked) & _MASK
        self._asked.clear()
        return count

    @property
    def waiting(self) -> bool:
        """Whether any is open."""
        return bool(self._asked)

    @property
    def open(self) -> int:
        """How many are open.  Counts them."""
        return len(self._asked) - self._asked.count(None)


class LossRate:
    """Which part of the last ``window`` or so was lost; what is older counts less and less."""

    __slots__ = ("_decided", "_lost", "_window")

    def __init__(self, window: int) -> None:
        self._window = window
        self._decided = self._lost = 0.0

    def add(self, arrived: int, lost: int) -> None:
        """So many arrived and so many did not, in any order; at least one, and none is negative."""
        count = arrived + lost
        kept = (1.0 - 1.0 / self._window) ** count
        weight = (1.0 - kept) * self._window  # of all of these together, the last one's being 1
        self._decided = self._decided * kept + weight
        self._lost = self._lost * kept + weight * lost / count

    def lose(self, count: int) -> None:
        """So many of those that arrived have not; negative: so many of the lost ones have arrived."""
        self._lost = min(max(0.0, self._lost + count), self._decided)

    def rate(self, least: float = 0.0) -> float:
        """The part that was lost, 0 to 1; fewer outcomes than ``least`` are counted as so many."""
        return self._lost / max(self._decided, least, 1.0)

    def bound(self) -> float:
        """A part that is not likely to be exceeded: one half while nothing is known."""
        return (self._lost + _PRIOR_LOST) / (self._decided + _PRIOR)

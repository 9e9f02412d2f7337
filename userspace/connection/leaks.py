# SPDX-License-Identifier: Apache-2.0
"""Leaks: whoever borrowed a connection and has not given it back for too long is told of, once.

    leaks = Leaks[Lease](threshold=60.0, capture=True)
    stack = leaks.stack()                      # where it is borrowed: None unless ``capture``
    leaks.begin(lease)                         # lease.since: when
    leaks.end(lease)                           # given back
    for lease in leaks.due(now): ...           # at leaks.next_timeout(): held for longer than the threshold

Beginning and ending cost one operation of a dict each, because times are not decreasing: the oldest is the
first.  A stack costs some microseconds, so it has to be asked for.  It is kept as names and line numbers: a
frame would keep alive all that the borrower's functions know.
"""

from __future__ import annotations

import math
import sys
from types import FrameType
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

#: Frames of a stack that are kept, from the borrower outwards: more is the event loop.
STACK_DEPTH: Final = 16
#: Where the stack is not the borrower's: these frames are left out.
_OURS: Final = __name__.rpartition(".")[0] + "."

_NEVER: Final = math.inf


class Held(Protocol):
    """Something that is borrowed."""

    since: float


H = TypeVar("H", bound=Held)


class Frame(NamedTuple):
    """One call of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


Stack = tuple[Frame, ...]


class Leaks(Generic[H]):
    """Watches what is borrowed; see the module.  ``threshold`` is seconds; infinite: nothing is watched."""

    __slots__ = ("_capture", "_held", "_known", "_next", "_threshold", "found")

    def __init__(self, *, threshold: float, capture: bool) -> None:
        self._threshold = threshold
        self._capture = capture
        self._held: dict[H, None] = {}  # the oldest first, without those that were told
        self._known: set[H] = set()  # told, and still held
        self._next = _NEVER  # no later than the first deadline
        #: How many were told so far.
        self.found = 0

    @property
    def open(self) -> int:
        """How many were told and are still held."""
        return len(self._known)

    def stack(self) -> Stack | None:
        """The calls that led here, without those of the pool; None unless stacks are wanted."""
        if not self._capture:
            return None
        frame: FrameType | None = sys._getframe(1)
        found: list[Frame] = []
        while frame is not None and len(found) < STACK_DEPTH:
            if not frame.f_globals.get("__name__", "").startswith(_OURS):
                code = frame.f_code
                found.append(Frame(code.co_filename, frame.f_lineno or 0, code.co_qualname))
            frame = frame.f_back
        return tuple(found)

    def begin(self, item: H) -> None:
        """It is borrowed, no earlier than those before it."""
        self._held[item] = None
        if self._next == _NEVER:
            self._next = item.since + self._threshold

    def end(self, item: H) -> None:
        """It was given back, or is of no use any more."""
        if item in self._held:
            del self._held[item]
        else:
            self._known.discard(item)

    def next_timeout(self) -> float:
        """When to call :meth:`due`, maybe in vain; infinite while nothing is borrowed."""
        return self._next

    def due(self, now: float) -> list[H]:
        """Those that have been held for longer than the threshold and were not told before."""
        found: list[H] = []
        if now < self._next:
            return found
        self._next = _NEVER
        for item in self._held:
            at = item.since + self._threshold
            if at > now:
                self._next = at
                break
            found.append(item)
        for item in found:
            del self._held[item]
        self._known.update(found)
        self.found += len(found)
        return found

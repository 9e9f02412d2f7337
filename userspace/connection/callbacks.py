# SPDX-License-Identifier: Apache-2.0
"""Callbacks that can't break who calls them.

    callbacks = Callbacks[int, str]()
    callbacks.subscribe(print)
    callbacks.post(7, "lost")                # while the state is half changed
    callbacks.deliver()                      # when it is whole again

What happens is posted in the midst of a change and delivered after it, in order.  A callback may call
whatever it likes: what that posts comes after what was posted before, and is delivered by the call that is
under way.  What it raises is counted, the last one kept as text; the others are called all the same.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVarTuple

#: Characters that are kept of what a callback raised.
ERROR_LENGTH: Final = 200

Ts = TypeVarTuple("Ts")


class Callbacks(Generic[*Ts]):
    """Those who want to know, and what they have not been told; see the module."""

    __slots__ = ("_callbacks", "_delivering", "_posted", "errors", "last_error")

    def __init__(self) -> None:
        self._callbacks: tuple[Callable[[*Ts], object], ...] = ()
        self._posted: deque[tuple[*Ts]] = deque()
        self._delivering = False
        #: How often one raised, and what the last one was.
        self.errors = 0
        self.last_error = ""

    def subscribe(self, callback: Callable[[*Ts], object]) -> None:
        """Call it as well."""
        self._callbacks = (*self._callbacks, callback)

    def post(self, *what: *Ts) -> None:
        """To be delivered."""
        self._posted.append(what)

    def deliver(self) -> None:
        """Call them all, for all that was posted; nothing while that is being done already."""
        if self._delivering:
            return
        self._delivering = True
        try:
            while self._posted:
                what = self._posted.popleft()
                for callback in self._callbacks:
                    try:
                        callback(*what)
                    except Exception as error:  # noqa: BLE001 -- the caller's own: told, not raised
                        self.errors += 1
                        text = "".join(traceback.format_exception_only(error))
                        self.last_error = " ".join(text.split())[:ERROR_LENGTH]
        finally:
            self._delivering = False

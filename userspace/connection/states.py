# SPDX-License-Identifier: Apache-2.0
"""The states of a connection, what may follow what, and what happened to it last.

    state = ConnectionState(now)                              # DISCONNECTED
    state.apply(now, Event.CONNECT, Cause.ASKED)              # CONNECTING
    state.apply(now, Event.OPENED, Cause.OPENED)              # CONNECTED
    state.apply(now, Event.LOST, Cause.PEER_CLOSED)           # DISCONNECTED
    for time, before, after, cause in state.history(): ...

:data:`TRANSITIONS` is the only place that says what is legal: the code looks up what follows there,
:func:`diagram` draws it, and docs/connections.md shows that drawing.  An event tells what happened, a cause
why.  What is not in the table raises and changes nothing: events are made by the program that drives the
connection, not by its peer, so that is a mistake in the program.

The last transitions are kept, with time and cause, in a ring of bytes: some hundred bytes a connection, that
grow to a limit with the first transitions and never again.
"""

from __future__ import annotations

import struct
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple

from userspace.connection.timers import LATEST, checked_now
from xdp.errors import SluiceError, UsageError

#: Transitions that are kept, unless told otherwise: five rounds of losing and finding a peer again.
HISTORY: Final = 16
#: And at most: 12 KB a connection.
HISTORY_MAXIMUM: Final = 1024


class State(StrEnum):
    """What a connection is."""

    #: Not there.  The next attempt is waited for, if there is to be one.
    DISCONNECTED = "disconnected"
    #: An attempt is being made.
    CONNECTING = "connecting"
    #: The peer has answered, and what is sent may reach it.
    CONNECTED = "connected"
    #: All attempts were in vain.  From time to time there is another one.
    FAILED = "failed"
    #: As CONNECTED, but for what was begun; nothing new begins.
    DRAINING = "draining"
    #: Gone for good: nothing follows.
    CLOSED = "closed"


class Event(StrEnum):
    """What happens to a connection."""

    CONNECT = "connect"
    OPENED = "opened"
    #: The attempt is over, and others will follow.
    ATTEMPT_FAILED = "attempt failed"
    #: The last of the attempts is over, or one of those after it.
    GAVE_UP = "gave up"
    #: Whoever ended it.
    LOST = "lost"
    DRAIN = "drain"
    CLOSE = "close"


class Cause(StrEnum):
    """Why something happens to a connection."""

    #: Somebody wanted it.
    ASKED = "asked"
    #: It was time for another attempt.
    RETRY = "retry"
    #: Interface or route came back.
    LINK_UP = "link_up"
    #: Interface or route went away.
    LINK_DOWN = "link_down"
    #: The peer answered.
    OPENED = "opened"
    #: The peer, or a host on the way to it, said no.
    REFUSED = "refused"
    #: Nobody answered in time.
    TIMED_OUT = "timed_out"
    #: The peer fell silent.
    LOST = "lost"
    #: It worked too badly to be used.
    UNHEALTHY = "unhealthy"
    #: It had its longest lifetime.
    EXPIRED = "expired"
    #: Nobody used it for long.
    IDLE = "idle"
    #: Its place was needed for another one.
    EVICTED = "evicted"
    #: The last of what was begun is done.
    DRAINED = "drained"
    #: The peer said goodbye.
    PEER_CLOSED = "peer_closed"
    #: The peer is there, but knows nothing of the connection: it was started anew.
    PEER_RESTARTED = "peer_restarted"
    #: The endpoint is not wanted any more.
    REMOVED = "removed"
    #: Everything is being shut down.
    SHUTDOWN = "shutdown"
    #: This machine failed: descriptors, memory, routes.
    LOCAL_ERROR = "local_error"


#: What follows a state when something happens; what is not here is illegal.
TRANSITIONS: Final = MappingProxyType(
    {
        (State.DISCONNECTED, Event.CONNECT): State.CONNECTING,
        # It came up, and went down again before it was worth anything, too often.
        (State.DISCONNECTED, Event.GAVE_UP): State.FAILED,
        (State.DISCONNECTED, Event.CLOSE): State.CLOSED,
        (State.CONNECTING, Event.OPENED): State.CONNECTED,
        (State.CONNECTING, Event.ATTEMPT_FAILED): State.DISCONNECTED,
        (State.CONNECTING, Event.GAVE_UP): State.FAILED,
        (State.CONNECTING, Event.CLOSE): State.CLOSED,
        (State.CONNECTED, Event.LOST): State.DISCONNECTED,
        (State.CONNECTED, Event.DRAIN): State.DRAINING,
        (State.CONNECTED, Event.CLOSE): State.CLOSED,
        (State.FAILED, Event.CONNECT): State.CONNECTING,
        (State.FAILED, Event.CLOSE): State.CLOSED,
        # Nobody wants it back.
        (State.DRAINING, Event.LOST): State.CLOSED,
        (State.DRAINING, Event.CLOSE): State.CLOSED,
    }
)
#: How every connection begins.
BEGIN: Final = State.DISCONNECTED

_STATES: Final = tuple(State)
_CAUSES: Final = tuple(Cause)
_STATE_CODES: Final = {state: code for code, state in enumerate(State)}
_CAUSE_CODES: Final = {cause: code for code, cause in enumerate(Cause)}
#: Time, state before, state after, cause.
_RECORD: Final = struct.Struct("<dBBB")


class IllegalTransitionError(SluiceError):
    """An event that cannot happen in this state: a mistake in the program that drives the connection."""


class Transition(NamedTuple):
    """One change of state: when, from what, to what, why."""

    time: float
    before: State
    after: State
    cause: Cause


class ConnectionState:
    """The state of one connection and its last ``history`` transitions; see the module.

    ``state`` and ``since`` (seconds, when it became so) are for reading.  Raises UsageError for a history
    that is no whole number from 1 to HISTORY_MAXIMUM.
    """

    __slots__ = ("_count", "_limit", "_ring", "since", "state")

    def __init__(self, now: float, *, history: int = HISTORY) -> None:
        if type(history) is not int or not 1 <= history <= HISTORY_MAXIMUM:
            raise UsageError(f"history is a whole number from 1 to {HISTORY_MAXIMUM}, not {history!r}")
        self.state = BEGIN
        self.since = checked_now(now, -LATEST)
        self._limit = history
        self._count = 0
        self._ring = bytearray()

    def apply(self, now: float, event: Event, cause: Cause) -> State:
        """Something happened; the state that it is in now.

        A time before that of the last transition is taken as that one.  Raises IllegalTransitionError for
        what cannot happen, and UsageError for what is no time; then nothing has changed.
        """
        before = self.state
        after = TRANSITIONS.get((before, event))
        if after is None:
            raise IllegalTransitionError(
                f"a connection that is {before}: {event} (cause: {cause}) cannot happen to it",
                hint="docs/connections.md shows what can; this is a mistake in what drives the connection",
            )
        now = checked_now(now, self.since)
        record = _RECORD.pack(now, _STATE_CODES[before], _STATE_CODES[after], _CAUSE_CODES[cause])
        place = self._count % self._limit * _RECORD.size
        self._ring[place : place + _RECORD.size] = record  # at its end it grows by that
        self._count += 1
        self.state, self.since = after, now
        return after

    @property
    def cause(self) -> Cause | None:
        """Of the last transition; None when there was none."""
        return self._transition(self._count - 1).cause if self._count else None

    @property
    def transitions(self) -> int:
        """How many there were, kept or not."""
        return self._count

    def history(self) -> list[Transition]:
        """The last transitions, the oldest first."""
        kept = min(self._count, self._limit)
        return [self._transition(number) for number in range(self._count - kept, self._count)]

    def _transition(self, number: int) -> Transition:
        time, before, after, cause = _RECORD.unpack_from(self._ring, number % self._limit * _RECORD.size)
        return Transition(time, _STATES[before], _STATES[after], _CAUSES[cause])

    def __repr__(self) -> str:
        why = f" ({self.cause})" if self._count else ""
        return f"<ConnectionState {self.state} since {self.since:.3f}{why}, {self._count} transitions>"


def diagram() -> str:
    """The table as a state diagram, in the language of Mermaid; ends with a line break."""
    events: dict[tuple[State, State], list[Event]] = {}
    for (before, event), after in TRANSITIONS.items():
        events.setdefault((before, after), []).append(event)
    arrows = [f"{before.name} --> {after.name}: {', '.join(why)}" for (before, after), why in events.items()]
    final = [state for state in State if all(before is not state for before, _ in events)]
    lines = [f"[*] --> {BEGIN.name}", *arrows, *(f"{state.name} --> [*]" for state in final)]
    return "stateDiagram-v2\n" + "".join(f"    {line}\n" for line in lines)

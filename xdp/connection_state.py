# SPDX-License-Identifier: Apache-2.0
"""What programs tell of their connections, for `sluice connections`: a file each in /run/sluice/connections.

Who may write there and who is believed is :mod:`xdp.told`'s.  Names of endpoints and reasons may come from
the network: whoever writes replaces what is not printable ASCII, and a file with anything else is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from xdp.owner_state import RUN
from xdp.told import Count, Folder, Part, Seconds, Told, Word

#: Connections of one file, the worst ones first: to write them takes some 15 ms of an event loop's second.
CONNECTIONS_MAXIMUM: Final = 512
#: Transitions of one connection, the last ones.
HISTORY_MAXIMUM: Final = 8
#: Characters of a name of an endpoint, an address, a reason or a transition.
TEXT_MAXIMUM: Final = 100
#: Bytes; a connection has about 900 with a full history, and 2,900 if all characters of its texts are
#: escaped.
SIZE_MAXIMUM: Final = 2 << 20
#: Entries of a table of counts by state or cause: there are at most 20 of each.
_KINDS_MAXIMUM: Final = 64

#: A name of a state, phase, status or cause, as its enum has it.
Name = Annotated[str, Meta(pattern=r"^[a-z][a-z_ :]{0,47}\Z")]
Text = Annotated[str, Meta(pattern=rf"^[ -~]{{0,{TEXT_MAXIMUM}}}\Z")]
Counts = Annotated[dict[Name, Count], Meta(max_length=_KINDS_MAXIMUM)]


class ConnectionTold(msgspec.Struct, frozen=True, kw_only=True):
    """One connection; seconds."""

    connection: Count
    endpoint: Text
    address: Text
    #: State, for how long, and why; None: it never changed.
    state: Name
    since: Seconds
    cause: Name | None
    #: What it is to its pool.
    phase: Name
    #: None while there is none.
    transport: Word | None
    #: Health and why; None while it is not connected.
    status: Name | None
    reason: Text | None
    #: Since it was heard, and its highest round-trip time of late; None: not connected, not measured.
    silent: Seconds | None
    latency: Seconds | None
    loss_rate: Part | None
    #: Attempts of its endpoint in vain, and seconds until the next one.
    failures: Count
    next_attempt: Seconds | None
    #: Since it has its number.
    attempts: Count
    restarts: Count
    sent: Count
    received: Count
    #: The last transitions, the oldest first.
    history: Annotated[list[Text], Meta(max_length=HISTORY_MAXIMUM)]


class ConnectionsTold(msgspec.Struct, frozen=True, kw_only=True):
    """All connections of a program together."""

    size: Count
    max_size: Count
    in_use: Count
    idle: Count
    opening: Count
    closing: Count
    waiting: Count
    endpoints: Count
    well: Count
    ejected: Count
    given_up: Count
    #: Connections whose link is down.
    held: Count
    panic: bool
    draining: bool
    #: By state, and by health.
    states: Counts
    health: Counts
    #: Attempts, and those that failed and connections that ended, by cause.
    attempts: Count
    failed: Counts
    ended: Counts
    #: Callers that had to wait, and that got nothing in time.
    waited: Count
    timed_out: Count
    probes: Count
    stalls: Count
    errors: Count
    last_error: Text


class ConnectionsState(Told, frozen=True, kw_only=True):
    """The content of a file."""

    version: Literal[1] = 1
    #: When it was written, seconds of CLOCK_MONOTONIC.
    told_at: Seconds
    summary: ConnectionsTold
    #: All that the program has; those in ``connections`` may be fewer.
    total: Count
    connections: Annotated[list[ConnectionTold], Meta(max_length=CONNECTIONS_MAXIMUM)]


CONNECTIONS: Final = Folder(
    "connections", ConnectionsState, size_maximum=SIZE_MAXIMUM, sound=lambda _state: True
)


def read_connections(run: Path = RUN) -> list[ConnectionsState]:
    """What all living programs tell, in the order of their pids; removes what the dead have left."""
    return CONNECTIONS.read(run)


def text_of(value: object) -> str:
    """What may stand in a file and on a terminal for a name from anywhere."""
    text = str(value)[: TEXT_MAXIMUM + 1]
    if len(text) > TEXT_MAXIMUM:
        text = text[: TEXT_MAXIMUM - 3] + "..."
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if " " <= one <= "~" else "?" for one in text)

# SPDX-License-Identifier: Apache-2.0
"""Settings of a health monitor, and what it shows: of one connection, and of all."""

from __future__ import annotations

from typing import Final

import msgspec

from userspace.connection.latency import LatencySnapshot
from userspace.connection.probes import RATE, RATE_MOST
from userspace.connection.suspicion import INTERVAL_MOST, QUESTIONS
from xdp.errors import UsageError

#: Seconds that an answer may take before the peer is suspected, whatever was measured: less is the noise of
#: a loop, and with more there is no time for questions.
PATIENCE_LEAST: Final = 0.1
PATIENCE_MOST: Final = 1.0
#: Seconds: whoever waits longer for a verdict does not wait for it.
_HOUR: Final = 3600.0
_DAY: Final = 86_400.0
#: Connections of one monitor, 16 GB: more is a mistake.
_CONNECTIONS_MOST: Final = 10_000_000


def _check(name: str, value: object, least: float, most: float) -> None:
    if type(value) not in {int, float} or not least <= value <= most:  # type: ignore[operator]
        raise UsageError(f"{name} is a number from {least:g} to {most:g}, not {value!r}")


class HealthSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds, and rates a second.  UsageError for values out of range, or that don't go together."""

    #: While it lives a peer is heard once in so many: it is asked earlier, by ``jitter`` or half of it.  So
    #: with 3.5 to 4.25 s to the question, there is time for the answer, or for asking again.
    interval: float = 5.0
    jitter: float = 0.3
    #: Of silence until a verdict at the earliest; of an application whose host answers.  With 14.5 s a hole
    #: of 10 s kills nobody (4.25 until it begins, 0.1 to the next question, two round trips of 70 ms), and
    #: half a second is left until the 15 that are promised: for a late loop and the grace after a stall.
    dead_after: float = 14.5
    busy_after: float = 60.0
    #: Questions to one suspect, and to all of them together.
    probe_rate: float = 10.0
    probe_budget: float = RATE
    #: For so long a connection has to be better before it counts as one step better: one heartbeat.
    dwell: float = 3.5
    max_connections: int = 100_000

    def __post_init__(self) -> None:
        _check("interval", self.interval, 0.5, INTERVAL_MOST)
        _check("jitter", self.jitter, 0.0, 0.5)
        _check("probe_rate", self.probe_rate, 1.0, 100.0)
        _check("probe_budget", self.probe_budget, 1.0, RATE_MOST)
        _check("dwell", self.dwell, 0.0, _HOUR)
        _check("dead_after", self.dead_after, 0.0, _HOUR)
        least = self.interval + 2 * PATIENCE_MOST + QUESTIONS / self.probe_rate
        if self.dead_after < least:
            raise UsageError(
                f"dead_after is {self.dead_after:g} s, but evidence takes {least:g} s",
                hint="an interval, 2 s of patience and 60 probes: a higher probe_rate makes it less",
            )
        _check("busy_after", self.busy_after, self.dead_after, _DAY)
        if type(self.max_connections) is not int or not 1 <= self.max_connections <= _CONNECTIONS_MOST:
            raise UsageError(
                f"max_connections is a whole number from 1 to {_CONNECTIONS_MOST}, "
                f"not {self.max_connections!r}"
            )


class ConnectionHealth(msgspec.Struct, frozen=True, kw_only=True):
    """One connection, for people and JSON; seconds, without those in which we stalled or had no link."""

    connection: int
    status: str
    #: For how long it has been so, and why; "" while it never changed.
    since: float
    reason: str
    #: Since it was heard, since it answered, since its host answered (None: never).
    silent: float
    unconfirmed: float
    host_silent: float | None
    #: Of the silence.
    phi: float
    suspect: bool
    #: Questions in a row without an answer, and how many of them would prove it dead.
    failures: int
    failures_needed: int
    #: 0 to 1.
    loss_rate: float
    #: Reports of the network since it was heard.
    errors: int
    latency: LatencySnapshot
    #: The last changes, the oldest first, with the caller's times.
    history: list[str]


class HealthSummary(msgspec.Struct, kw_only=True):
    """All connections of a monitor, and counts since its beginning.

    asked = answered + late + failed + withdrawn + open: what was answered late has failed no more.
    """

    connections: int = 0
    healthy: int = 0
    degraded: int = 0
    unhealthy: int = 0
    dead: int = 0
    #: Those that are asked often, and of these the ones that stand in line for it.
    suspects: int = 0
    in_line: int = 0
    #: Questions, and of these the probes of suspects.
    asked: int = 0
    probes: int = 0
    answered: int = 0
    late: int = 0
    failed: int = 0
    #: Not sent, or open when the connection was removed or the link was down.
    withdrawn: int = 0
    open: int = 0
    #: Answers to nothing that was asked, or to what had been answered.
    ignored: int = 0
    #: Reports of connections that are not known.
    strays: int = 0
    #: How often what became so, and why: "dead: silent".
    changes: dict[str, int] = msgspec.field(default_factory=dict)
    #: Part of the last thousand questions to all that was lost, 0 to 1.
    loss_rate: float = 0.0
    #: Connections whose link is down.
    held: int = 0
    #: Stalls of our own loop, their seconds together, and how unwell it is: 0 to 8.
    stalls: int = 0
    stalled: float = 0.0
    score: int = 0
    callback_errors: int = 0
    last_callback_error: str = ""

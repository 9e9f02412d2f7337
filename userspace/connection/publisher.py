# SPDX-License-Identifier: Apache-2.0
"""Telling `sluice connections` what a conductor's connections are: state, health, why, and since when.

    publisher = ConnectionPublisher(conductor, "validator")
    while True:
        ...
        publisher.publish(time.monotonic())        # writes once a second, and else does nothing
    publisher.close()

The file and who believes it is :mod:`xdp.told`'s.  ``publish`` takes seconds of CLOCK_MONOTONIC, which the
conductor has to be told as well.  Of more than 512 connections the worst are told: those that failed before
those that are being opened, then the connected ones by health.  A file takes some 30 microseconds for each.
"""

from __future__ import annotations

import heapq
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from userspace.connection.conductor_report import connection_info
from userspace.connection.grading import Status
from userspace.connection.states import State
from xdp.connection_state import (
    CONNECTIONS,
    CONNECTIONS_MAXIMUM,
    HISTORY_MAXIMUM,
    ConnectionsState,
    ConnectionsTold,
    ConnectionTold,
    text_of,
)
from xdp.owner_state import RUN
from xdp.told import INTERVAL, Publisher

if TYPE_CHECKING:
    from collections.abc import Hashable

    from userspace.connection.conductor import Conductor
    from userspace.connection.conductor_links import Link
    from userspace.connection.conductor_settings import ConductorSnapshot

#: The worst first.
_ORDER: Final = (
    State.FAILED,
    State.DISCONNECTED,
    State.CONNECTING,
    State.DRAINING,
    State.CONNECTED,
    State.CLOSED,
)
_PLACES: Final = {state: place for place, state in enumerate(_ORDER)}
#: What numbers of a file may be (:mod:`xdp.told`).
_SECONDS_MAXIMUM: Final = 1e9


class ConnectionPublisher(Publisher[ConnectionsState]):
    """Writes the state of a conductor's connections.

    ``program``, ``interval`` and errors as :class:`xdp.told.Publisher` says.
    """

    __slots__ = ("_conductor",)

    folder = CONNECTIONS

    def __init__(
        self, conductor: Conductor, program: str, *, interval: float = INTERVAL, run: Path = RUN
    ) -> None:
        super().__init__(program, interval=interval, run=run)
        self._conductor = conductor

    def _state(self, now: float) -> ConnectionsState:
        conductor = self._conductor
        links = conductor.links.values()
        worst = heapq.nsmallest(CONNECTIONS_MAXIMUM, links, key=lambda link: _worth(conductor, link))
        return ConnectionsState(
            pid=os.getpid(),
            started=self._started,
            program=self._program,
            told_at=_seconds(now),
            summary=summary_told(conductor.snapshot(), conductor.pool.settings.max_size),
            total=len(links),
            connections=[connection_told(conductor, now, link) for link in worst],
        )


def _worth(conductor: Conductor, link: Link) -> tuple[int, int]:
    """The lower the worse."""
    return _PLACES[link.state.state], -conductor.monitor.status(link.number) if link.live else 0


def connection_told(conductor: Conductor, now: float, link: Link) -> ConnectionTold:
    """One connection, as a file may hold it."""
    info = connection_info(conductor, now, link)
    return ConnectionTold(
        connection=info.connection,
        endpoint=name_of(link.peer.key),
        address=name_of(link.address),
        state=info.state,
        since=_seconds(info.since),
        cause=info.cause or None,
        phase=info.phase,
        transport=info.transport or None,
        status=info.status,
        reason=None if info.reason is None else text_of(info.reason),
        silent=None if info.silent is None else _seconds(info.silent),
        latency=None if info.latency is None else _seconds(info.latency),
        loss_rate=info.loss_rate,
        failures=info.failures,
        next_attempt=None if info.next_attempt is None else _seconds(info.next_attempt),
        attempts=info.attempts,
        restarts=info.restarts,
        sent=info.sent,
        received=info.received,
        history=[text_of(line) for line in info.history[-HISTORY_MAXIMUM:]],
    )


def name_of(key: Hashable) -> str:
    """What people call an endpoint or an address: 192.0.2.7:8009, [2001:db8::7]:8009, a key in hex."""
    if isinstance(key, bytes):
        return text_of(key.hex())
    match key:
        case (str(host), int(port), *_):
            return text_of(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return text_of(key)


def summary_told(snapshot: ConductorSnapshot, max_size: int) -> ConnectionsTold:
    """All of them together."""
    pool, health = snapshot.pool, snapshot.health
    return ConnectionsTold(
        size=pool.size,
        max_size=max_size,
        in_use=pool.in_use,
        idle=pool.idle,
        opening=pool.opening,
        closing=pool.closing,
        waiting=pool.waiting,
        endpoints=pool.endpoints,
        well=pool.well,
        ejected=pool.ejected,
        given_up=snapshot.reconnection.given_up,
        held=health.held,
        panic=pool.panic,
        draining=pool.draining,
        states=snapshot.states,
        health={status.name.lower(): getattr(health, status.name.lower()) for status in Status},
        attempts=snapshot.attempts,
        failed=snapshot.failed,
        ended=snapshot.ended,
        waited=pool.waited,
        timed_out=pool.timed_out,
        probes=health.probes,
        stalls=health.stalls,
        errors=snapshot.factory_errors + snapshot.callback_errors,
        last_error=text_of(snapshot.last_factory_error or snapshot.last_callback_error),
    )


def _seconds(value: float) -> float:
    """Rounded to microseconds: a file is for people, and a float has 17 digits."""
    return round(min(max(value, 0.0), _SECONDS_MAXIMUM), 6)

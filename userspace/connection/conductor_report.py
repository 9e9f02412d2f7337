# SPDX-License-Identifier: Apache-2.0
"""What a conductor tells operators: :func:`connection_info` of one connection, :func:`conductor_snapshot`."""

from __future__ import annotations

from userspace.connection.conductor_core import ConductorCore
from userspace.connection.conductor_links import Link
from userspace.connection.conductor_settings import ConductorSnapshot, ConnectionInfo
from userspace.connection.reconnection import Phase
from userspace.connection.states import State, Transition
from userspace.connection.transport import Base


def _told(one: Transition) -> str:
    return f"{one.time:.3f} {one.before} -> {one.after}: {one.cause}"


def connection_info(conductor: ConductorCore, now: float, link: Link) -> ConnectionInfo:
    """One connection at a time that is not earlier than that of the last call."""
    key, state, transport = link.peer.key, link.state, link.transport
    known = conductor.reconnection.look(key)
    next_attempt = None
    if known is not None and known.phase is Phase.WAITING and known.timer is not None:
        next_attempt = max(0.0, known.timer - now)
    health = conductor.monitor.health(now, link.number) if link.live else None
    kind = ""
    if transport is not None:
        kind = transport.kind if isinstance(transport, Base) else type(transport).__name__
    return ConnectionInfo(
        connection=link.number,
        endpoint=str(key),
        address=str(link.address),
        state=state.state.value,
        since=max(0.0, now - state.since),
        cause="" if state.cause is None else state.cause.value,
        phase=conductor.pool.phase(link.number) or "",
        transport=kind,
        status=None if health is None else health.status,
        reason=None if health is None else health.reason,
        silent=None if health is None else health.silent,
        latency=None if health is None or not health.latency.samples else health.latency.peak,
        loss_rate=None if health is None else health.loss_rate,
        failures=0 if known is None else known.failures,
        next_attempt=next_attempt,
        attempts=link.attempts,
        restarts=link.restarts,
        sent=link.sent,
        received=link.received,
        history=[_told(one) for one in state.history()],
    )


def conductor_snapshot(conductor: ConductorCore) -> ConductorSnapshot:
    """All counts."""
    states = dict.fromkeys((state.value for state in State), 0)
    for link in conductor.links.values():
        states[link.state.state.value] += 1
    health = conductor.monitor.summary()
    reconnection = conductor.reconnection.snapshot()
    told = conductor.callbacks
    return ConductorSnapshot(
        pool=conductor.pool.snapshot(),
        health=health,
        reconnection=reconnection,
        states=states,
        attempts=conductor.attempts,
        opened=conductor.opened,
        failed={cause.value: count for cause, count in sorted(conductor.failed.items())},
        abandoned=conductor.abandoned,
        ended={cause.value: count for cause, count in sorted(conductor.ended.items())},
        in_line=len(conductor.line),
        sent=conductor.sent,
        refused=conductor.refused,
        received=conductor.received,
        lost=conductor.lost,
        datagrams_in=conductor.datagrams_in,
        datagrams_out=conductor.datagrams_out,
        stray=conductor.stray,
        restarts=conductor.restarts,
        factory_errors=conductor.factory_errors,
        last_factory_error=conductor.last_factory_error,
        callback_errors=health.callback_errors + sum(one.errors for one in told),
        last_callback_error=next((one.last_error for one in told if one.errors), health.last_callback_error),
    )

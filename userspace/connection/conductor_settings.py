# SPDX-License-Identifier: Apache-2.0
"""What a conductor is set to, and what it tells operators: settings and snapshots, for TOML and JSON."""

from __future__ import annotations

import msgspec

from userspace.connection.backoff import Backoff
from userspace.connection.health_report import HealthSettings, HealthSummary
from userspace.connection.pool_settings import PoolSettings, PoolSnapshot
from userspace.connection.reconnection import (
    ATTEMPT_TIMEOUT,
    BURST,
    PROOF_TIME,
    RATE,
    ReconnectionSnapshot,
)
from xdp.errors import UsageError


class ConductorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of all that a conductor ties together.  UsageError for values out of range."""

    pool: PoolSettings = PoolSettings()
    health: HealthSettings = HealthSettings()
    backoff: Backoff = Backoff()
    #: Attempts a second and at once: of endpoints that failed, and the same again of all other connections.
    attempt_rate: float = RATE
    attempt_burst: int = BURST
    #: Seconds that an attempt may take, and that a connection has to live before its endpoint counts as back.
    attempt_timeout: float = ATTEMPT_TIMEOUT
    proof_time: float = PROOF_TIME

    def __post_init__(self) -> None:
        for name, kind in (("pool", PoolSettings), ("health", HealthSettings), ("backoff", Backoff)):
            if not isinstance(value := getattr(self, name), kind):
                raise UsageError(f"{name} is {kind.__name__}, not {value!r}")
        if self.health.max_connections < self.pool.max_size:
            raise UsageError(
                f"{self.health.max_connections} connections are watched at most, "
                f"but the pool may have {self.pool.max_size}",
                hint="raise health.max_connections, or lower pool.max_size",
            )


class ConnectionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One connection, for people and JSON; seconds."""

    connection: int
    endpoint: str
    address: str
    #: Of userspace.connection.states, for how long it has been so, and why ("": it never changed).
    state: str
    since: float
    cause: str
    #: What it is to the pool: pending, dialing, idle, in use, closing.
    phase: str
    #: "UdpConnection", "QuicConnection", ...; "" while there is none.
    transport: str
    #: Health, None while it is not connected: status, why, seconds of silence, peak round-trip time, loss
    #: (0 to 1).
    status: str | None
    reason: str | None
    silent: float | None
    latency: float | None
    loss_rate: float | None
    #: Attempts of its endpoint that failed in a row, and seconds until the next one (None: not waited for).
    failures: int
    next_attempt: float | None
    #: Since it has its number: transports that were made, starts of the peer that were noticed, messages.
    attempts: int
    restarts: int
    sent: int
    received: int
    #: The last transitions, the oldest first: "12.345 connecting -> connected: opened".
    history: list[str]


class ConductorSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All counts of a conductor.

    attempts = opened + failed + abandoned + connections that are connecting;
    opened = ended + connections that are connected or draining.
    """

    pool: PoolSnapshot
    health: HealthSummary
    reconnection: ReconnectionSnapshot
    #: Connections by state (closed ones are gone).
    states: dict[str, int]
    #: Transports that were to be made.
    attempts: int
    opened: int
    #: Attempts that failed, by cause, and such as were given up by us before they ended.
    failed: dict[str, int]
    abandoned: int
    #: Connections that ended after they had been opened, by cause.
    ended: dict[str, int]
    #: In line until ``attempt_rate`` has room.
    in_line: int
    #: Messages taken by a transport, refused by it, received, and lost because nobody took them.
    sent: int
    refused: int
    received: int
    lost: int
    datagrams_out: int
    datagrams_in: int
    #: Datagrams and errors of connections that are not there (any more), or have no transport.
    stray: int
    restarts: int
    #: What factories and callbacks of the caller raised: how often, and the last one.
    factory_errors: int
    last_factory_error: str
    callback_errors: int
    last_callback_error: str

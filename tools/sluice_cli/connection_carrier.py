# SPDX-License-Identifier: Apache-2.0
"""Carries a conductor's datagrams through lanes, in a loop of its own, for benches and the lab.

    carrier = Carrier(lanes, port, make, rng=random.Random(1), settings=...)
    carrier.conductor.add_endpoint(carrier.now(), "a", addresses=[("192.0.2.7", 9000)])
    while ...:
        carrier.step(0.1)                # sends, waits for as long at most, receives, does what is due

All connections share one UDP port, so a datagram's connection is known by where it comes from: an address
belongs to one connection at a time.  A service that has an event loop uses userspace/connection/aio_pool.py.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Hashable
from ipaddress import IPv4Address, IPv6Address, ip_address
from random import Random
from typing import Final, NamedTuple

from userspace.connection.aio_link import Change, LinkWatch
from userspace.connection.conductor import Conductor, ConductorSettings, Received
from userspace.connection.transport import Transport
from userspace.datagram.lanes import Lanes

#: Datagrams that are received at once.
BATCH: Final = 256
#: Batches of one turn, so that a flood of strangers' datagrams keeps no timer waiting: some ms.
TURN_BATCHES: Final = 4
#: Seconds: the longest wait, so that an error that no descriptor tells of is read.
LONGEST: Final = 0.1

#: Host and port, as endpoints have it.
Address = tuple[str, int]
Source = tuple[IPv4Address | IPv6Address, int]


class Got(NamedTuple):
    """A message, and when it was read (seconds of CLOCK_MONOTONIC)."""

    at: float
    message: Received


class Carrier:
    """See the module.  ``make`` makes transports by endpoint; ``lanes`` and ``watch`` stay the caller's."""

    def __init__(
        self,
        lanes: Lanes,
        port: int,
        make: Callable[[float, Hashable], Transport],
        *,
        rng: Random,
        settings: ConductorSettings,
        watch: LinkWatch | None = None,
    ) -> None:
        self._lanes, self._port, self._make, self._watch = lanes, port, make, watch
        self._numbers: dict[Source, int] = {}
        self._addresses: dict[int, Source] = {}
        self.conductor = Conductor(
            self.now(), transport=self._transport, rng=rng, settings=settings, on_closed=self._closed
        )
        self._poll = select.poll()
        for source in (lanes, watch):
            if source is not None:
                self._poll.register(source.fileno(), select.POLLIN)
        #: When the carrier was last seen to come back; minus infinity: never.
        self.link_up_at = float("-inf")
        #: When each connection was heard for the last time.
        self.heard_at: dict[int, float] = {}
        self.sent = self.unsent = self.errors = self.strays = 0

    @staticmethod
    def now() -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()

    def _transport(self, now: float, connection: int, endpoint: Hashable, address: Hashable) -> Transport:
        made = self._make(now, endpoint)
        assert isinstance(address, tuple)
        source = ip_address(address[0]), int(address[1])
        self._forget(connection)
        self._numbers[source] = connection
        self._addresses[connection] = source
        return made

    def _closed(self, connection: int) -> None:
        self._forget(connection)
        self.heard_at.pop(connection, None)

    def _forget(self, connection: int) -> None:
        source = self._addresses.pop(connection, None)
        if source is not None and self._numbers.get(source) == connection:
            del self._numbers[source]

    def step(self, timeout: float) -> list[Got]:
        """One turn, which takes ``timeout`` seconds at most when nothing happens; what has come."""
        conductor = self.conductor
        self._send(self.now())
        before = self.now()
        due = min(conductor.next_timeout(), before + min(timeout, LONGEST))
        self._poll.poll(max(0.0, due - before) * 1e3)
        now = self.now()
        conductor.on_tick(now, due)
        for change in () if self._watch is None else self._watch.poll():
            if change is Change.UP:
                self.link_up_at = now
            conductor.on_link(now, change is not Change.DOWN)
        self._receive()
        now = self.now()
        for error in self._lanes.socket_errors():
            number = self._numbers.get((error.address, error.port))
            if number is not None:
                self.errors += 1
                conductor.on_error(now, number, error.errno)
        conductor.on_timeout(now)
        self._send(now)
        return [Got(now, message) for message in conductor.take_messages()]

    def _receive(self) -> None:
        for _ in range(TURN_BATCHES):
            with self._lanes.try_receive(BATCH) as batch:
                count, now = len(batch), self.now()
                for index in range(count):
                    number = self._numbers.get(batch.source(index))
                    if number is None:
                        self.strays += 1
                        continue
                    self.heard_at[number] = now
                    self.conductor.receive(now, number, bytes(batch[index]))
            if count < BATCH:
                return

    def _send(self, now: float) -> None:
        for one in self.conductor.take_datagrams(now):
            assert isinstance(one.address, tuple)
            if self._lanes.send(one.address, [one.payload], port=self._port):
                self.sent += 1
            else:
                self.unsent += 1

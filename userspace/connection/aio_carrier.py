# SPDX-License-Identifier: Apache-2.0
"""Carries the datagrams of connections: which port one leaves by, and whose an arriving one is.

A datagram is its peer's whose address and port it comes from, and a connection's by the port where it
arrives.  So several connections to one address need a port each, and all connections to different addresses
share one: ten thousand peers are one socket.

    carrier = Carrier(sockets())                     # or lane_ports(lanes, [8005, 8006])
    carrier.start(heard=..., refused=..., lost=...)
    carrier.attach(connection, ("192.0.2.7", 8009))
    carrier.send(conductor.take_datagrams(now))
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final, NamedTuple

from userspace.connection.aio_ports import LanePort, Owner, Port, SocketPort, checked_name
from userspace.connection.conductor_links import Datagram
from userspace.datagram.aio_dispatch import Name
from userspace.datagram.lanes import Lanes
from xdp.errors import BusyError

#: Sockets of one carrier: as many connections as one address can have.
SOCKETS_MAXIMUM: Final = 256

#: Opens another port for an address family (4 or 6), beside so many; BusyError when there can be no more.
OpenPort = Callable[[Owner, int, int], Port]


def sockets(*, local: tuple[str, int] | None = None) -> OpenPort:
    """Sockets of our own, as many as are needed; ``local``: only one, bound to that address and port."""

    def open_port(owner: Owner, family: int, count: int) -> Port:
        if count >= (1 if local is not None else SOCKETS_MAXIMUM):
            raise BusyError(
                f"{count} connections to one address are all that can be", hint="close some of them first"
            )
        return SocketPort(owner, family, local)

    return open_port


def lane_ports(lanes: Lanes, ports: Sequence[int]) -> OpenPort:
    """Service ports of lanes, which stay yours to close: one for each connection that an address may have."""

    def open_port(owner: Owner, family: int, count: int) -> Port:
        del family  # lanes are for both
        if count >= len(ports):
            raise BusyError(
                f"each of {len(ports)} ports has a connection to this address",
                hint="give it more service ports",
            )
        return LanePort(owner, lanes, ports[count])

    return open_port


class CarrierStatistics(NamedTuple):
    """Datagrams since the beginning; ``ports`` are those that are open, ``attached`` connections.

    ``stray`` came from nobody who has a connection; ``dropped`` were not sent by this host.
    """

    ports: int
    attached: int
    sent: int
    dropped: int
    received: int
    stray: int
    refused: int


class _Place(NamedTuple):
    port: Port
    name: Name


class Carrier:
    """See the module.  It belongs to the thread of the event loop."""

    def __init__(self, open_port: OpenPort) -> None:
        self._open_port = open_port
        #: By address family; those of lanes are for both.
        self._ports: dict[int, list[Port]] = {}
        self._connections: dict[Port, dict[Name, int]] = {}
        self._places: dict[int, _Place] = {}
        self._heard: Callable[[int, bytes], object] = lambda _connection, _data: None
        self._refused: Callable[[int, int], object] = lambda _connection, _errno: None
        self._lost: Callable[[Exception], object] = lambda _error: None
        self._sent = self._dropped = self._received = self._stray = self._refusals = 0

    def start(
        self,
        *,
        heard: Callable[[int, bytes], object],
        refused: Callable[[int, int], object],
        lost: Callable[[Exception], object],
    ) -> None:
        """Whom to tell: of datagrams for a connection, of errors (errno) of its peer, and of the end."""
        self._heard, self._refused, self._lost = heard, refused, lost

    def attach(self, connection: int, address: Hashable) -> None:
        """Carry a connection to that address from now on.

        Raises UsageError (no address), BusyError (no port is free for it), SluiceError (no socket).
        """
        name = checked_name(address)
        place = self._places.get(connection)
        if place is not None:
            if place.name == name:
                return
            self.detach(connection)
        port = self._free_port(name)
        self._connections[port][name] = connection
        self._places[connection] = _Place(port, name)

    def _free_port(self, name: Name) -> Port:
        family = 4 if len(name) == 2 else 6
        ports = self._ports.get(0) or self._ports.setdefault(family, [])
        for port in ports:
            if name not in self._connections[port]:
                return port
        port = self._open_port(self, family, len(ports))
        self._ports.setdefault(port.family, []).append(port)
        self._connections[port] = {}
        return port

    def detach(self, connection: int) -> None:
        """Carry it no more; nothing happens when it is not carried."""
        place = self._places.pop(connection, None)
        if place is None:
            return
        connections = self._connections[place.port]
        del connections[place.name]
        ports = self._ports[place.port.family]
        if not connections and place.port is ports[-1] and len(ports) > 1:
            self._close(place.port)

    def _close(self, port: Port) -> None:
        self._ports[port.family].remove(port)
        del self._connections[port]
        port.close()
        self._dropped += port.dropped

    def send(self, datagrams: Iterable[Datagram]) -> None:
        """Send each from the port of its connection; those of connections that are not carried are lost."""
        places = self._places
        for connection, _, payload in datagrams:
            place = places.get(connection)
            if place is None:
                self._dropped += 1
                continue
            self._sent += 1
            place.port.send(payload, place.name)

    # --- see Owner

    def heard(self, port: Port, name: Name, data: bytes) -> None:
        """A datagram came from there."""
        self._received += 1
        connection = self._connections[port].get(name) if port in self._connections else None
        if connection is None:
            self._stray += 1
        else:
            self._heard(connection, data)

    def refused(self, port: Port, name: Name, errno: int) -> None:
        """The network says that a datagram has not arrived there."""
        self._refusals += 1
        connection = self._connections[port].get(name) if port in self._connections else None
        if connection is not None:
            self._refused(connection, errno)

    def lost(self, port: Port, error: Exception) -> None:
        """A port is of no use any more, so all of this is."""
        del port
        self._lost(error)

    # --- the end

    def close(self) -> None:
        """Close all ports; idempotent."""
        self._places.clear()
        for ports in self._ports.values():
            for port in [*ports]:
                self._close(port)

    def statistics(self) -> CarrierStatistics:
        """Counts."""
        open_ports = [port for ports in self._ports.values() for port in ports]
        return CarrierStatistics(
            ports=len(open_ports),
            attached=len(self._places),
            sent=self._sent,
            dropped=self._dropped + sum(port.dropped for port in open_ports),
            received=self._received,
            stray=self._stray,
            refused=self._refusals,
        )

    def __repr__(self) -> str:
        return f"<Carrier: {len(self._places)} connections on {len(self._connections)} ports>"

# SPDX-License-Identifier: Apache-2.0
"""Which endpoint gets a datagram: lanes in, single datagrams by destination port out.

What :mod:`userspace.datagram.aio_protocol` is made of; nobody else needs it.
"""

from __future__ import annotations

import asyncio
import struct
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, Protocol, TypeAlias

from userspace.datagram.aio import Watch
from userspace.datagram.aio_send import Outlet, outlet_of
from userspace.datagram.batch import SOURCE_SIZE, Batch
from userspace.datagram.destination import Endpoint
from userspace.datagram.fanout import Fanout
from userspace.datagram.lanes import Lanes
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.portable import PortableLanes
from userspace.datagram.sockets import SocketAddress, pack_name
from userspace.datagram.xsk_lanes import XskLanes
from userspace.native._native import ffi
from xdp.errors import BusyError, UsageError

#: A peer as asyncio has it: (host, port), over IPv6 (host, port, 0, interface index of a link-local one).
Name: TypeAlias = tuple[str, int] | tuple[str, int, int, int]

#: Datagrams of one turn of the event loop.  Each is a call into a protocol, which takes 10 to 100 µs where
#: there is cryptography, so timers are late by some milliseconds at most.
TURN_BATCH = 64

# Peers whose addresses are kept in the form that the other side wants; then it starts anew.
_MAX_PEERS = 65_536

# Bytes from the destination port in the UDP header to the payload (RFC 768).
_PORT_BEFORE = 6
# Where struct sl_source has its address family.
_FAMILY_AT = 22


class Peer(NamedTuple):
    """Where to send, in all forms that backends want."""

    endpoint: Endpoint
    address: SocketAddress
    packed: bytes  # struct sl_source


class Gathered(Fanout):
    """Destinations that were looked up before, so that making one costs little."""

    __slots__ = ()

    def __init__(self, peers: Sequence[Peer]) -> None:
        self.endpoints = tuple((str(host), port) for (host, port), _, _ in peers)
        self.addresses = tuple(peer.address for peer in peers)
        self.sources = ffi.new("struct sl_source[]", len(peers))
        packed = b"".join([peer.packed for peer in peers])
        ffi.memmove(self.sources, packed, len(packed))


def make_peer(name: Name) -> Peer:
    """From what asyncio programs give as an address.  Raises UsageError; names are not resolved."""
    try:
        host, port = str(name[0]), name[1]
        scope = name[3] if len(name) == 4 else 0
    except (TypeError, IndexError, KeyError):
        raise UsageError(f"{name!r} is not an address", hint="give (host, port)") from None
    if scope and "%" not in host:
        host = f"{host}%{scope}"
    address = SocketAddress.parse((host, port))
    packed = pack_name((host.partition("%")[0], port, 0, address.scope))
    return Peer((host, port), address, packed)


def name_of(address: SocketAddress) -> Name:
    """As asyncio's own transports give it to protocols."""
    if address.family == 4:
        return (str(IPv4Address(address.address[12:])), address.port)
    return (str(IPv6Address(address.address)), address.port, 0, address.scope)


def arrival_ports(batch: Batch) -> Iterable[int]:
    """The destination port of each packet: that of its socket, or of its UDP header."""
    backend = batch.backend
    if isinstance(backend, (MmsgLanes, PortableLanes)):
        ports = backend.port_of_socket
        return [ports[number] for number in ffi.unpack(batch.memory.sizes, len(batch))]
    data = batch.data
    # A packet that is no UDP has no such header; its source is unknown, too.
    starts = [max(start - _PORT_BEFORE, 0) for start in batch.offsets.tolist()]
    return [data[start] << 8 | data[start + 1] for start in starts]


def kernel_lanes(lanes: Lanes) -> MmsgLanes | PortableLanes | None:
    """Those with the kernel sockets of the service ports."""
    if isinstance(lanes, XskLanes):
        return lanes.companion.lanes if lanes.companion is not None else None
    return lanes if isinstance(lanes, (MmsgLanes, PortableLanes)) else None


class Receiver(Protocol):
    """What an endpoint is to its dispatcher."""

    def received(self, data: bytes, name: Name) -> bool:
        """A datagram; False: it is not for this endpoint."""

    def refused(self, error: OSError, name: Name) -> None:
        """The network says that a datagram from here to ``name`` has not arrived."""

    def lost(self, error: Exception) -> None:
        """The lanes are of no use any more."""


@dataclass(frozen=True, slots=True)
class DispatchStatistics:
    """Datagrams since the first endpoint was opened: ``received = delivered + refused + unreadable +
    sum(no_endpoint.values())``.

    ``no_endpoint`` has those of ports without one, by port; ``refused`` those of others than an
    endpoint's ``remote_addr``; ``unreadable`` those whose headers do not tell where they came from.
    """

    received: int
    delivered: int
    refused: int
    unreadable: int
    no_endpoint: dict[int, int]


class Dispatcher:
    """All endpoints of some lanes."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.outlet: Outlet = outlet_of(lanes)
        self.endpoints: dict[int, Receiver] = {}
        self._kernel = kernel_lanes(lanes)
        self._names: dict[bytes, Name] = {}
        self._peers: dict[Name, Peer] = {}
        self._received = self._delivered = self._refused = self._unreadable = 0
        self._no_endpoint: Counter[int] = Counter()
        self._watch = Watch(lanes, self._ready, self._ready)
        self.loop = asyncio.get_running_loop()

    @classmethod
    def of(cls, lanes: Lanes) -> Dispatcher:
        """The one of these lanes, made when there is none.  Raises as Watch does."""
        found = _dispatchers.get(id(lanes))
        if found is None or found.loop is not asyncio.get_running_loop():
            found = _dispatchers[id(lanes)] = cls(lanes)
        return found

    def check_free(self, port: int) -> None:
        """Raises BusyError."""
        if port in self.endpoints:
            raise BusyError(f"port {port} of these lanes has an endpoint", hint="close that first")

    def add(self, port: int, endpoint: Receiver) -> None:
        """Datagrams to that port, which was free, are its from now on."""
        self.endpoints[port] = endpoint

    def remove(self, port: int, endpoint: Receiver) -> None:
        """No more for it; with the last one all of this ends."""
        if self.endpoints.get(port) is endpoint:
            del self.endpoints[port]
            self.close_unused()

    def close_unused(self) -> None:
        """End, if there is no endpoint."""
        if not self.endpoints and _dispatchers.get(id(self.lanes)) is self:
            del _dispatchers[id(self.lanes)]
            self._watch.close()

    def statistics(self) -> DispatchStatistics:
        """Of all endpoints."""
        return DispatchStatistics(
            self._received, self._delivered, self._refused, self._unreadable, dict(self._no_endpoint)
        )

    def peer(self, name: Name) -> Peer:
        """Looked up once, as long as there are not too many."""
        try:
            found = self._peers.get(name)
        except TypeError:  # a list, say
            name = tuple(name)  # type: ignore[assignment]
            found = self._peers.get(name)
        if found is None:
            if len(self._peers) >= _MAX_PEERS:
                self._peers.clear()
            found = self._peers[name] = make_peer(name)
        return found

    def _ready(self) -> None:
        try:
            batch = self.lanes.try_receive(TURN_BATCH)
        except Exception as error:  # noqa: BLE001 - whatever it is, the protocols are told of it
            for endpoint in list(self.endpoints.values()):
                endpoint.lost(error)
            return
        with batch:
            if batch:
                self._deliver(batch)
        self._tell_errors()

    def _tell_errors(self) -> None:
        if self._kernel is None or self._kernel._closed:
            return
        for reported in self._kernel._take_errors(look=False):
            endpoint = self.endpoints.get(reported.service_port)
            # Of what this host could not send, its sender was told.
            if endpoint is not None and reported.origin != "local":
                endpoint.refused(reported.error, reported.name)

    def _deliver(self, batch: Batch) -> None:
        data, endpoints, names = batch.data, self.endpoints, self._names
        self._received += len(batch)
        sources = [source for (source,) in struct.iter_unpack(f"{SOURCE_SIZE}s", batch.sources)]
        for port, start, length, source in zip(
            arrival_ports(batch), batch.offsets.tolist(), batch.lengths.tolist(), sources, strict=True
        ):
            if not source[_FAMILY_AT]:
                self._unreadable += 1
                continue
            endpoint = endpoints.get(port)
            if endpoint is None:
                self._no_endpoint[port] += 1
                continue
            name = names.get(source)
            if name is None:
                if len(names) >= _MAX_PEERS:
                    names.clear()
                name = names[source] = name_of(SocketAddress.unpack(source))
            if endpoint.received(bytes(data[start : start + length]), name):
                self._delivered += 1
            else:
                self._refused += 1


# By the id of their lanes, which they keep.
_dispatchers: weakref.WeakValueDictionary[int, Dispatcher] = weakref.WeakValueDictionary()

# SPDX-License-Identifier: Apache-2.0
"""Read the UDP datagrams of a capture: classic pcap and pcapng.

    capture = Capture(path)
    for datagram in capture:
        datagram.payload, datagram.destination_port, datagram.time_ns
    capture.read, capture.skipped

Formats: draft-ietf-opsawg-pcap (both byte orders, microseconds and nanoseconds) and
draft-ietf-opsawg-pcapng (sections, interfaces, enhanced, simple and the old packet blocks; other blocks
and all options but the clock's resolution and offset are skipped).  A capture is hostile input: every
length is checked before it is believed, nothing larger than `MAX_BLOCK` is ever held, and what does not
fit is a `CaptureError` that names the file and the offset.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import BinaryIO, Final

from sluice_cli.dissect import Datagram, NotADatagram, find_by_ethertype, find_in_ethernet, find_in_ip
from xdp.errors import UsageError

__all__ = ["Capture", "CaptureError", "CapturedDatagram"]

#: Largest packet: libpcap's own limit (MAXIMUM_SNAPLEN), far above any UDP datagram.
MAX_PACKET: Final = 262_144
#: Largest pcapng block that is held; larger ones exist only for other purposes.
MAX_BLOCK: Final = 16 << 20
#: Interfaces of one pcapng section.
MAX_INTERFACES: Final = 4096

_CLASSIC_MAGIC: Final[dict[bytes, tuple[str, int]]] = {
    # byte order, nanoseconds of one unit of the fraction
    bytes.fromhex("d4c3b2a1"): ("<", 1000),
    bytes.fromhex("a1b2c3d4"): (">", 1000),
    bytes.fromhex("4d3cb2a1"): ("<", 1),
    bytes.fromhex("a1b23c4d"): (">", 1),
}
# "Modified" pcap of old kernels: longer record headers.
_MODIFIED_MAGIC: Final = (bytes.fromhex("34cdb2a1"), bytes.fromhex("a1b2cd34"))
_PCAPNG_MAGIC: Final = bytes.fromhex("0a0d0d0a")
_GZIP_MAGIC: Final = b"\x1f\x8b"
_ORDER_MAGIC: Final[dict[bytes, str]] = {bytes.fromhex("4d3c2b1a"): "<", bytes.fromhex("1a2b3c4d"): ">"}

_SECTION, _INTERFACE, _OLD_PACKET, _SIMPLE, _ENHANCED = 0x0A0D0D0A, 1, 2, 3, 6
_OPTION_END, _OPTION_RESOLUTION, _OPTION_OFFSET = 0, 9, 14
_MICROSECONDS: Final = 6  # a pcapng interface without if_tsresol counts in 10^-6 s
# An if_tsresol finer than this is nonsense, and its power would be a huge number.
_FINEST_RESOLUTION: Final = 63


class CaptureError(UsageError):
    """A file that is no capture, or is damaged; the message names file and offset."""


@dataclass(frozen=True, slots=True)
class CapturedDatagram:
    """One UDP datagram.  ``time_ns`` is since the epoch, None where the capture has no time for it."""

    time_ns: int | None
    source: IPv4Address | IPv6Address
    source_port: int
    destination: IPv4Address | IPv6Address
    destination_port: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class _Interface:
    link_type: int
    snap_length: int
    resolution: int  # units per second
    offset_ns: int


@dataclass(frozen=True, slots=True)
class _Record:
    link_type: int
    time_ns: int | None
    data: bytes


class Capture:
    """A capture file; each iteration reads it from the start.

    ``read`` counts the packets seen, ``skipped`` those that are no whole UDP datagram, by reason (those of
    `sluice_cli.dissect` and ``link_type``).  Both are of the current iteration.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.read = 0
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[CapturedDatagram]:
        """Yield the datagrams in the file's order.

        Raises:
            CaptureError: the file cannot be opened or read, or is damaged; what came before was yielded.
        """
        self.read = 0
        self.skipped = Counter()
        try:
            with self.path.open("rb") as file:
                yield from self._datagrams(_Source(self.path, file))
        except OSError as error:
            raise CaptureError(f"{self.path}: {error.strerror}", hint="name a readable capture") from None

    def _datagrams(self, source: _Source) -> Iterator[CapturedDatagram]:
        for record in _records(source):
            self.read += 1
            try:
                where = _find(record)
            except NotADatagram as answer:
                self.skipped[answer.reason] += 1
                continue
            yield _cut(record, where)


class _Source:
    """A file that is read forward, with errors that say where."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.offset = 0

    def take(self, size: int, what: str) -> bytes:
        data = self.maybe(size)
        if len(data) < size:
            at = self.offset - len(data)
            raise self.error(f"the file ends after {len(data)} of {size} bytes of {what}", at)
        return data

    def maybe(self, size: int) -> bytes:
        """``size`` bytes, fewer at the end of the file."""
        data = self.file.read(size)
        self.offset += len(data)
        return data

    def error(self, why: str, offset: int, hint: str = "") -> CaptureError:
        return CaptureError(
            f"{self.path}: offset {offset}: {why}",
            hint=hint or "the capture is damaged; `editcap FILE NEW` may save what is whole",
        )


def _records(source: _Source) -> Iterator[_Record]:
    magic = source.maybe(4)
    if magic in _CLASSIC_MAGIC:
        return _classic(source, *_CLASSIC_MAGIC[magic])
    if magic == _PCAPNG_MAGIC:
        return _pcapng(source)
    hint = "name a pcap or pcapng file, as tcpdump and wireshark write it"
    if magic[:2] == _GZIP_MAGIC:
        raise source.error("compressed with gzip", 0, hint="unpack it first: gunzip -k FILE")
    if magic in _MODIFIED_MAGIC:
        raise source.error("the old modified pcap format", 0, hint="convert it: editcap -F pcap FILE NEW")
    if not magic:
        raise source.error("the file is empty", 0, hint=hint)
    raise source.error(f"no capture: it begins with {magic.hex()}", 0, hint=hint)


def _classic(source: _Source, order: str, nanoseconds: int) -> Iterator[_Record]:
    head = struct.Struct(order + "HHiIII")
    major, _minor, _zone, _sigfigs, _snap, link = head.unpack(source.take(head.size, "the file header"))
    if major != 2:
        raise source.error(f"pcap version {major}; known: 2", 4)
    # The upper 16 bits tell about an FCS, which is behind the IP packet and so of no interest.
    link &= 0xFFFF
    record = struct.Struct(order + "IIII")
    while True:
        start = source.offset
        raw = source.maybe(record.size)
        if not raw:
            return
        if len(raw) < record.size:
            raise source.error(f"the file ends in a packet header, after {len(raw)} bytes", start)
        seconds, fraction, length, original = record.unpack(raw)
        if length > MAX_PACKET:
            raise source.error(f"a packet of {length} bytes; allowed: {MAX_PACKET}", start)
        if fraction * nanoseconds >= 10**9:
            raise source.error(f"a packet's time has a fraction of {fraction}, more than a second", start)
        if length > original:
            raise source.error(f"a packet of {original} bytes with {length} captured", start)
        data = source.take(length, "a packet")
        yield _Record(link, seconds * 10**9 + fraction * nanoseconds, data)


def _pcapng(source: _Source) -> Iterator[_Record]:
    order = "<"
    interfaces: list[_Interface] = []
    start, kind = 0, _PCAPNG_MAGIC
    while kind:
        if len(kind) < 4:
            raise source.error(f"the file ends after {len(kind)} of 4 bytes of a block's type", start)
        head = source.take(4, "a block's length")
        # A section header reads the same in both byte orders, and says which one follows.
        if kind == _PCAPNG_MAGIC:
            found = _ORDER_MAGIC.get(source.take(4, "a section header"))
            if found is None:
                raise source.error("a section header without byte-order magic", start + 8)
            order, consumed = found, 12
            interfaces = []
        else:
            consumed = 8
        number, length = struct.unpack(order + "II", kind + head)
        if length < consumed + 4 or length % 4 or length > MAX_BLOCK:
            raise source.error(f"a block of {length} bytes; allowed: multiples of 4 up to {MAX_BLOCK}", start)
        body = source.take(length - consumed - 4, "a block")
        (again,) = struct.unpack(order + "I", source.take(4, "a block's end"))
        if again != length:
            raise source.error(f"a block of {length} bytes ends as one of {again}", start)
        block = _Block(source, start, order, body)
        if number == _SECTION:
            block.check_version()
        elif number == _INTERFACE:
            if len(interfaces) == MAX_INTERFACES:
                raise source.error(f"more than {MAX_INTERFACES} interfaces", start)
            interfaces.append(block.interface())
        elif number in (_ENHANCED, _OLD_PACKET):
            yield block.packet(interfaces, old=number == _OLD_PACKET)
        elif number == _SIMPLE:
            yield block.simple_packet(interfaces)
        start = source.offset
        kind = source.maybe(4)


@dataclass(frozen=True, slots=True)
class _Block:
    """The body of one pcapng block."""

    source: _Source
    start: int
    order: str
    body: bytes

    def unpack(self, layout: str, what: str) -> tuple[int, ...]:
        form = struct.Struct(self.order + layout)
        if len(self.body) < form.size:
            raise self.error(f"{what} of {len(self.body)} bytes; it has at least {form.size}")
        return form.unpack_from(self.body)

    def error(self, why: str) -> CaptureError:
        return self.source.error(why, self.start)

    def check_version(self) -> None:
        major, _minor = self.unpack("HH", "a section header")
        if major != 1:
            raise self.error(f"pcapng version {major}; known: 1")

    def interface(self) -> _Interface:
        link, _reserved, snap = self.unpack("HHI", "an interface")
        resolution, offset_ns = 10**_MICROSECONDS, 0
        for code, value in self._options(8):
            if code == _OPTION_RESOLUTION and len(value) == 1:
                power = value[0] & 0x7F
                if power > _FINEST_RESOLUTION:
                    raise self.error(f"an interface that counts time in units of 2^-{power} or 10^-{power} s")
                resolution = 2**power if value[0] & 0x80 else 10**power
            elif code == _OPTION_OFFSET and len(value) == 8:
                offset_ns = struct.unpack(self.order + "q", value)[0] * 10**9
        return _Interface(link, snap, resolution, offset_ns)

    def _options(self, offset: int) -> Iterator[tuple[int, bytes]]:
        while offset + 4 <= len(self.body):
            code, length = struct.unpack_from(self.order + "HH", self.body, offset)
            offset += 4
            if code == _OPTION_END:
                return
            if offset + length > len(self.body):
                raise self.error(f"an option of {length} bytes that reaches past its block")
            yield code, self.body[offset : offset + length]
            offset += (length + 3) & ~3

    def packet(self, interfaces: list[_Interface], *, old: bool) -> _Record:
        if old:
            number, _drops, high, low, length, _original = self.unpack("HHIIII", "a packet block")
        else:
            number, high, low, length, _original = self.unpack("IIIII", "a packet block")
        interface = self._interface_of(interfaces, number)
        ticks = high << 32 | low
        time_ns = ticks * 10**9 // interface.resolution + interface.offset_ns
        return _Record(interface.link_type, time_ns, self._data(20, length))

    def simple_packet(self, interfaces: list[_Interface]) -> _Record:
        (original,) = self.unpack("I", "a simple packet block")
        interface = self._interface_of(interfaces, 0)
        length = min(original, interface.snap_length or original)
        return _Record(interface.link_type, None, self._data(4, length))

    def _interface_of(self, interfaces: list[_Interface], number: int) -> _Interface:
        if number >= len(interfaces):
            raise self.error(f"a packet of interface {number}, of which there are {len(interfaces)}")
        return interfaces[number]

    def _data(self, offset: int, length: int) -> bytes:
        if length > min(MAX_PACKET, len(self.body) - offset):
            raise self.error(f"a packet of {length} bytes in a block with room for {len(self.body) - offset}")
        return self.body[offset : offset + length]


def _find(record: _Record) -> Datagram:
    find = _LINK_TYPES.get(record.link_type)
    if find is None:
        raise NotADatagram("link_type")
    return find(record.data)


def _cut(record: _Record, where: Datagram) -> CapturedDatagram:
    data = record.data
    address = IPv4Address if where.version == 4 else IPv6Address
    source_port, destination_port = struct.unpack_from("!HH", data, where.udp)
    return CapturedDatagram(
        record.time_ns,
        address(data[where.source]),
        source_port,
        address(data[where.destination]),
        destination_port,
        data[where.payload : where.payload + where.length],
    )


def _in_linux_cooked(protocol: int, network: int) -> Callable[[bytes], Datagram]:
    """Linux "cooked" (``tcpdump -i any``): an ethertype at ``protocol``, the packet at ``network``."""

    def find(data: bytes) -> Datagram:
        if len(data) < network:
            raise NotADatagram("truncated")
        return find_by_ethertype(data, network, data[protocol] << 8 | data[protocol + 1])

    return find


def _in_loopback(data: bytes) -> Datagram:
    """BSD loopback: an address family in some byte order, which the IP version makes superfluous."""
    if len(data) < 4:
        raise NotADatagram("truncated")
    if _FAMILIES.isdisjoint((int.from_bytes(data[:4], "big"), int.from_bytes(data[:4], "little"))):
        raise NotADatagram("not_ip")
    return find_in_ip(data, 4)


# AF_INET everywhere; AF_INET6 of Linux, NetBSD and OpenBSD, FreeBSD, macOS.
_FAMILIES: Final = frozenset({2, 10, 24, 28, 30})

# tcpdump.org/linktypes.html; 12 and 14 are what BSDs write for raw IP.
_LINK_TYPES: Final[dict[int, Callable[[bytes], Datagram]]] = {
    0: _in_loopback,
    1: find_in_ethernet,
    12: find_in_ip,
    14: find_in_ip,
    101: find_in_ip,
    108: _in_loopback,
    113: _in_linux_cooked(14, 16),
    228: find_in_ip,
    229: find_in_ip,
    276: _in_linux_cooked(0, 20),
}

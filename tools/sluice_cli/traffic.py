# SPDX-License-Identifier: Apache-2.0
"""Frames for the load generator and for tests: whole UDP frames, and payloads that look like a validator's.

    frame = udp_frame(lab.client, lab.server, 8001, shred_payload("data"))
    template = Template(frame, stamp=SHRED_STAMP)

A frame is built once; the generator changes sequence number, time and source of each copy itself.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Literal, Protocol

from sluice_cli.dissect import Datagram, NotADatagram, find_in_ethernet
from xdp.errors import UsageError

Address = IPv4Address | IPv6Address

#: Where votes and shreds carry `struct sluice_stamp`, as an offset in the payload.
VOTE_STAMP: Final = 2  # inside the signature
SHRED_STAMP: Final = 96  # behind the headers
STAMP_BYTES: Final = 16

#: Payload sizes of Merkle shreds.
DATA_SHRED_BYTES: Final = 1203
CODE_SHRED_BYTES: Final = 1228
_SHRED_VARIANT: Final = {"data": 0x96, "code": 0x66}  # byte 64: Merkle, chained, 6 proof entries

_HOP_LIMIT: Final = 64
_UDP: Final = 17


class Endpoint(Protocol):
    """What a frame needs to know of a host; `lab.Host` has it."""

    @property
    def mac(self) -> str:
        """As 02:00:00:00:00:01."""
        ...

    @property
    def ipv4(self) -> IPv4Address:
        """Its IPv4 address."""
        ...

    @property
    def ipv6(self) -> IPv6Address:
        """Its IPv6 address."""
        ...


@dataclass(frozen=True)
class Template:
    """A frame to send many times.

    Args:
        frame: Ethernet without FCS, 14 to 2,048 bytes.
        stamp: offset in the UDP payload where the generator writes sequence number and time
            (16 bytes, host order; see bpf/include/generate.h), even; None: nowhere.

    Raises:
        UsageError: the frame has no place for the stamp.
    """

    frame: bytes
    stamp: int | None = None

    def __post_init__(self) -> None:
        if not 14 <= len(self.frame) <= 2048:
            raise UsageError(f"a template of {len(self.frame)} bytes; allowed: 14 to 2048")
        if self.stamp is None:
            return
        datagram = self.datagram
        if datagram is None:
            raise UsageError("a stamp goes into a UDP datagram, and the template is none")
        if self.stamp < 0 or self.stamp % 2 or self.stamp + STAMP_BYTES > datagram.length:
            raise UsageError(
                f"no place for a stamp at offset {self.stamp} of a payload of {datagram.length} bytes",
                hint=f"it has {STAMP_BYTES} bytes and an even offset",
            )

    @property
    def datagram(self) -> Datagram | None:
        """Where the UDP datagram is; None when the frame has none."""
        try:
            return find_in_ethernet(self.frame)
        except NotADatagram:
            return None


def udp_frame(
    source: Endpoint,
    destination: Endpoint,
    port: int,
    payload: bytes,
    *,
    version: Literal[4, 6] = 4,
    source_port: int = 40000,
    source_address: Address | None = None,
    vlans: Sequence[tuple[int, int]] = (),
    options: bytes = b"",
) -> bytes:
    """A whole Ethernet frame with one UDP datagram and right checksums.

    Args:
        source: the host whose MAC and, unless given, address it carries.
        destination: likewise.
        port: destination port.
        payload: of the datagram.
        version: of IP.
        source_port: source port.
        source_address: another one than the source's own.
        vlans: tags, outermost first, as (ethertype, tag control): ``[(0x88a8, 5), (0x8100, 7)]``.
        options: IPv4 options, a multiple of 4 bytes and at most 40.
    """
    if source_address is None:
        source_address = source.ipv4 if version == 4 else source.ipv6
    target: Address = destination.ipv4 if version == 4 else destination.ipv6
    if source_address.version != version:
        raise UsageError(f"{source_address} is no IPv{version} address")
    if len(options) % 4 or len(options) > 40 or (options and version == 6):
        raise UsageError(f"{len(options)} bytes of IPv4 options; allowed: 0 to 40 in steps of 4")
    length = 8 + len(payload)
    addresses = (source_address.packed, target.packed)
    pseudo = b"".join(addresses) + struct.pack("!II", length, _UDP)
    udp = struct.pack("!HHHH", source_port, port, length, 0) + payload
    udp = udp[:6] + _check(pseudo + udp, zero=0xFFFF) + udp[8:]
    if version == 4:
        words = 5 + len(options) // 4
        header = struct.pack(
            "!BBHHHBBH4s4s",
            0x40 | words, 0, words * 4 + length, 0, 0x4000, _HOP_LIMIT, _UDP, 0, *addresses,
        )  # fmt: skip
        header += options
        header = header[:10] + _check(header) + header[12:]
        ethertype = 0x0800
    else:
        header = struct.pack("!IHBB16s16s", 6 << 28, length, _UDP, _HOP_LIMIT, *addresses)
        ethertype = 0x86DD
    ethernet = _mac(destination.mac) + _mac(source.mac)
    tags = b"".join(struct.pack("!HH", tag, control) for tag, control in vlans)
    return ethernet + tags + struct.pack("!H", ethertype) + header + udp


def vote_payload(size: int = 320) -> bytes:
    """Shaped like a vote transaction: one signature, three accounts, one instruction of the vote program."""
    accounts = b"\x03" + _filler(96, 1)
    instruction = b"\x01\x02\x02\x01\x00"  # one; program 2; accounts 1 and 0
    message = b"\x01\x00\x01" + accounts + _filler(32, 2) + instruction
    head = b"\x01" + _filler(64, 3) + message
    if size < len(head) + 2:
        raise UsageError(f"a vote of {size} bytes; allowed: {len(head) + 2} and more")
    return head + _filler(size - len(head), 4)


def shred_payload(kind: Literal["data", "code"] = "data", *, slot: int = 1, index: int = 0) -> bytes:
    """Shaped like a Merkle shred: the headers are right, signature and contents are filler."""
    variant = _SHRED_VARIANT[kind]
    common = struct.pack("<BQIHI", variant, slot, index, 1, index - index % 32)
    if kind == "data":
        size = DATA_SHRED_BYTES
        own = struct.pack("<HBH", 1, 0, DATA_SHRED_BYTES)
    else:
        size = CODE_SHRED_BYTES
        own = struct.pack("<HHH", 32, 32, index % 32)
    head = _filler(64, 5) + common + own
    return head + _filler(size - len(head), 6)


def ones_sum(data: bytes, order: str = "!") -> int:
    """Ones' complement sum of 16-bit words (RFC 1071), not folded; an odd byte is padded with zero."""
    if len(data) % 2:
        data += b"\x00"
    return sum(struct.unpack(f"{order}{len(data) // 2}H", data))


def _check(data: bytes, zero: int = 0) -> bytes:
    total = ones_sum(data)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF or zero)


def _mac(text: str) -> bytes:
    raw = bytes.fromhex(text.replace(":", ""))
    if len(raw) != 6:
        raise UsageError(f"{text!r} is no MAC address")
    return raw


def _filler(size: int, seed: int) -> bytes:
    """Bytes without meaning, the same in every run."""
    return bytes((seed * 151 + i * 31 + (i >> 8) * 7) & 0xFF for i in range(size))

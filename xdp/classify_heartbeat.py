# SPDX-License-Identifier: Apache-2.0
"""Heartbeats as the kernel program answers them: what a probe is, and its reply.

Layout: ``struct sluice_heartbeat`` in bpf/include/abi.h.  A reply differs from
the probe in its type, in swapped addresses and ports, a fresh TTL and checksums.
"""

from __future__ import annotations

import struct

from xdp._libbpf import ffi, lib
from xdp.classify_frame import Datagram

SIZE: int = ffi.sizeof("struct sluice_heartbeat")

_TYPE_AT: int = ffi.offsetof("struct sluice_heartbeat", "type")
_MAGIC = lib.SLUICE_HEARTBEAT_MAGIC.to_bytes(4, "big")
_HOPS = 64  # of a reply: the default TTL (RFC 1700)
_PROTOCOL_UDP = 17


def is_probe(payload: bytes | memoryview) -> bool:
    """Whether a whole UDP payload is a probe."""
    return len(payload) == SIZE and payload[:4] == _MAGIC and payload[_TYPE_AT] == lib.SLUICE_HEARTBEAT_PROBE


def reply_payload(probe: bytes | memoryview) -> bytes:
    """The payload that answers ``probe``."""
    reply = bytearray(probe)
    reply[_TYPE_AT] = lib.SLUICE_HEARTBEAT_REPLY
    return bytes(reply)


def is_answerable(frame: bytes, datagram: Datagram) -> bool:
    """Whether ``frame`` came to this host alone and without options that a reply would repeat."""
    return datagram.plain and not frame[0] & 1


def reply_frame(frame: bytes, datagram: Datagram) -> bytes:
    """The whole frame that answers the probe in ``frame``, with the same length and VLAN tags."""
    reply = bytearray(frame)
    reply[0:6], reply[6:12] = frame[6:12], frame[0:6]
    ip, udp, payload = datagram.ip_offset, datagram.udp_offset, datagram.payload_offset
    if datagram.version == 4:
        source, destination = slice(ip + 12, ip + 16), slice(ip + 16, ip + 20)
        ttl_at = ip + 8
        (checksum,) = struct.unpack_from("!H", frame, ip + 10)
        # RFC 1624, eqn. 3, over the word of TTL and protocol (whose protocol cancels out)
        change = (0xFFFF - checksum) + (0xFFFF - (frame[ttl_at] << 8)) + (_HOPS << 8)
        struct.pack_into("!H", reply, ip + 10, 0xFFFF - _fold(change))
    else:
        source, destination = slice(ip + 8, ip + 24), slice(ip + 24, ip + 40)
        ttl_at = ip + 7
    reply[ttl_at] = _HOPS
    reply[source], reply[destination] = frame[destination], frame[source]
    reply[udp : udp + 2], reply[udp + 2 : udp + 4] = frame[udp + 2 : udp + 4], frame[udp : udp + 2]
    end = payload + datagram.payload_length
    reply[payload:end] = reply_payload(frame[payload:end])
    reply[udp + 6 : udp + 8] = bytes(2)
    # RFC 768: over IPv4 a checksum of zero says that the sender made none; then there is none back.
    if datagram.version == 6 or frame[udp + 6 : udp + 8] != bytes(2):
        pseudo = reply[source] + reply[destination] + struct.pack("!HH", _PROTOCOL_UDP, end - udp)
        checksum = 0xFFFF - _fold(
            sum(struct.unpack(f"!{(len(pseudo) + end - udp) // 2}H", pseudo + reply[udp:end]))
        )
        struct.pack_into("!H", reply, udp + 6, checksum or 0xFFFF)
    return bytes(reply)


def _fold(total: int) -> int:
    """A sum as a one's complement sum of 16 bits (RFC 1071)."""
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total

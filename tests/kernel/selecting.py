# SPDX-License-Identifier: Apache-2.0
"""Datagrams from any source address to the lab's server, as frames, and what its sockets got of them."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Self

from sluice_cli.lab import Lab
from tests.kernel import frames
from xdp._libbpf import ffi, lib
from xdp.select import SelectProgram

PORT = 8001
DEADLINE = 10.0


class Wire:
    """The client's end of the lab's cable."""

    def __init__(self, lab: Lab) -> None:
        self._to = bytes.fromhex(lab.server.mac.replace(":", ""))
        self._targets: dict[int, IPv4Address | IPv6Address] = {4: lab.server.ipv4, 6: lab.server.ipv6}
        with lab.client.enter():
            self._raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._raw.bind((lab.client.interface, 0))
        # Sources that nobody routes back to are what these tests are about.
        with lab.server.enter():
            for name in ("all", lab.server.interface):
                Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("0", encoding="ascii")

    def send(self, source: str, port: int, payload: bytes, *, source_port: int = 4000) -> None:
        """One datagram, with the checksum that IPv6 demands."""
        address: IPv4Address | IPv6Address = ip_address(source)
        target = self._targets[address.version]
        datagram = frames.udp(port, payload, source_port=source_port)
        pseudo = address.packed + target.packed + struct.pack("!HH", frames.UDP, len(datagram))
        sum_ = frames.checksum(pseudo + datagram) or 0xFFFF
        datagram = datagram[:6] + struct.pack("!H", sum_) + datagram[8:]
        if address.version == 4:
            packet = frames.ipv4(datagram, source=source, target=str(target))
            self._raw.send(frames.ethernet(frames.IPV4, packet, to=self._to))
        else:
            packet = frames.ipv6(datagram, source=source, target=str(target))
            self._raw.send(frames.ethernet(frames.IPV6, packet, to=self._to))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


def drained(sock: socket.socket) -> list[tuple[bytes, int]]:
    """All (payload, source port) that wait in a non-blocking socket."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            data, name = sock.recvfrom(65536)
            found.append((data, name[1]))
    return found


def until(ready: Callable[[], bool], what: str) -> None:
    """Poll to a deadline."""
    deadline = time.monotonic() + DEADLINE
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def is_loaded(number: int) -> bool:
    fd = lib.sluice_prog_by_id(number)
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def program_id(program: SelectProgram) -> int:
    info = ffi.new("struct sluice_prog_info *")
    assert lib.sluice_prog_info(program.fd, info) == 0
    number: int = info.id
    return number

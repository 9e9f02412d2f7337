# SPDX-License-Identifier: Apache-2.0
"""Peers of ``sluice lab connections``: a process with so many UDP or QUIC peers, one a port.

    python -m sluice_cli.lab_connections_peers udp ADDRESS FIRST_PORT COUNT

UDP peers answer pings as an application of :mod:`userspace.connection.heartbeat` does, and echo all else.
The QUIC peers are aioquic's own server, with nothing of ours in it but a certificate: it echoes each message
as a stream of its own.  It says ``ready`` when all ports are open, and ends when it is killed.
"""

from __future__ import annotations

import asyncio
import os
import resource
import selectors
import socket
import sys
import time
from typing import Final

from userspace.connection.heartbeat import Heartbeats, is_heartbeat
from xdp.errors import UsageError

ALPN: Final = "sluice-lab"
#: Seconds: longer than any of the lab's silences.
IDLE_TIMEOUT: Final = 30.0
#: Bytes: of each socket, for what comes while this process has no CPU.
_BUFFER: Final = 1 << 18
#: Datagrams of one socket that are read before others get their turn.
_TURN: Final = 32


def udp(address: str, first: int, count: int) -> None:
    """Serve until killed."""
    boot = int.from_bytes(os.urandom(8), "big")
    heartbeats = Heartbeats(secret=os.urandom(16), boot=boot)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with selectors.DefaultSelector() as selector:
        for port in range(first, first + count):
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            sock.setblocking(False)
            sock.bind((address, port))
            selector.register(sock, selectors.EVENT_READ, sock)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                _answer(key.data, heartbeats)


def _answer(sock: socket.socket, heartbeats: Heartbeats) -> None:
    for _ in range(_TURN):
        try:
            data, source = sock.recvfrom(2048)
            if is_heartbeat(data):
                now = time.monotonic()
                heartbeats.receive(now, data)
                for pong in heartbeats.take_pongs(now):
                    sock.sendto(pong, source)
            else:
                sock.sendto(data, source)
        except BlockingIOError:
            return
        except OSError:  # the link is down, or ICMP: the next datagram may fare better
            continue


async def quic(address: str, first: int, count: int) -> None:
    """Serve until killed."""
    from aioquic.asyncio.protocol import QuicConnectionProtocol
    from aioquic.asyncio.server import serve
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.events import QuicEvent, StreamDataReceived

    from userspace.connection.identity import Identity

    class Echo(QuicConnectionProtocol):
        def quic_event_received(self, event: QuicEvent) -> None:
            """Messages of the lab are short: one comes in one piece."""
            if isinstance(event, StreamDataReceived) and event.data:
                stream = self._quic.get_next_available_stream_id(is_unidirectional=True)
                self._quic.send_stream_data(stream, event.data, end_stream=True)
                self.transmit()

    identity = Identity(bytes(32))
    configuration = QuicConfiguration(is_client=False, alpn_protocols=[ALPN], idle_timeout=IDLE_TIMEOUT)
    configuration.certificate, configuration.private_key = identity.certificate, identity.private_key
    for port in range(first, first + count):
        await serve(address, port, configuration=configuration, create_protocol=Echo)
    print("ready", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """The whole process."""
    try:
        kind, address, first, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    except (IndexError, ValueError):
        raise UsageError(
            "kind, address, first port, count", hint="it is started by `sluice lab connections`"
        ) from None
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if kind == "udp":
        udp(address, first, count)
    else:
        asyncio.run(quic(address, first, count))


if __name__ == "__main__":
    main()

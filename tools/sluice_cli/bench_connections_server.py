# SPDX-License-Identifier: Apache-2.0
"""The QUIC server of :mod:`sluice_cli.bench_connections_memory`: aioquic's, one connection for each number.

    python -m sluice_cli.bench_connections_server DESCRIPTOR

Datagrams come through a socket that it inherits, each with the number of its connection before it, and go the
same way.  It ends when it is killed.
"""

from __future__ import annotations

import socket
import sys
import time

from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import pull_quic_header

from sluice_cli.bench_connections_memory import ALPN, NUMBER
from userspace.connection.identity import Identity


def main() -> None:
    """The whole process."""
    identity = Identity(bytes(32))
    configuration = QuicConfiguration(is_client=False, alpn_protocols=[ALPN], idle_timeout=3600.0)
    configuration.certificate, configuration.private_key = identity.certificate, identity.private_key
    connections: dict[int, QuicConnection] = {}
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        while True:
            data = sock.recv(2048)
            number = NUMBER.unpack_from(data)[0]
            payload = data[NUMBER.size :]
            connection = connections.get(number)
            if connection is None:
                header = pull_quic_header(Buffer(data=payload), host_cid_length=8)
                connection = connections[number] = QuicConnection(
                    configuration=configuration, original_destination_connection_id=header.destination_cid
                )
            now = time.monotonic()
            connection.receive_datagram(payload, ("", 0), now)
            while connection.next_event() is not None:
                pass
            for answer, _ in connection.datagrams_to_send(now):
                sock.send(data[: NUMBER.size] + answer)


if __name__ == "__main__":
    main()

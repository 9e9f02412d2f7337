# SPDX-License-Identifier: Apache-2.0
"""A QUIC server by qh3 in a process of its own: neither ours nor by the library that we use.

    python tests/traffic/qh3_server.py CERTIFICATE KEY ALPN IDLE_TIMEOUT [retry]

It says on stdout, a JSON object a line, which port it has, which connections there are, and what came on
unidirectional streams that have ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from qh3.asyncio.protocol import QuicConnectionProtocol
from qh3.asyncio.server import QuicServer
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.events import ConnectionTerminated, HandshakeCompleted, QuicEvent, StreamDataReceived


def say(**what: object) -> None:
    """One line."""
    print(json.dumps(what), flush=True)


class Protocol(QuicConnectionProtocol):
    """Tells of streams and handshakes; a message "leave" closes the connection, "answer" is answered."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._parts: dict[int, bytes] = {}

    def quic_event_received(self, event: QuicEvent) -> None:
        """As qh3 calls it."""
        if isinstance(event, HandshakeCompleted):
            say(
                event="handshake",
                alpn=event.alpn_protocol,
                resumed=event.session_resumed,
                early=event.early_data_accepted,
            )
        elif isinstance(event, ConnectionTerminated):
            say(event="ended", code=event.error_code, reason=event.reason_phrase)
        elif isinstance(event, StreamDataReceived):
            data = self._parts.pop(event.stream_id, b"") + event.data
            if not event.end_stream:
                self._parts[event.stream_id] = data
                return
            say(event="message", stream=event.stream_id, size=len(data), sha256=sha256(data).hexdigest())
            if data == b"leave":
                self._quic.close(error_code=4, reason_phrase="too_many")
                self.transmit()
            elif data == b"answer":
                number = self._quic.get_next_available_stream_id(is_unidirectional=True)
                self._quic.send_stream_data(number, b"an answer", end_stream=True)
                self.transmit()


async def main(certificate: str, key: str, alpn: str, idle_timeout: str, *how: str) -> None:
    """Serve until it is killed."""
    configuration = QuicConfiguration(
        is_client=False, alpn_protocols=[alpn], idle_timeout=float(idle_timeout)
    )
    configuration.load_cert_chain(Path(certificate), Path(key))
    tickets: dict[bytes, Any] = {}
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: QuicServer(
            configuration=configuration,
            create_protocol=Protocol,
            session_ticket_fetcher=lambda label: tickets.pop(label, None),
            session_ticket_handler=lambda ticket: tickets.__setitem__(ticket.ticket, ticket),
            retry="retry" in how,
        ),
        local_addr=("127.0.0.1", 0),
    )
    say(event="port", port=transport.get_extra_info("sockname")[1])
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

# SPDX-License-Identifier: Apache-2.0
"""A QUIC server that was written for sockets, over lanes: its client sees no difference."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.unit.event_loops import Run, run
from tests.unit.socket_backends import Open, backend, make_policy, open_lanes, port
from userspace.datagram.aio_protocol import open_endpoint

__all__ = ["backend", "open_lanes", "port", "run"]  # fixtures: in use, though only as arguments

pytest.importorskip("aioquic", reason="aioquic is not installed")

from aioquic.asyncio.client import connect
from aioquic.asyncio.server import QuicServer
from aioquic.quic.configuration import QuicConfiguration
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

SIZE = 100_000  # bytes each way


def certificate(folder: Path) -> tuple[Path, Path]:
    """Of a server called localhost, signed by itself: files with certificate and key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_file, key_file


def test_a_handshake_and_data_both_ways(open_lanes: Open, port: int, run: Run, tmp_path: Path) -> None:
    """The client checks the server's certificate; all bytes arrive, and arrive back."""
    lanes = open_lanes(make_policy(port))
    certificate_file, key_file = certificate(tmp_path)
    server_configuration = QuicConfiguration(is_client=False, alpn_protocols=["test"])
    server_configuration.load_cert_chain(certificate_file, key_file)
    client_configuration = QuicConfiguration(
        alpn_protocols=["test"], server_name="localhost", verify_mode=ssl.CERT_REQUIRED
    )
    client_configuration.load_verify_locations(str(certificate_file))
    data = random.Random(7).randbytes(SIZE)
    answering: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = await reader.read(-1)
        writer.write(received[::-1])
        writer.write_eof()

    def accept(*stream: Any) -> None:
        task = asyncio.ensure_future(answer(*stream))
        answering.add(task)

    async def main() -> None:
        transport, server = await open_endpoint(
            lambda: QuicServer(configuration=server_configuration, stream_handler=accept), lanes, port=port
        )
        async with connect("127.0.0.1", port, configuration=client_configuration) as client:
            reader, writer = await client.create_stream()
            writer.write(data)
            writer.write_eof()
            assert await reader.read(-1) == data[::-1]
        await asyncio.gather(*answering)
        server.close()
        statistics = transport.statistics()
        assert statistics.received > SIZE // 1500
        assert statistics.given == statistics.sent + statistics.waiting > SIZE // 1500
        assert transport.is_closing()

    run(main())
    assert lanes.census()["held"] == 0
    assert lanes.statistics().balanced

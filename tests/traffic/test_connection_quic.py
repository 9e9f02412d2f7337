# SPDX-License-Identifier: Apache-2.0
"""QUIC connections over loopback sockets to a server by qh3: what is sent arrives, whatever happens."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("aioquic", reason="aioquic is not installed")
pytest.importorskip("qh3", reason="qh3 is not installed")

from userspace.connection.heartbeat import Pong
from userspace.connection.identity import Identity
from userspace.connection.quic import QuicConnection
from userspace.connection.quic_session import QuicSession, QuicSettings
from userspace.connection.transport import Closed, Ending, Event, Message, Opened, Phase

ROOT = Path(__file__).resolve().parents[2]
SERVER = Identity(b"\x07" * 32)


#: Seconds: how long the path is gone.  SLUICE_OUTAGE=10 SLUICE_IDLE=30 is what is promised.
OUTAGE = float(os.environ.get("SLUICE_OUTAGE", "2"))
IDLE = float(os.environ.get("SLUICE_IDLE", "4"))
SETTINGS = QuicSettings(alpn=("solana-tpu",), idle_timeout=IDLE, keep_alive=0.5)
EARLY = msgspec.structs.replace(SETTINGS, early_data=True)
#: Seconds that anything may take on a busy machine.
PATIENCE = 20.0
#: Sockets of clients, closed after each test.
OPEN: list[socket.socket] = []


@pytest.fixture(autouse=True)
def sockets() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


class Server:
    """The process, and what it has said so far."""

    def __init__(self, folder: Path, *how: str) -> None:
        certificate, key = SERVER.pem()
        (folder / "certificate.pem").write_bytes(certificate)
        (folder / "key.pem").write_bytes(key)
        program = ROOT / "tests/traffic/qh3_server.py"
        files = [folder / "certificate.pem", folder / "key.pem"]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", program, *files, "solana-tpu", str(IDLE), *how],
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._rest = b""
        self.said: list[dict[str, Any]] = []
        end = time.monotonic() + PATIENCE
        while not self.said:
            assert time.monotonic() < end, "the server did not start"
            select.select([self.process.stdout], [], [], 0.1)
            self.listen()
        self.port: int = self.said[0]["port"]

    def listen(self) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.closed:
            return
        self._rest += self.process.stdout.read() or b""
        *lines, self._rest = self._rest.split(b"\n")
        self.said.extend(map(json.loads, lines))

    def of(self, event: str) -> list[dict[str, Any]]:
        self.listen()
        return [one for one in self.said if one["event"] == event]

    def hashes(self) -> list[str]:
        return [one["sha256"] for one in self.of("message")]

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Client:
    """A connection over a socket."""

    def __init__(
        self, port: int, settings: QuicSettings = SETTINGS, session: QuicSession | None = None
    ) -> None:
        self.connection = QuicConnection(
            settings, secret=bytes(16), identity=Identity(b"\x08" * 32), peer_key=SERVER.public_key,
            session=session,
        )  # fmt: skip
        self.port = port
        self.events: list[tuple[float, Event]] = []
        self.cut = False  # nothing gets through, either way
        self.socket = self._socket()
        OPEN.append(self.socket)
        self.connection.connect(time.monotonic())

    def _socket(self) -> socket.socket:
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.setblocking(False)
        one.connect(("127.0.0.1", self.port))
        return one

    def move(self) -> None:
        """Another local port."""
        self.socket.close()
        self.socket = self._socket()
        OPEN.append(self.socket)
        self.connection.on_path_change(time.monotonic())

    def run(self, until: Callable[[], bool], patience: float = PATIENCE) -> bool:
        """Until that is so, or for so many seconds; whether it is."""
        end = time.monotonic() + patience
        while True:
            now = time.monotonic()
            for datagram in self.connection.take_datagrams(now):
                self._try(now, lambda datagram=datagram: self.cut or self.socket.send(datagram))  # type: ignore[misc]
            self.events.extend((now, event) for event in self.connection.take_events())
            if until():
                return True
            wait = min(end, self.connection.next_timeout(), now + 0.05) - now
            if end <= now:
                return False
            if select.select([self.socket], [], [], max(0.0, wait))[0]:
                for _ in range(64):
                    data = self._try(time.monotonic(), lambda: self.socket.recv(2048))
                    if not data:
                        break
                    if not self.cut:
                        self.connection.receive(time.monotonic(), data)
            self.connection.on_timeout(time.monotonic())

    def _try(self, now: float, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BlockingIOError:
            return None
        except OSError as error:
            self.connection.on_error(now, error.errno or 0)
            return None

    @property
    def is_open(self) -> bool:
        return self.connection.phase is Phase.OPEN

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for _, event in self.events if isinstance(event, kind)]

    def send_all(self, messages: list[bytes]) -> None:
        waiting = list(reversed(messages))

        def all_taken() -> bool:
            while waiting and self.connection.send(time.monotonic(), waiting[-1]):
                waiting.pop()
            return not waiting

        assert self.run(all_taken)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path)
    yield started
    started.stop()


@pytest.fixture
def client(server: Server) -> Client:
    started = Client(server.port)
    assert started.run(lambda: started.is_open), started.events
    return started


def some(count: int, seed: int = 7) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(rng.choice([1, 200, 1232])) for _ in range(count)]


def hashed(messages: list[bytes]) -> list[str]:
    return sorted(sha256(one).hexdigest() for one in messages)


def test_everything_arrives_once(server: Server, client: Client) -> None:
    messages = some(1000)
    client.send_all(messages)
    assert client.run(lambda: len(server.hashes()) == len(messages))
    assert sorted(server.hashes()) == hashed(messages)
    (handshake,) = server.of("handshake")
    assert handshake == {"event": "handshake", "alpn": "solana-tpu", "resumed": False, "early": False}
    assert client.connection.peer_key == SERVER.public_key
    assert client.run(lambda: client.connection.snapshot().streams_open == 0)
    flow = client.connection.flow.snapshot()
    assert flow.acknowledged_packets + flow.lost_packets - flow.spurious_packets <= flow.sent_packets
    assert flow.delivered_bytes > sum(map(len, messages))


def test_what_the_server_says(server: Server, client: Client) -> None:
    client.connection.ping(time.monotonic(), 1)
    client.send_all([b"answer"])
    assert client.run(lambda: bool(client.of(Pong) and client.of(Message)))
    assert client.of(Message) == [Message(b"an answer")]
    client.send_all([b"leave"])
    assert client.run(lambda: bool(client.of(Closed)))
    assert client.of(Closed) == [Closed(Ending.PEER_CLOSED, 4, "too_many")]


def test_closing_is_heard(server: Server, client: Client) -> None:
    client.connection.close(time.monotonic(), 3, "enough")
    assert client.run(lambda: bool(server.of("ended")))
    assert server.of("ended") == [{"event": "ended", "code": 3, "reason": "enough"}]


def test_a_session_is_resumed_and_early_data_is_taken(server: Server) -> None:
    first = Client(server.port, EARLY)
    assert first.run(lambda: first.connection.session is not None)
    first.connection.close(time.monotonic())
    first.run(lambda: False, 0.05)
    again = Client(server.port, EARLY, first.connection.session)
    messages = some(5)
    assert all(again.connection.send(time.monotonic(), one) for one in messages)
    assert again.run(lambda: len(server.hashes()) == len(messages))
    assert again.run(lambda: again.is_open)
    assert again.of(Opened) == [Opened(resumed=True, early=True)]
    assert sorted(server.hashes()) == hashed(messages)
    assert again.run(
        lambda: len(server.of("handshake")) == 2
    )  # for the server it ends half a round trip later
    assert [one["early"] for one in server.of("handshake")] == [False, True]


def test_a_server_that_asks_whether_the_address_is_ours(tmp_path: Path) -> None:
    """RFC 9000, 8.1.2: Retry."""
    server = Server(tmp_path, "retry")
    try:
        client = Client(server.port)
        assert client.run(lambda: client.is_open), client.events
        client.send_all([b"x"])
        assert client.run(lambda: bool(server.hashes()))
    finally:
        server.stop()


def test_a_path_that_was_gone(server: Server) -> None:
    """While messages flow: the same connection goes on, and nothing is lost."""
    client = Client(server.port, msgspec.structs.replace(SETTINGS, queue=1 << 14))
    assert client.run(lambda: client.is_open)
    messages = some(50 + int(40 * OUTAGE))
    client.send_all(messages[:50])
    client.cut = True
    began = time.monotonic()
    given = 50
    while (now := time.monotonic()) < began + OUTAGE:
        while given < 50 + 40 * (now - began) and given < len(messages):
            assert client.connection.send(now, messages[given])
            given += 1
        client.run(lambda: False, 0.05)
    client.send_all(messages[given:])
    client.cut = False
    back_at = time.monotonic()
    assert client.run(lambda: client.connection.heard_at > back_at)
    assert client.connection.heard_at - back_at < 1.5
    assert client.run(lambda: len(server.hashes()) == len(messages))
    assert sorted(server.hashes()) == hashed(messages)
    assert client.is_open
    assert len(server.of("handshake")) == 1


def test_another_address(server: Server, client: Client) -> None:
    client.send_all([b"before"])
    assert client.run(lambda: len(server.hashes()) == 1)
    client.move()
    messages = some(50)
    client.send_all(messages)
    assert client.run(lambda: len(server.hashes()) == 1 + len(messages))
    assert len(server.of("handshake")) == 1
    assert client.is_open


def test_a_server_that_is_killed_is_noticed_at_once(server: Server, client: Client) -> None:
    """By what ICMP says, and that it is silent when it is asked."""
    client.send_all([b"x"])
    assert client.run(lambda: bool(server.hashes()))
    server.stop()
    killed_at = time.monotonic()
    client.send_all(some(5))
    assert client.run(lambda: bool(client.of(Closed)))
    (closed,) = client.of(Closed)
    assert isinstance(closed, Closed)
    assert closed.ending is Ending.REFUSED
    assert client.events[-1][0] - killed_at < 2.0  # 0.1 s, where nothing else runs


def test_a_server_that_hangs_is_lost_in_the_end(server: Server, client: Client) -> None:
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        assert client.run(lambda: bool(client.of(Closed)), IDLE + PATIENCE)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert client.of(Closed) == [Closed(Ending.LOST)]


def test_nobody_is_there() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    client = Client(port)
    assert client.run(lambda: bool(client.of(Closed)))
    (closed,) = client.of(Closed)
    assert isinstance(closed, Closed)
    assert closed.ending is Ending.REFUSED

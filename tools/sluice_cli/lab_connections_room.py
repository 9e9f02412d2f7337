# SPDX-License-Identifier: Apache-2.0
"""What ``sluice lab connections`` does its trials in: a pool on one host, processes with peers on the other.

The pool's lanes are on the lab's server, and this process drives it: whoever calls :class:`Room` has entered
that host's network namespace.  Peers are processes on the client, which does what is done to the network as
well, so that the pool hears of it only as it would of any other host: by its own interface, or by silence.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final

from sluice_cli.connection_carrier import Carrier, Got
from sluice_cli.lab import Host, Lab
from sluice_cli.lab_connections_peers import ALPN
from sluice_cli.lab_flow_wire import Mode
from userspace.connection.aio_link import LinkWatch
from userspace.connection.conductor import ConductorSettings
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.quic import QuicConnection
from userspace.connection.quic_session import QuicSession, QuicSettings
from userspace.connection.states import State
from userspace.connection.transport import Transport
from userspace.connection.udp import UdpConnection
from userspace.datagram.lanes import open_lanes
from xdp.errors import SluiceError
from xdp.policy import Policy

#: UDP, of the pool, and of the first of each kind of peers.
PORT: Final = 9000
UDP_PORT: Final = 10_000
QUIC_PORT: Final = 20_000
#: Seconds for Python and the program, which is compiled; on a busy machine.
PATIENCE: Final = 90.0
#: A message of the application: its number, which comes back.
MESSAGE: Final = struct.Struct("!4xQ")

POLICY: Final = f"""version = 1

[[lane]]
name = "connections"

[[lane]]
name = "strangers"

[[class]]
name = "peers"
prefixes = ["10.81.0.0/24", "fd81::/112"]

[[service]]
name = "connections"
ports = [{PORT}]

[[service.rule]]
class = "peers"
action = "lane"
lane = "connections"

[[service.rule]]
action = "lane"
lane = "strangers"
"""


class Peers:
    """A process with peers, one a port."""

    def __init__(self, host: Host, kind: str, first: int, count: int, *, version: int = 4) -> None:
        self.kind = kind
        self.address = str(host.ipv4 if version == 4 else host.ipv6)
        self.endpoints = [f"{kind}-{first + number}" for number in range(count)]
        self.ports = dict(zip(self.endpoints, range(first, first + count), strict=True))
        # Killed by the kernel when we are.
        self._process: subprocess.Popen[Any] = host.popen(
            ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-m", "sluice_cli.lab_connections_peers",
             kind, self.address, str(first), str(count)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def wait(self) -> None:
        """Until all its ports are open.  Raises SluiceError when that takes too long, or it ends."""
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], PATIENCE)[0] or out.readline() != b"ready\n":
            self._process.kill()
            _, said = self._process.communicate()
            lines = said.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise SluiceError(f"the {self.kind} peers failed: {lines[-1]}", detail=said.decode())

    def send_signal(self, number: int) -> None:
        """Send it a signal, and wait for its end where that follows."""
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()

    def close(self) -> None:
        """End it and its pipes."""
        self._process.kill()
        self._process.communicate()


class Room:
    """The pool, its peers and what was noticed of them."""

    def __init__(self, lab: Lab, groups: Iterable[Peers], *, mode: Mode, seed: int) -> None:
        self.lab, self.groups = lab, list(groups)
        self._rng = random.Random(seed)
        self._boot = self._rng.getrandbits(63)
        self._quic = QuicSettings(alpn=(ALPN,), unverified=True, keep_alive=1.0, idle_timeout=30.0)
        self._sessions: dict[Hashable, QuicSession] = {}
        self._made: dict[Hashable, Transport] = {}
        #: Transports that were made for each endpoint: more than one is a reconnection.
        self.attempts: dict[Hashable, int] = {}
        self._cleanup = contextlib.ExitStack()
        self._numbers = 0
        #: Messages by number: which endpoint was meant, when it was sent.
        self._asked: dict[int, tuple[Hashable, float]] = {}
        #: By kind: messages that came and were none of those that were ever sent.
        self.wrong = {group.kind: 0 for group in self.groups}
        try:
            interface = None if mode in {"mmsg", "portable"} else lab.server.interface
            lanes = self._cleanup.enter_context(
                open_lanes(Policy.parse(POLICY), interface=interface, mode=mode)
            )
            self.mode = lanes.mode
            #: Whether datagrams leave as frames, and not through kernel sockets.
            self.over_frames = self.mode not in {"mmsg", "portable"}
            watch = LinkWatch(lab.server.interface)
            self._cleanup.callback(watch.close)
            size = sum(len(group.endpoints) for group in self.groups)
            pool = PoolSettings(min_size=size, max_size=size, idle_timeout=None, max_lifetime=None)
            self.carrier = Carrier(
                lanes, PORT, self._make, rng=self._rng, settings=ConductorSettings(pool=pool), watch=watch
            )
        except BaseException:
            self._cleanup.close()
            raise
        self.conductor = self.carrier.conductor

    def close(self) -> None:
        """End it: the lanes are closed, so is what watches the link."""
        self._cleanup.close()

    def _make(self, _now: float, endpoint: Hashable) -> Transport:
        self.attempts[endpoint] = self.attempts.get(endpoint, 0) + 1
        secret = os.urandom(16)
        made: Transport
        if str(endpoint).startswith("udp"):
            made = UdpConnection(secret=secret, boot=self._boot)
        else:
            before = self._made.get(endpoint)
            if isinstance(before, QuicConnection) and before.session is not None:
                self._sessions[endpoint] = before.session
            made = QuicConnection(self._quic, secret=secret, session=self._sessions.get(endpoint))
        self._made[endpoint] = made
        return made

    # --- time

    def run(self, until: float, each: Callable[[float], object] = lambda _: None) -> list[Got]:
        """Until then; what has come.  ``each`` is called with the time in each turn."""
        got: list[Got] = []
        while (now := time.monotonic()) < until:
            each(now)
            got += self.carrier.step(until - now)
        return got

    def run_until(self, done: Callable[[], bool], patience: float) -> bool:
        """Until that is so; False when it is not in so many seconds."""
        deadline = time.monotonic() + patience
        while not done():
            if time.monotonic() > deadline:
                return False
            self.carrier.step(0.01)
        return True

    def command(self, host: Host, *words: str) -> float:
        """Run `ip` on a host while the pool goes on; when it was done.  Raises SluiceError."""
        process = host.popen(["ip", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if not self.run_until(lambda: process.poll() is not None, PATIENCE) or process.returncode:
            process.kill()
            _, said = process.communicate()
            raise SluiceError(f"ip {' '.join(words)}: {said.decode().strip() or 'it did not end'}")
        process.communicate()
        return time.monotonic()

    # --- connections

    def open(self) -> float:
        """Connect to all peers; seconds that it took.  Raises SluiceError when some do not answer."""
        began = time.monotonic()
        for group in self.groups:
            for endpoint, port in group.ports.items():
                self.conductor.add_endpoint(time.monotonic(), endpoint, addresses=[(group.address, port)])
        self.conductor.warm_pool(time.monotonic())
        if not self.run_until(lambda: self.live() == len(self.conductor), PATIENCE):
            raise SluiceError(f"{self.live()} of {len(self.conductor)} connections are open")
        return time.monotonic() - began

    def live(self) -> int:
        """Connections that are up."""
        return sum(link.live for link in self.conductor.links.values())

    def failed(self) -> int:
        """Connections that are not."""
        return sum(link.state.state is not State.CONNECTED for link in self.conductor.links.values())

    def ask(self, now: float, connection: int) -> bool:
        """Send a message over it, which is to come back."""
        if not self.conductor.send(now, connection, MESSAGE.pack(self._numbers)):
            return False
        self._asked[self._numbers] = self.conductor.endpoint(connection), now
        self._numbers += 1
        return True

    def answered(self, got: Got) -> tuple[Hashable, float] | None:
        """Which endpoint's message has come back, and when it was sent; None: no message of ours."""
        payload = got.message.payload
        number = MESSAGE.unpack(payload)[0] if len(payload) == MESSAGE.size else self._numbers
        if number >= self._numbers or payload != MESSAGE.pack(number):
            endpoint = self.conductor.endpoint(got.message.connection)
            self.wrong[str(endpoint).partition("-")[0]] += 1
            return None
        return self._asked.pop(number, None)

    def first_answers(self, since: float, seconds: float, retry: float = 0.2) -> dict[Hashable, float]:
        """By endpoint how long after ``since`` a message over its connection came back.

        Each connection is sent one as soon as it is up, and again after ``retry`` seconds without an answer.
        """
        found: dict[Hashable, float] = {}
        asked: dict[int, float] = {}
        wanted = {number: link.peer.key for number, link in self.conductor.links.items()}

        def ask(now: float) -> None:
            for number in list(wanted):
                if now >= asked.get(number, 0.0) + retry and self.ask(now, number):
                    asked[number] = now

        deadline = since + seconds
        while wanted and (now := time.monotonic()) < deadline:
            ask(now)
            for got in self.carrier.step(0.02):
                answer = self.answered(got)
                if answer is not None and answer[1] >= since and got.message.connection in wanted:
                    found[wanted.pop(got.message.connection)] = got.at - since
        self._asked.clear()
        return found

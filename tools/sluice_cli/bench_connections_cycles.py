# SPDX-License-Identifier: Apache-2.0
"""Connections that come and go: what is left of ten thousand a minute, minute by minute.

    python -m sluice_cli.bench_connections_cycles MINUTES

Each cycle is an endpoint that is new: added, connected to over a UDP socket (kernel sockets on loopback),
sent a message that comes back, and removed.  The peers are in another process.  At the end of each minute a
line of JSON says what this process has: memory that no file stands behind, descriptors, timers, connections.
"""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Final

from sluice_cli.bench_connections_memory import memory
from sluice_cli.connection_carrier import Carrier
from userspace.connection.conductor import ConductorSettings
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.timers import Timers
from userspace.connection.transport import Transport
from userspace.connection.udp import UdpConnection
from userspace.datagram.lanes import open_lanes
from xdp.errors import SluiceError, UsageError
from xdp.policy import Policy

#: Cycles a minute.
RATE: Final = 10_000
#: Peers, one for each of the cycles that are under way at the same time, at most.
PEERS: Final = 64
#: The first of their ports; each run has a loopback address of its own.
FIRST: Final = 29_100
#: Seconds that a cycle may take.
PATIENCE: Final = 10.0


def policy(port: int) -> Policy:
    """One lane for all that comes to that port."""
    return Policy.parse(f"""version = 1

[[lane]]
name = "connections"

[[service]]
name = "connections"
ports = [{port}]

[[service.rule]]
action = "lane"
lane = "connections"
""")


def free_port() -> int:
    """A UDP port that nobody has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


def own_address() -> str:
    """A loopback address that no other process of this machine takes for its own: pids have 22 bits."""
    pid = os.getpid()
    return f"127.{64 + (pid >> 16)}.{pid >> 8 & 255}.{pid & 255}"


class Cycles:
    """Starts cycles at a steady rate and counts those that are done."""

    def __init__(self, carrier: Carrier, address: str) -> None:
        self._carrier = carrier
        self._free = [(address, FIRST + number) for number in range(PEERS)]
        #: By endpoint: where it is, and when it began; negative once its message has left.
        self._open: dict[Hashable, tuple[tuple[str, int], float]] = {}
        self._started = 0
        self.done = self.late = 0

    def run(self, until: float, began: float) -> None:
        """Until then; ``began`` is when the first cycle was due."""
        carrier, conductor = self._carrier, self._carrier.conductor
        while (now := carrier.now()) < until:
            wanted = int((now - began) * RATE / 60)
            while self._started < wanted and self._free:
                self._start(now)
            for key, (_, since) in list(self._open.items()):
                if now > abs(since) + PATIENCE:
                    self.late += 1
                    self._end(now, key)
                elif since > 0 and (connection := conductor.lookup(now, key)) is not None:
                    self._open[key] = self._open[key][0], -since
                    conductor.send(now, connection, b"ping and pong")
            for got in carrier.step(60 / RATE):
                if got.message.endpoint in self._open:
                    self.done += 1
                    self._end(got.at, got.message.endpoint)

    def _start(self, now: float) -> None:
        address = self._free.pop()
        self._started += 1
        key = f"endpoint-{self._started}"
        self._open[key] = address, now
        self._carrier.conductor.add_endpoint(now, key, addresses=[address])
        self._carrier.conductor.lookup(now, key)

    def _end(self, now: float, key: Hashable) -> None:
        self._carrier.conductor.remove_endpoint(now, key)
        self._free.append(self._open.pop(key)[0])


def run(minutes: float, address: str) -> None:
    """The whole run; a line of JSON for each minute, or part of one at the end."""
    settings = ConductorSettings(pool=PoolSettings(min_size=0, max_size=2 * PEERS))

    def make(_now: float, _endpoint: Hashable) -> Transport:
        return UdpConnection(secret=os.urandom(16))

    port = free_port()
    with open_lanes(policy(port), mode="mmsg") as lanes:
        carrier = Carrier(lanes, port, make, rng=random.Random(1), settings=settings)
        cycles = Cycles(carrier, address)
        began = carrier.now()
        end = began + minutes * 60
        minute = 0.0
        while minute < minutes:
            minute = min(minute + 1, minutes)
            spent, since = time.process_time(), carrier.now()
            cycles.run(min(began + minute * 60, end), began)
            cpu = (time.process_time() - spent) / (carrier.now() - since)
            print(json.dumps({"minute": minute, **state(carrier, cycles), "cpu": cpu}), flush=True)


def state(carrier: Carrier, cycles: Cycles) -> dict[str, Any]:
    """What there is now."""
    return {
        "cycles": cycles.done,
        "late": cycles.late,
        "bytes": memory(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "timers": timers(),
        "connections": len(carrier.conductor),
    }


def timers() -> int:
    """Entries in the heaps of all deadlines by key, whoever's they are, those that are cancelled as well."""
    return sum(len(one._heap) for one in gc.get_objects() if isinstance(one, Timers))


def main() -> None:
    """The whole process, and that of the peers."""
    try:
        minutes = float(sys.argv[1])
    except (IndexError, ValueError):
        raise UsageError("how many minutes", hint="it is started by `sluice bench connections`") from None
    address = own_address()
    words = ["udp", address, str(FIRST), str(PEERS)]
    command = ["setpriv", "--pdeathsig", "KILL", "--", sys.executable]
    with subprocess.Popen(
        [*command, "-m", "sluice_cli.lab_connections_peers", *words], stdout=subprocess.PIPE, text=True
    ) as peers:
        try:
            assert peers.stdout is not None
            if peers.stdout.readline() != "ready\n":
                raise SluiceError("the peers have not begun")
            run(minutes, address)
        finally:
            peers.kill()


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The memory of many connections: a process that makes them with a Conductor and says what it grew by.

    python -m sluice_cli.bench_connections_memory udp 10000

UDP connections are opened and then left alone for half a minute of virtual time, in which their peer answers
all heartbeats: so each has round-trip times, losses and a history.  QUIC connections are opened to a server
of aioquic's in another process, whose memory is none of ours, by real time, and measured when all are open.

What counts is the memory of this process that no file stands behind (RssAnon in /proc/PID/status, proc(5)),
after all is made, less before; what is free inside of it counts as well.
"""

from __future__ import annotations

import gc
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Final

from userspace.connection.conductor import Conductor, ConductorSettings
from userspace.connection.heartbeat import Heartbeats
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.transport import Transport
from userspace.connection.udp import UdpConnection
from xdp.errors import SluiceError, UsageError

#: Seconds of virtual time in which UDP connections are opened, and then idle.
OPENING: Final = 10.0
IDLE: Final = 30.0
ROUND_TRIP: Final = 0.02
#: Seconds of the clock until all QUIC connections have to be open: some ms each on a slow machine.
PATIENCE: Final = 300.0
#: What both processes put before each QUIC datagram: whose it is.
NUMBER: Final = struct.Struct("!I")
#: Bytes: of either end's socket; more datagrams than that wait in a list.
BUFFER: Final = 4 << 20
ALPN: Final = "sluice-bench"
_SECRET: Final = bytes(range(16))


def memory() -> int:
    """Bytes of this process that no file stands behind."""
    gc.collect()
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SluiceError("the kernel does not tell RssAnon")


def make(now: float, count: int, transport: Callable[[int], Transport]) -> Conductor:
    """A conductor that opens one connection to each of so many endpoints."""

    def factory(_now: float, connection: int, _endpoint: Hashable, _address: Hashable) -> Transport:
        return transport(connection)

    pool = PoolSettings(min_size=count, max_size=count, idle_timeout=None, max_lifetime=None)
    conductor = Conductor(now, transport=factory, rng=random.Random(1), settings=ConductorSettings(pool=pool))
    for number in range(count):
        conductor.add_endpoint(now, f"peer-{number}", addresses=[("192.0.2.1", 1024 + number)])
    conductor.warm_pool(now)
    return conductor


def udp(count: int) -> dict[str, Any]:
    """So many UDP connections, opened and idle, in virtual time."""
    before = memory()
    conductor = make(0.0, count, lambda _: UdpConnection(secret=_SECRET))
    peer = Heartbeats(secret=_SECRET, boot=7)  # one for all: it only answers
    answers = deque[Answer]()
    now = run(conductor, peer, answers, 0.0, OPENING)
    check(conductor, count)
    start = time.process_time()
    run(conductor, peer, answers, now, now + IDLE)
    spent = time.process_time() - start
    check(conductor, count)
    return {"kind": "udp", "connections": count, "bytes": memory() - before, "idle_cpu": spent / IDLE}


#: When it comes, for which connection, and what it is.
Answer = tuple[float, int, bytes]


def run(conductor: Conductor, peer: Heartbeats, answers: deque[Answer], now: float, end: float) -> float:
    """All that happens until then; the peer answers at once, and answers come after :data:`ROUND_TRIP`."""
    while True:
        for one in conductor.take_datagrams(now):
            peer.receive(now, one.payload)
            answers += [(now + ROUND_TRIP, one.connection, pong) for pong in peer.take_pongs(now)]
        due = min(conductor.next_timeout(), answers[0][0] if answers else end)
        if due >= end:
            return end
        now = max(now, due)
        while answers and answers[0][0] <= now:
            _, connection, payload = answers.popleft()
            conductor.receive(now, connection, payload)
        conductor.on_timeout(now)


def check(conductor: Conductor, count: int) -> None:
    """Raises SluiceError unless all are open and well."""
    told = conductor.snapshot()
    if told.pool.idle != count or told.health.healthy != count:
        raise SluiceError(f"{told.pool.idle} of {count} are idle, {told.health.healthy} are well")


def quic(count: int) -> dict[str, Any]:
    """So many QUIC connections, opened to another process, by the clock."""
    from userspace.connection.quic import QuicConnection
    from userspace.connection.quic_session import QuicSettings

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        command = [sys.executable, "-m", "sluice_cli.bench_connections_server", str(theirs.fileno())]
        server = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            # Without keep-alive: a thousand servers' worth of it is more than a CPU has.
            settings = QuicSettings(alpn=(ALPN,), unverified=True, keep_alive=None, connect_timeout=PATIENCE)
            QuicConnection(settings, secret=_SECRET)  # what is imported and made once is not counted
            ours.setblocking(False)
            before = memory()
            conductor = make(
                time.monotonic(), count, lambda _: QuicConnection(settings, secret=os.urandom(16))
            )
            _open(conductor, ours, count)
            return {"kind": "quic", "connections": count, "bytes": memory() - before, "idle_cpu": None}
        finally:
            server.kill()
            server.wait()


def _open(conductor: Conductor, sock: socket.socket, count: int) -> None:
    """Carry datagrams until all are open.  Raises SluiceError when that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while conductor.pool.idle_count < count:
        now = time.monotonic()
        if now > deadline:
            raise SluiceError(f"{conductor.pool.idle_count} of {count} are open after {PATIENCE:.0f} s")
        for one in conductor.take_datagrams(now):
            try:
                sock.send(NUMBER.pack(one.connection) + one.payload)
            except BlockingIOError:
                continue  # lost, as on a network
        select.select([sock], [], [], max(0.0, min(0.1, conductor.next_timeout() - time.monotonic())))
        try:
            while True:
                data = sock.recv(2048)
                number = NUMBER.unpack_from(data)[0]
                conductor.receive(time.monotonic(), number, data[NUMBER.size :])
        except BlockingIOError:
            pass
        conductor.on_timeout(time.monotonic())


def main() -> None:
    """The whole process."""
    kinds: dict[str, Callable[[int], dict[str, Any]]] = {"udp": udp, "quic": quic}
    if len(sys.argv) != 3 or sys.argv[1] not in kinds:
        raise UsageError("udp or quic, and how many", hint="it is started by `sluice bench connections`")
    print(json.dumps(kinds[sys.argv[1]](int(sys.argv[2]))))


if __name__ == "__main__":
    main()

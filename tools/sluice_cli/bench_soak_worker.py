# SPDX-License-Identifier: Apache-2.0
"""The receiver of ``sluice bench soak``: counts everything, for as long as it is told to, and watches itself.

"ready" when it could receive; then a line of JSON every INTERVAL seconds; when its standard input is
closed it takes what is still on its way and writes a last line.
"""

from __future__ import annotations

import functools
import json
import operator
import resource
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from sluice_cli.bench_worker import Arguments, open_lanes, udp_socket
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.portable import PortableLanes
from userspace.datagram.sockets import ServiceSocket, socket_drops

#: Seconds between two looks at memory and descriptors.
INTERVAL: Final = 0.5
#: Seconds without a packet after which, the sender being done, none is on its way any more.
_QUIET: Final = 0.5
_PAGE_KIB: Final = resource.getpagesize() // 1024
#: Datagrams that one look at a plain socket takes before the clock is asked.
_TURN: Final = 64


class Watch:
    """What came, and how the process is doing."""

    def __init__(self) -> None:
        self.packets = 0
        self.mark = 0  # exclusive or of the numbers that the packets carry
        self.over = threading.Event()
        self._began = self._sampled = time.monotonic()
        self._moved = 0.0
        self._gap = self._oldest = 0.0

    def running(self) -> bool:
        """False when the sender is done and nothing came for a while."""
        now = time.monotonic()
        if now - self._sampled >= INTERVAL:
            self._sampled = now
            self.report()
        return not self.over.is_set() or now - self._moved < _QUIET

    def count(self, numbers: Any, oldest_ns: int) -> None:
        """``numbers`` are what packets carry, ``oldest_ns`` when the first of them was seen (0: unknown)."""
        self.packets += len(numbers)
        self.mark = functools.reduce(operator.xor, numbers, self.mark)
        now = time.monotonic()
        self._gap = max(self._gap, now - self._moved) if self._moved else 0.0
        self._moved = now
        if oldest_ns:
            self._oldest = max(self._oldest, time.monotonic_ns() / 1e9 - oldest_ns / 1e9)

    def report(self, **more: Any) -> None:
        """A line of JSON, since the start; gap between reads and age: the longest since the last line."""
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        sample = {
            "seconds": round(time.monotonic() - self._began, 3),
            "packets": self.packets,
            "mark": self.mark,
            "rss_kib": pages * _PAGE_KIB,
            "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            "gap_ms": round(self._gap * 1000, 3),
            "oldest_ms": round(self._oldest * 1000, 3),
            "cpu_ns": time.process_time_ns(),
        }
        self._gap = self._oldest = 0.0
        print(json.dumps(sample | more), flush=True)


def _ready() -> None:
    print("ready", flush=True)


def _batches(lanes: Any, arguments: Arguments, watch: Watch) -> None:
    _ready()
    while watch.running():
        with lanes.receive(arguments.batch, timeout=INTERVAL / 5) as batch:
            if batch:
                watch.count(batch.gather(0, 8), batch.times[0])


def soak_sluice(arguments: Arguments, watch: Watch) -> dict[str, int]:
    """AF_XDP lanes."""
    with open_lanes(arguments) as lanes:
        _batches(lanes, arguments, watch)
        found = [lane for queue in lanes.statistics().queues for lane in queue.lanes]
        return {place: sum(getattr(lane, place) for lane in found) for place in ("ring_full", "dropped")}


def _soak_sockets(lanes: MmsgLanes | PortableLanes, arguments: Arguments, watch: Watch) -> dict[str, int]:
    with lanes:
        _batches(lanes, arguments, watch)
        statistics = lanes.statistics()
        return {"overflowed": statistics.overflowed, "dropped": sum(statistics.dropped.values())}


def soak_mmsg(arguments: Arguments, watch: Watch) -> dict[str, int]:
    """Lanes over recvmmsg."""
    return _soak_sockets(MmsgLanes(_policy(arguments)), arguments, watch)


def soak_portable(arguments: Arguments, watch: Watch) -> dict[str, int]:
    """Lanes over plain sockets."""
    return _soak_sockets(PortableLanes(_policy(arguments)), arguments, watch)


def _policy(arguments: Arguments) -> Any:
    from sluice_cli.bench_room import bench_policy

    return bench_policy(arguments.port)


def soak_socket(arguments: Arguments, watch: Watch) -> dict[str, int]:
    """What most Python services do."""
    buffer = bytearray(2048)
    with udp_socket(arguments.port) as sock:
        sock.setblocking(False)
        _ready()
        while watch.running():
            if not select.select([sock], [], [], INTERVAL / 5)[0]:
                continue
            numbers: list[int] = []
            try:
                while len(numbers) < _TURN:
                    sock.recv_into(buffer)
                    numbers.append(int.from_bytes(buffer[:8], "big"))
            except BlockingIOError:
                pass
            watch.count(numbers, 0)
        return {"overflowed": _drops(sock, arguments.port)}


def _drops(sock: socket.socket, port: int) -> int:
    return socket_drops([ServiceSocket(port, sock)])


PATHS: Final[dict[str, Callable[[Arguments, Watch], dict[str, int]]]] = {
    "sluice": soak_sluice,
    "sluice-mmsg": soak_mmsg,
    "sluice-portable": soak_portable,
    "socket": soak_socket,
}


def main(argument: str) -> None:
    """Run what the JSON object ``argument`` says."""
    arguments = Arguments(**json.loads(argument))
    watch = Watch()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        watch.over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    lost = PATHS[arguments.path](arguments, watch)
    watch.report(lost=lost)


if __name__ == "__main__":
    main(sys.argv[1])

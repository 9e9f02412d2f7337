# SPDX-License-Identifier: Apache-2.0
"""The Python side of ``sluice bench``: one path in one process.

It speaks as the C references do (tools/bench/reference.h): "ready" when it could
receive, measured from the first packet on, one line of JSON at the end.
"""

from __future__ import annotations

import asyncio
import json
import select
import socket
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from userspace.datagram.descriptors import Mode

#: Give up when nothing arrives for that long, as the C references do.
PATIENCE: Final = 10.0
_SOCKET_BUFFER: Final = 8 << 20  # bytes, as the C references ask for
_BUFFER: Final = 2048
_SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
#: Batches between two looks at the clock, which would cost a tenth of a batch's Python each time.
_TURN: Final = 16
#: Packets between two looks at it, of those who send them one by one.
_ONES: Final = 1024
#: Microseconds that paths with "poll" look before they sleep: longer than questions are apart.
BUSY_POLL: Final = 1000


@dataclass
class Arguments:
    """What a run needs; as JSON on the command line."""

    path: str
    direction: str
    interface: str = ""
    map_id: int = 0
    cookie: int = 0
    batch: int = 256
    size: int = 22
    port: int = 0
    seconds: float = 1.0
    touch: bool = False
    linger: float = 0.0
    address: str = ""
    mode: str = "native-copy"
    lanes: int = 1


class Meter:
    """Packets, bytes, wall-clock and process CPU time from the first packet on."""

    def __init__(self, seconds: float) -> None:
        self.packets = 0
        self.bytes = 0
        self.lost = 0
        self.umem = 0  # bytes
        self.sink = 0
        self._seconds = seconds
        self._waiting = time.monotonic()
        self._began = 0.0
        self._ended = 0.0
        self._cpu = 0
        self._cpu_ended = 0

    def running(self) -> bool:
        """False when the time is over, or nothing ever came.

        The clocks stop then, as the C references' do: closing sockets waits for the kernel, and is not
        a part of what is measured.
        """
        now = time.monotonic()
        if not self._began:
            return now - self._waiting < PATIENCE
        if now - self._began < self._seconds:
            return True
        if not self._ended:
            self._ended = now
            self._cpu_ended = time.process_time_ns()
        return False

    def count(self, packets: int, size: int = 0) -> None:
        """The first call only starts the clocks: what it counted had waited."""
        if not self._began:
            if packets:
                self._began = time.monotonic()
                self._cpu = time.process_time_ns()
            return
        self.packets += packets
        self.bytes += size

    def report(self) -> str:
        """The line of JSON."""
        if not self._ended:
            self._ended = time.monotonic()
            self._cpu_ended = time.process_time_ns()
        seconds = self._ended - self._began if self._began else 0.0
        return json.dumps(
            {
                "packets": self.packets,
                "bytes": self.bytes,
                "lost": self.lost,
                "seconds": seconds,
                "process_cpu_ns": self._cpu_ended - self._cpu,
                "rss_kib": peak_rss_kib(),
                "umem_kib": self.umem // 1024,
                "sink": self.sink & 0xFFFF,
            }
        )


def peak_rss_kib() -> int:
    """The most memory that this process has used (proc_pid_status(5)).

    Not getrusage's ru_maxrss, which exec does not reset: it may be what the parent had when it forked.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def ready() -> None:
    """Tell the bench that packets may come."""
    print("ready", flush=True)


def open_lanes(arguments: Arguments) -> Any:
    """AF_XDP lanes on the interface under test."""
    from userspace.datagram.busy_poll import set_on_queues
    from userspace.datagram.descriptors import LaneSpec
    from userspace.datagram.xsk import open_queues, register
    from userspace.datagram.xsk_lanes import XskLanes
    from xdp.errors import UnsupportedError
    from xdp.maps import BpfMap
    from xdp.policy_model import Tuning

    # Ring and frames as in tools/bench/xsk.h, so that the two differ in nothing else.
    names = ("bench", "flood")[: arguments.lanes]
    specs = [LaneSpec(number=i, name=name, ring=4096, quota=3072) for i, name in enumerate(names)]
    descriptors = open_queues(
        arguments.interface,
        specs,
        mode=cast("Mode", arguments.mode),
        cookie=arguments.cookie,
        transmit_ring=4096,
    )
    if arguments.path.endswith("-poll") and (why := set_on_queues(descriptors, Tuning(busy_poll=BUSY_POLL))):
        raise UnsupportedError(why)
    if arguments.map_id:
        register(descriptors, BpfMap.by_id(arguments.map_id))
    return XskLanes(descriptors)


def sluice_receive(arguments: Arguments, meter: Meter) -> None:
    """Receive and give back; with ``touch`` 8 bytes of every packet are read."""
    with open_lanes(arguments) as lanes:
        ready()
        _receive(lanes, arguments, meter)
        _look(lanes, meter)


def _receive(lanes: Any, arguments: Arguments, meter: Meter) -> None:
    maximum, touch, linger, sink = arguments.batch, arguments.touch, arguments.linger, 0
    while meter.running():
        packets = 0
        for _ in range(_TURN):
            with lanes.receive(maximum, timeout=0.1, linger=linger) as batch:
                if not batch:
                    break
                if touch:
                    sink += batch.gather(0, 8)[0]
                packets += len(batch)
        meter.count(packets)
    meter.sink += sink


def sluice_echo(arguments: Arguments, meter: Meter) -> None:
    """Send every frame back in place."""
    with open_lanes(arguments) as lanes:
        ready()
        while meter.running():
            packets = 0
            for _ in range(_TURN):
                batch = lanes.receive(arguments.batch, timeout=0.1, linger=arguments.linger)
                if not batch:
                    batch.release()
                    break
                packets += lanes.send_back(batch, checksum=False)
            meter.count(packets)
        _look(lanes, meter)


def sluice_transmit(arguments: Arguments, meter: Meter) -> None:
    """Send batches of payloads, copied into frames as an application's would be."""
    from userspace.datagram.destination import resolve_destination

    destination = resolve_destination(arguments.interface, arguments.address, arguments.port, arguments.port)
    payloads = bytes(arguments.size * arguments.batch)
    lengths = array("I", [arguments.size]) * arguments.batch
    offsets = array("I", range(0, len(payloads), arguments.size))
    with open_lanes(arguments) as lanes:
        ready()
        while meter.running():
            meter.count(lanes.send_columns(destination, payloads, offsets, lengths))
        _look(lanes, meter)


def sluice_zero(arguments: Arguments, meter: Meter) -> None:
    """The same from frames in which the payloads lie: 8 bytes of each are written, none is copied."""
    from userspace.datagram.destination import resolve_destination
    from userspace.datagram.zero_copy import ZeroCopyUDP

    destination = resolve_destination(arguments.interface, arguments.address, arguments.port, arguments.port)
    stamps = array("Q", range(arguments.batch))
    with open_lanes(arguments) as lanes:
        zero = ZeroCopyUDP(lanes)
        ready()
        while meter.running():
            with zero.allocate(arguments.batch, arguments.size) as buffers:
                if len(buffers) == arguments.batch:  # else all are on their way
                    buffers.scatter(0, stamps)
                    meter.count(zero.send(destination, buffers))
        _look(lanes, meter)


def fanout_to(arguments: Arguments) -> Any:
    """As many destinations as a batch has packets: ports of one address, each with headers of its own."""
    from userspace.datagram.fanout import Fanout

    return Fanout((arguments.address, arguments.port + number) for number in range(arguments.batch))


def sluice_fanout(arguments: Arguments, meter: Meter) -> None:
    """One payload to many, again and again."""
    fanout, payload = fanout_to(arguments), bytes(arguments.size)
    with open_lanes(arguments) as lanes:
        _send_many(lanes, fanout, payload, arguments.port, meter)


def mmsg_fanout(arguments: Arguments, meter: Meter) -> None:
    """The same through kernel sockets."""
    fanout, payload = fanout_to(arguments), bytes(arguments.size)
    with _open_mmsg(arguments) as lanes:
        _send_many(lanes, fanout, payload, arguments.port, meter)


def mmsg_transmit(arguments: Arguments, meter: Meter) -> None:
    """Batches of payloads to one destination through a kernel socket."""
    to, payloads = (arguments.address, arguments.port), [bytes(arguments.size)] * arguments.batch
    with _open_mmsg(arguments) as lanes:
        ready()
        while meter.running():
            meter.count(sum(lanes.send(to, payloads) for _ in range(_TURN)))
        _look(lanes, meter)


def mmsg_echo(arguments: Arguments, meter: Meter) -> None:
    """Send every datagram back through the socket by which it came."""
    with _open_mmsg(arguments) as lanes:
        ready()
        while meter.running():
            meter.count(lanes.send_back(lanes.receive(arguments.batch, timeout=0.1)))
        _look(lanes, meter)


def one_by_one(arguments: Arguments, meter: Meter) -> None:
    """A call for each packet, on AF_XDP, sendmmsg or plain sockets."""
    to, payload, port = (arguments.address, arguments.port), bytes(arguments.size), arguments.port
    with _opened(arguments) as lanes:
        lanes.send(to, [payload], port=port)  # routes are asked for now
        ready()
        while meter.running():
            meter.count(sum(lanes.send(to, [payload], port=port) for _ in range(_ONES)))
        _look(lanes, meter)


def through_manager(arguments: Arguments, meter: Meter) -> None:
    """The same packets, queued one by one with a batch manager."""
    from userspace.datagram.batch_manager import UDPBatchManager

    to, payload = (arguments.address, arguments.port), bytes(arguments.size)
    with _opened(arguments) as lanes:
        manager = UDPBatchManager(lanes, port=arguments.port, batch_size=arguments.batch)
        lanes.send(to, [payload], port=arguments.port)
        ready()
        sent = 0
        while meter.running():
            for _ in range(_ONES):
                manager.queue_packet(to, payload)
            before, sent = sent, manager.statistics().sent
            meter.count(sent - before)
        manager.close()
        _look(lanes, meter)


def _opened(arguments: Arguments) -> Any:
    from sluice_cli.bench_room import bench_policy
    from userspace.datagram.portable import PortableLanes

    if arguments.path.startswith("sluice-mmsg"):
        return _open_mmsg(arguments)
    if arguments.path.startswith("sluice-portable"):
        return PortableLanes(bench_policy(arguments.port))
    return open_lanes(arguments)


def _send_many(lanes: Any, fanout: Any, payload: bytes, port: int, meter: Meter) -> None:
    lanes.send_many(fanout, payload, port=port)  # routes are asked for now
    ready()
    while meter.running():
        packets = 0
        for _ in range(_TURN):
            packets += lanes.send_many(fanout, payload, port=port)
        meter.count(packets)
    _look(lanes, meter)


def _look(lanes: Any, meter: Meter) -> None:
    """What lanes have lost, and the memory of their frames."""
    meter.umem = lanes.status().get("memory_bytes", 0)
    statistics = lanes.statistics()
    if hasattr(statistics, "overflowed"):  # kernel sockets
        meter.lost = statistics.overflowed + sum(statistics.dropped.values())
        return
    found = [lane for queue in statistics.queues for lane in queue.lanes]
    meter.lost = sum(lane.ring_full + lane.dropped for lane in found)


def udp_socket(port: int) -> socket.socket:
    """Bound, with the buffer that a tuned service asks for."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _SOCKET_BUFFER)
    sock.bind(("", port))
    return sock


def _drops(sock: socket.socket, port: int) -> int:
    """Datagrams that found the buffer full."""
    from userspace.datagram.sockets import ServiceSocket, socket_drops

    return socket_drops([ServiceSocket(port, sock)])


def socket_receive(arguments: Arguments, meter: Meter) -> None:
    """What most Python services do: one call for each datagram, into a buffer that is used again."""
    buffer = bytearray(_BUFFER)
    with udp_socket(arguments.port) as sock:
        sock.setblocking(False)
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        ready()
        while meter.running():
            poller.poll(100)
            received = 0
            try:
                for received in range(1, 1001):  # noqa: B007 - counts what came before the socket was empty
                    sock.recvfrom_into(buffer)
            except BlockingIOError:
                received -= 1
            meter.count(received)
        meter.lost = _drops(sock, arguments.port)


def socket_echo(arguments: Arguments, meter: Meter) -> None:
    """The same, sending every datagram back."""
    with udp_socket(arguments.port) as sock:
        sock.settimeout(0.1)
        ready()
        while meter.running():
            try:
                data, source = sock.recvfrom(_BUFFER)
            except TimeoutError:
                continue
            sock.sendto(data, source)
            meter.count(1)
        meter.lost = _drops(sock, arguments.port)


class _Receiver(asyncio.DatagramProtocol):
    def __init__(self, meter: Meter, echo: bool) -> None:
        self._meter = meter
        self._echo = echo
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if self._echo:
            self._transport.sendto(data, addr)
        self._meter.count(1)


async def _asyncio_run(arguments: Arguments, meter: Meter) -> None:
    loop = asyncio.get_running_loop()
    sock = udp_socket(arguments.port)
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _Receiver(meter, arguments.direction == "echo"), sock=sock
    )
    ready()
    over = asyncio.Event()

    def check() -> None:
        if meter.running():
            loop.call_later(0.02, check)
        else:
            over.set()

    check()
    await over.wait()
    meter.lost = _drops(sock, arguments.port)
    transport.close()


def asyncio_run(arguments: Arguments, meter: Meter) -> None:
    """Asyncio's own event loop."""
    asyncio.run(_asyncio_run(arguments, meter))


def uvloop_run(arguments: Arguments, meter: Meter) -> None:
    """Uvloop's event loop."""
    import uvloop

    uvloop.run(_asyncio_run(arguments, meter))


def mmsg_receive(arguments: Arguments, meter: Meter) -> None:
    """Sluice's lanes over recvmmsg: the same interface on kernel sockets."""
    with _open_mmsg(arguments) as lanes:
        ready()
        _receive(lanes, arguments, meter)
        _look(lanes, meter)


def _open_mmsg(arguments: Arguments) -> Any:
    from sluice_cli.bench_room import bench_policy
    from userspace.datagram.mmsg import MmsgLanes

    return MmsgLanes(bench_policy(arguments.port))


RUNNERS: Final[dict[tuple[str, str], Callable[[Arguments, Meter], None]]] = {
    ("sluice", "receive"): sluice_receive,
    ("sluice", "echo"): sluice_echo,
    ("sluice-poll", "echo"): sluice_echo,
    ("sluice", "transmit"): sluice_transmit,
    ("sluice-zero", "transmit"): sluice_zero,
    ("sluice", "fanout"): sluice_fanout,
    ("sluice-mmsg", "receive"): mmsg_receive,
    ("sluice-mmsg", "fanout"): mmsg_fanout,
    ("sluice-mmsg", "transmit"): mmsg_transmit,
    **{(f"{lanes}-each", "manager"): one_by_one for lanes in ("sluice", "sluice-mmsg", "sluice-portable")},
    **{
        (f"{lanes}-manager", "manager"): through_manager
        for lanes in ("sluice", "sluice-mmsg", "sluice-portable")
    },
    ("sluice-mmsg", "echo"): mmsg_echo,
    ("socket", "receive"): socket_receive,
    ("socket", "echo"): socket_echo,
    ("asyncio", "receive"): asyncio_run,
    ("asyncio", "echo"): asyncio_run,
    ("uvloop", "receive"): uvloop_run,
    ("uvloop", "echo"): uvloop_run,
}


def main(argument: str) -> None:
    """Run what the JSON object ``argument`` says."""
    arguments = Arguments(**json.loads(argument))
    meter = Meter(arguments.seconds)
    RUNNERS[arguments.path, arguments.direction](arguments, meter)
    print(meter.report(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

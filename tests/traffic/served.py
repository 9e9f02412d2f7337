# SPDX-License-Identifier: Apache-2.0
"""A lab whose server receives in lanes, a wire to its client for scapy, and what the tests do with both."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from scapy.arch.linux import L2Socket

# Before any socket is made: without it scapy's sockets don't know Ethernet.
from scapy.layers.inet import IP, UDP
from scapy.packet import Packet as Frame
from scapy.packet import Raw

from sluice_cli.lab import Host, Lab
from sluice_cli.status_sample import read_counters
from tests.cable import NATIVE
from userspace.datagram.batch import Address, Batch
from userspace.datagram.lanes import open_lanes
from userspace.datagram.xsk_lanes import XskLanes
from xdp import inventory
from xdp.counters import Counters
from xdp.policy import Policy

ROOT = Path(__file__).resolve().parents[2]
#: For processes that run the tools of this checkout.
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
SECONDS = 20.0  # deadline for what takes milliseconds; this machine may be busy

SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python has no name for it

#: Frames that are sent before what they became is received: a veth's ring takes 256.
BURST = 64

APP, ECHO = 8001, 8003
HIGH, DATA, LOW = range(3)
UNKNOWN, STAKED, BLOCKED = range(3)
ALPHA, BETA = b"\xa1", b"\xb2"  # first bytes of the payload kinds 1 and 2
BLOCKED_SOURCE = "10.81.66.6"
STRANGER_4, STRANGER_6 = "10.81.16.1", "fd81:0:0:1::9"

POLICY = """
version = 1
[[lane]]
name = "high"
[[lane]]
name = "data"
[[lane]]
name = "low"
[[class]]
name = "staked"
prefixes = ["10.81.0.0/24", "fd81::/64"]
peers = [{ address = "10.81.0.2", name = "client" }, { address = "fd81::2", name = "client" }]
[[class]]
name = "blocked"
prefixes = ["10.81.66.0/24"]
deny = true
[[service]]
name = "app"
ports = ["8001-8002"]
  [[service.kind]]
  name = "alpha"
  match = [{ offset = 0, value = "a1" }]
  [[service.kind]]
  name = "beta"
  match = [{ offset = 0, value = "b2" }]
  [[service.rule]]
  class = "staked"
  kind = "alpha"
  action = "lane"
  lane = "high"
  [[service.rule]]
  class = "staked"
  kind = "beta"
  action = "lane"
  lane = "data"
  [[service.rule]]
  action = "lane"
  lane = "low"
[[service]]
name = "echo"
ports = [8003]
  [[service.rule]]
  action = "lane"
  lane = "data"
"""

T = TypeVar("T")


@dataclass(frozen=True)
class Packet:
    """What a batch said about one packet, copied."""

    payload: bytes
    lane: int
    kind: int
    class_id: int
    service: int
    peer: int
    time: int
    source: tuple[Address, int]


def packets(batch: Batch) -> list[Packet]:
    return [
        Packet(
            bytes(view),
            batch.lanes[index],
            batch.kinds[index],
            batch.classes[index],
            batch.services[index],
            batch.peers[index],
            batch.times[index],
            batch.source(index),
        )
        for index, view in enumerate(batch)
    ]


def until(condition: Callable[[], T], what: str = "", timeout: float = SECONDS) -> T:
    """What ``condition`` returned once it was true; fails when that takes too long."""
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or condition}"
        time.sleep(0.005)


def within(timeout: float, work: Callable[[], T]) -> T:
    """The result of ``work`` in a thread of its own; fails when it hangs."""
    out: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            out.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    assert not thread.is_alive(), f"hangs: {work}"
    if errors:
        raise errors[0]
    return out[0]


def counters(host: Host) -> Counters:
    with host.enter():
        return read_counters(inventory.find(host.interface))


def steered(found: Counters, lane: int) -> int:
    """Packets that the program gave to the sockets of a lane."""
    verdicts = found.lanes[lane].verdicts
    return sum(count.packets for reason, count in verdicts.items() if reason.startswith("steer"))


def descriptors() -> dict[int, str]:
    """Open descriptors of this process and what they are, without the one that looks.

    Collects garbage first: closed lanes that an earlier test's traceback still holds in a cycle keep
    the eventfd of their waiters until then, and would vanish between two looks.
    """
    gc.collect()
    found = {}
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - as few objects as possible while looking
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = str(Path(f"/proc/self/fd/{name}").readlink())
    return {number: what for number, what in found.items() if not what.endswith("/fd")}


class Served:
    """Lanes open on the server's interface."""

    def __init__(self, lab: Lab, policy: str, mode: Literal["native", "generic"], **options: Any) -> None:
        self.lab = lab
        self.policy = Policy.parse(policy, "test")
        self.attached = mode
        if mode == "generic":
            # What XDP sends arrives at an end without a native program only if that has NAPI: with GRO.
            lab.server.run(["ethtool", "-K", lab.server.interface, "gro", "on"])
        with lab.server.enter():
            opened = open_lanes(self.policy, interface=lab.server.interface, mode=mode, **options)
        assert isinstance(opened, XskLanes)
        assert opened.mode == (NATIVE if mode == "native" else "generic-copy"), opened.status()
        self.lanes = opened
        if lab.nics:  # cards lose carrier for a moment; an interface that is down on purpose stays so
            lab.server.settle()
        with lab.client.enter():
            self.wire = L2Socket(iface=lab.client.interface)
        self.wire.ins.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)

    def close(self) -> None:
        self.wire.close()
        self.lanes.close()

    def counters(self) -> Counters:
        return counters(self.lab.server)

    def send(self, frames: Sequence[bytes | Frame]) -> None:
        """Put frames on the wire at the client."""
        for frame in frames:
            self.wire.outs.send(bytes(frame))

    def receive(self, count: int, maximum: int = 256, timeout: float = SECONDS) -> list[Packet]:
        """Exactly ``count`` packets, and then nothing that was there already."""
        found: list[Packet] = []
        deadline = time.monotonic() + timeout
        while len(found) < count:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(found)} of {count} after {timeout} s; {self.counters().verdicts}"
            with self.lanes.receive(maximum, timeout=left) as batch:
                found += packets(batch)
        with self.lanes.try_receive(maximum) as batch:
            found += packets(batch)
        assert len(found) == count
        return found

    def receive_some(self, timeout: float = SECONDS) -> None:
        """At least one packet."""
        with self.lanes.receive(timeout=timeout) as batch:
            assert len(batch) > 0, f"nothing after {timeout} s"

    def drain(self) -> None:
        """Read all that is there, when nothing more is sent."""
        while True:
            with self.lanes.receive(timeout=0.1) as batch:
                if not batch:
                    return

    def exchange(self, frames: Sequence[bytes | Frame]) -> list[Packet]:
        """Send and receive in bursts that the interface does not lose."""
        found: list[Packet] = []
        for start in range(0, len(frames), BURST):
            burst = frames[start : start + BURST]
            self.send(burst)
            found += self.receive(len(burst))
        return found

    def exchange_whole(self, frames: Sequence[bytes | Frame], count: int) -> list[Packet]:
        """Send frames that make up ``count`` datagrams, and receive these."""
        assert len(frames) <= BURST
        self.send(frames)
        return self.receive(count)

    def forget(self) -> None:
        """Frames that arrived at the client until now are nobody's answer."""
        while select.select([self.wire.ins], [], [], 0)[0]:
            self.wire.ins.recv(4096)

    def answers(self, count: int, port: int | None = None) -> list[Frame]:
        """``count`` UDP frames that arrived at the client, for ``port``."""
        found: list[Frame] = []
        deadline = time.monotonic() + SECONDS
        while len(found) < count:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(found)} of {count} frames at the client"
            if not select.select([self.wire.ins], [], [], left)[0]:
                continue
            frame = self.wire.recv()
            if frame is None or frame.src != self.lab.server.mac or UDP not in frame:
                continue
            if port is None or frame[UDP].dport == port:
                found.append(frame)
        return found


@contextlib.contextmanager
def serving_in(
    lab: Lab, mode: Literal["native", "generic"] = "native", policy: str = POLICY, **options: Any
) -> Iterator[Served]:
    """Lanes open in a lab; at the end every frame is accounted for and every verdict counted."""
    served = Served(lab, policy, mode, **options)
    try:
        yield served
        assert all(frames.balanced for frames in served.lanes.frames())
        assert served.counters().balanced
    finally:
        served.close()


@contextlib.contextmanager
def serving(
    mode: Literal["native", "generic"] = "native",
    policy: str = POLICY,
    *,
    queues: int = 1,
    static_neighbours: bool = True,
    **options: Any,
) -> Iterator[Served]:
    """The same in a lab of its own."""
    with (
        Lab(queues=queues, static_neighbours=static_neighbours) as lab,
        serving_in(lab, mode, policy, **options) as served,
    ):
        yield served


def payload_of(frame: Frame) -> bytes:
    """UDP payload of a frame that scapy parsed, without Ethernet's padding."""
    udp = frame[UDP]
    return bytes(udp[Raw].load)[: udp.len - 8] if Raw in udp else b""


def checksums_right(frame: Frame) -> bool:
    """Whether scapy, building the frame anew, comes to the same IP and UDP checksums."""
    again = frame.copy()
    if IP in again:
        del again[IP].chksum
    del again[UDP].chksum
    rebuilt = type(frame)(bytes(again))
    same = rebuilt[UDP].chksum == frame[UDP].chksum != 0
    return same and (IP not in frame or rebuilt[IP].chksum == frame[IP].chksum)

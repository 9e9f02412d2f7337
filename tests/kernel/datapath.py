# SPDX-License-Identifier: Apache-2.0
"""A lab whose server has the steer program and AF_XDP lanes, for tests of the data path."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from sluice_cli.lab import Host, Lab
from tests.cable import NATIVE
from userspace.datagram.descriptors import LaneDescriptors, LaneSpec, Mode
from userspace.datagram.xsk import open_queues, register
from userspace.datagram.xsk_lanes import XskLanes
from xdp import link as links
from xdp.policy import Policy
from xdp.program import SteerProgram
from xdp.tables import compile_policy

VOTES, BULK, UNUSED = 8001, 8002, 8003  # ports; the last one is nobody's
SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python has no name for it
SECONDS = 60.0  # deadline for what takes milliseconds; floods of other tests may come first

POLICY = """
version = 1
default_class = "unknown"
[[lane]]
name = "votes"
[[lane]]
name = "bulk"
[[class]]
name = "staked"
prefixes = ["10.81.0.0/24"]
peers = [{ address = "10.81.0.2", name = "client" }]
[[service]]
name = "votes"
ports = [8001]
  [[service.kind]]
  name = "vote"
  match = [{ offset = 0, mask = "ff", value = "56" }]
  [[service.rule]]
  action = "lane"
  lane = "votes"
[[service]]
name = "bulk"
ports = [8002]
  [[service.rule]]
  action = "lane"
  lane = "bulk"
"""

SPECS = (LaneSpec(number=0, name="votes"), LaneSpec(number=1, name="bulk"))

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, seconds: float = SECONDS) -> T:
    """Ask again and again until the answer is true."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.002)
    return answer


def load(policy: str = POLICY) -> SteerProgram:
    program = SteerProgram.load()
    program.swap(compile_policy(Policy.parse(policy)))
    return program


def open_on(
    program: SteerProgram,
    host: Host,
    specs: Sequence[LaneSpec] = SPECS,
    *,
    mode: Mode = NATIVE,
    **options: Any,
) -> LaneDescriptors:
    """Sockets of a host whose interface has the program already."""
    with host.enter():
        descriptors = open_queues(
            host.interface, specs, mode=mode, **{"cookie": program.cookie, "reserve": 256, **options}
        )
    register(descriptors, program.maps["xsks"])
    return descriptors


@contextlib.contextmanager
def attached(program: SteerProgram, host: Host, mode: Mode = NATIVE) -> Iterator[None]:
    how: Literal["native", "generic"] = "generic" if mode == "generic-copy" else "native"
    with host.enter():
        link = links.attach(program, host.ifindex, how)
    try:
        host.settle()
        yield
    finally:
        link.close()


@contextlib.contextmanager
def lanes_on(
    program: SteerProgram,
    lab: Lab,
    specs: Sequence[LaneSpec] = SPECS,
    *,
    mode: Mode = NATIVE,
    **options: Any,
) -> Iterator[XskLanes]:
    """Attached, opened and in use, all in this process."""
    with (
        attached(program, lab.server, mode),
        XskLanes(open_on(program, lab.server, specs, mode=mode, **options)) as lanes,
    ):
        yield lanes
        balanced(lanes)


def balanced(lanes: XskLanes) -> None:
    """Every frame is in one place, as counted one by one."""
    for queue, counted in zip(lanes.statistics().queues, lanes.frames(), strict=True):
        assert queue.frames == counted
        assert counted.balanced


def client_socket(lab: Lab, version: int = 4) -> socket.socket:
    """A kernel UDP socket on the client, with a deadline."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with lab.client.enter():
        sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(SECONDS)
    # A card's driver may take a page for each packet, and the buffer's limit counts these.
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
    sock.bind((str(lab.client.ipv4 if version == 4 else lab.client.ipv6), 0))
    return sock


def server_address(lab: Lab, version: int = 4) -> str:
    return str(lab.server.ipv4 if version == 4 else lab.server.ipv6)


def collect(lanes: XskLanes, count: int) -> list[tuple[int, bytes]]:
    """Exactly ``count`` packets as (lane, payload)."""
    found: list[tuple[int, bytes]] = []
    while len(found) < count:
        with lanes.receive(timeout=SECONDS) as batch:
            assert batch, f"{len(found)} of {count} came; {lanes.statistics()}"
            found += zip(batch.lanes, map(bytes, batch), strict=True)
    assert len(found) == count
    return found


def quiet(loop: select.epoll, lanes: XskLanes) -> bool:
    """Whether nothing is left to say; what was (a link that came up, say) has been taken."""
    if not loop.poll(0):
        return True
    lanes.try_receive().release()
    return False


def open_files() -> set[str]:
    """What this process has open, by number and what it is."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the directory's own
            found.add(f"{entry.name} {entry.readlink()}")
    return {entry for entry in found if "/proc/" not in entry}

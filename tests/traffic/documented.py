# SPDX-License-Identifier: Apache-2.0
"""The reader's machine as the documents have it: an interface eth1, policy.toml, capture.pcap, traffic."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final, TypeVar

from sluice_cli.lab import Lab
from sluice_cli.status_sample import read_counters
from sluice_cli.traffic import udp_frame
from tests.documents import ROOT, Block, blocks
from xdp import inventory
from xdp.counters import Counters

INTERFACE: Final = "eth1"
PORT: Final = 8005
STRANGER: Final = IPv4Address("203.0.113.9")
SECONDS: Final = 60.0  # deadline for what takes seconds at most, on a machine that others use too
# Without measuring coverage, which takes twice as long: other tests look at what the commands do.
ENVIRONMENT: Final = {
    **{name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")},
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}",
    "COLUMNS": "100",
}

T = TypeVar("T")


def until(condition: Callable[[], T], what: str) -> T:
    """Ask again and again until the answer is true."""
    deadline = time.monotonic() + SECONDS
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {SECONDS} s: {what}"
        time.sleep(0.005)
    return answer


def code_blocks(document: str, language: str) -> list[Block]:
    return [block for block in blocks(ROOT / document) if block.language == language]


class Machine:
    """A host of a lab whose interface is called eth1, and a folder to work in."""

    def __init__(self, lab: Lab, folder: Path, policy: str) -> None:
        self.lab = lab
        self.folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        (folder / "policy.toml").write_text(policy, encoding="utf-8")
        (folder / "staked.txt").write_text(
            "192.0.2.7  validator-a\n10.81.0.2  validator-b\n", encoding="utf-8"
        )
        (folder / "docs").symlink_to(ROOT / "docs")
        frames = [udp_frame(lab.client, lab.server, PORT, b"captured %d" % number) for number in range(8)]
        (folder / "capture.pcap").write_bytes(_capture(frames))
        with lab.client.enter():
            self._raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            self._raw.bind((lab.client.interface, 0))

    def start(self, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """A command line, there; output in pipes."""
        words = [sys.executable, *words[1:]] if words[0].endswith("python") else list(words)
        if words[0] in {"sluice", "tools/sluice"}:
            words = [sys.executable, "-m", "sluice_cli", *words[1:]]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": self.folder, **options}
        process = self.lab.server.popen(words, env=ENVIRONMENT, **options)
        self._started.append(process)
        return process

    def send(self, count: int) -> None:
        """Datagrams of a configured peer to the service; a veth's ring takes 256 at once."""
        frame = udp_frame(self.lab.client, self.lab.server, PORT, b"VOTE" + bytes(8))
        for _ in range(count):
            self._raw.send(frame)

    def send_from_stranger(self) -> None:
        """One datagram from an address that is nobody's."""
        self._raw.send(udp_frame(self.lab.client, self.lab.server, PORT, b"hello", source_address=STRANGER))

    def counters(self) -> Counters:
        with self.lab.server.enter():
            return read_counters(inventory.find(INTERFACE))

    def carries_program(self) -> bool:
        with self.lab.server.enter():
            return any(one.interface == INTERFACE for one in inventory.attachments())

    def close(self) -> None:
        """End what a failed test left running, and its pipes."""
        self._raw.close()
        for process in self._started:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=SECONDS)


@contextmanager
def machine(folder: Path, policy: str) -> Iterator[Machine]:
    queues = min(2, len(os.sched_getaffinity(0)))
    with Lab(queues=queues, static_neighbours=True) as lab:
        server = lab.server
        with server.enter():
            # Renaming takes an interface that is down, which loses its IPv6 addresses unless told not to.
            Path("/proc/sys/net/ipv6/conf/all/keep_addr_on_down").write_text("1", encoding="ascii")
        before = server.run(["ip", "neighbour", "show", "dev", server.interface]).stdout
        for change in (["down"], ["name", INTERFACE], ["up"]):
            server.run(["ip", "link", "set", server.interface, *change])
            server.interface = INTERFACE if change[0] == "name" else server.interface
        for address, mac in re.findall(r"^(\S+) lladdr (\S+)", before, re.MULTILINE):
            server.run(
                ["ip", "neighbour", "replace", address, "lladdr", mac, "dev", INTERFACE, "nud", "permanent"]
            )
        made = Machine(lab, folder, policy)
        try:
            yield made
        finally:
            made.close()


#: Source ports of the traffic: the hash of the addresses and ports chooses a veth's queue, and none of
#: two queues is left out by 16 of them.
SOURCE_PORTS: Final = range(9000, 9016)


@contextmanager
def traffic(lab: Lab) -> Iterator[list[socket.socket]]:
    """Datagrams to the service from both addresses of the client until the end; the IPv4 sockets.

    Sockets are in the order of `SOURCE_PORTS`.
    """
    stop = threading.Event()
    with ExitStack() as cleanup:
        with lab.client.enter():
            sockets = [cleanup.enter_context(_connected(lab, port, 4)) for port in SOURCE_PORTS]
            everyone = [*sockets, cleanup.enter_context(_connected(lab, SOURCE_PORTS[0], 6))]

        def work() -> None:
            number = 0
            while not stop.wait(0.01):
                number += 1
                for sock in everyone:
                    try:
                        sock.send(struct.pack("!4sQ", b"VOTE", number))
                    except ConnectionRefusedError:  # nobody listens just then
                        continue

        thread = threading.Thread(target=work)
        thread.start()
        cleanup.callback(thread.join)
        cleanup.callback(stop.set)
        yield sockets


def _connected(lab: Lab, port: int, version: int) -> socket.socket:
    family, own, other = (
        (socket.AF_INET, lab.client.ipv4, lab.server.ipv4)
        if version == 4
        else (socket.AF_INET6, lab.client.ipv6, lab.server.ipv6)
    )
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((str(own), port))
    sock.connect((str(other), PORT))
    return sock


def _capture(frames: Sequence[bytes]) -> bytes:
    out = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    for number, frame in enumerate(frames):
        out += struct.pack("<IIII", 1, number * 1000, len(frame), len(frame)) + frame
    return out


def read_until(process: subprocess.Popen[bytes], pattern: str) -> str:
    """What a process prints, until that is in it."""
    assert process.stdout is not None
    text = ""
    deadline = time.monotonic() + SECONDS
    while not re.search(pattern, text):
        left = deadline - time.monotonic()
        assert left > 0, f"no {pattern!r} within {SECONDS} s; {text!r} so far"
        if select.select([process.stdout], [], [], left)[0]:
            read = os.read(process.stdout.fileno(), 65536)
            assert read, f"ended without {pattern!r}: {text!r} {_errors(process)}"
            text += read.decode()
    return text


def _errors(process: subprocess.Popen[bytes]) -> str:
    return process.stderr.read().decode() if process.stderr is not None else ""


def interrupt(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """As Ctrl-C does, once it waits for something; exit code and what it said to that."""
    until(lambda: is_idle(process), "nothing left to do")
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=SECONDS)
    return process.returncode, f"{out.decode()}{errors.decode()}"


def is_idle(process: subprocess.Popen[bytes]) -> bool:
    """It has slept for a tenth of a second: all that came is dealt with."""
    for _ in range(20):
        if Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "S":
            return False
        time.sleep(0.005)
    return True

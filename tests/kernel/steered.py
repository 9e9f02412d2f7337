# SPDX-License-Identifier: Apache-2.0
"""A network namespace with a veth pair and the steer program on one end, for tests of the tools."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

from tests.ordinary_user import nobodys_python

ROOT = Path(__file__).resolve().parents[2]
NEAR, FAR = "sl-near", "sl-far"
CLONE_NEWNET = 0x40000000  # linux/sched.h
READY_SECONDS = 60.0  # bcc's compiler on a busy machine

POLICY = """
version = 1
default_class = "unknown"
[[lane]]
name = "votes"
[[lane]]
name = "bulk"
rate = 1000
burst = 16
[[class]]
name = "staked"
prefixes = ["10.1.0.0/16", "2001:db8::/32"]
peers = [{ address = "192.0.2.8", name = "bob" }, "192.0.2.7"]
[[class]]
name = "banned"
prefixes = ["198.51.100.0/24"]
deny = true
[[service]]
name = "turbine"
ports = [8001, "8003-8004"]
  [[service.kind]]
  name = "vote"
  match = [{ offset = 0, mask = "ff", value = "56" }]
  [[service.rule]]
  class = "staked"
  kind = "vote"
  action = "lane"
  lane = "votes"
  [[service.rule]]
  class = "staked"
  action = "lane"
  lane = "bulk"
  [[service.rule]]
  action = "drop"
"""

T = TypeVar("T")


def in_namespace(name: str, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of its own that has entered the network namespace."""
    out: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with open(f"/run/netns/{name}", "rb") as file:  # noqa: PTH123
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(file.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            out.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return out[0]


def until(condition: Callable[[], T], what: str, seconds: float = 10.0) -> T:
    """Ask again and again until the answer is true."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)
    return answer


@dataclass
class Steered:
    """The namespace, and processes that were started in it."""

    name: str
    folder: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, *words: str) -> list[str]:
        # `ip netns exec` would mount another /sys, and hide the bpffs.
        return ["nsenter", f"--net=/run/netns/{self.name}", *words]

    def environment(self, **more: str) -> dict[str, str]:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
        return {**os.environ, "PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "100", **more}

    def as_nobody(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command line as an ordinary user, who can't write anything here."""
        code = "import sys; from sluice_cli.main import main; sys.exit(main(sys.argv[1:]))"
        command = self.command(*nobodys_python("-c", code, *words))
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=self.environment(), timeout=60
        )

    def sluice(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run the command line in the namespace."""
        command = self.command(sys.executable, "-m", "sluice_cli", *words)
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, env=self.environment(**more)
        )

    def json(self, *words: str) -> Any:
        """The JSON report of a command that has to succeed."""
        done = self.sluice(*words, "--json")
        assert done.returncode == 0, (done.stdout, done.stderr)
        document = json.loads(done.stdout)
        assert document["version"] == 1
        return document

    def hold(
        self,
        policy: str | None = POLICY,
        *,
        interface: str = NEAR,
        mode: str = "native",
        state: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start an owner (of a foreign program if there is no policy) and wait until it is attached."""
        source = "foreign"
        if policy is not None:
            source = str(self.folder / "policy.toml")
            Path(source).write_text(policy, encoding="utf-8")
        words = [sys.executable, str(ROOT / "tests/kernel/hold_steer.py"), interface, mode, source]
        process = subprocess.Popen(
            self.command(*words, *([str(state)] if state else [])),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment(),
        )  # fmt: skip
        self.processes.append(process)
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], READY_SECONDS)
        line = process.stdout.readline() if readable else ""
        assert line.startswith("ready"), line + (process.stdout.read() if readable else "still compiling")
        return process

    def stop(self, process: subprocess.Popen[str]) -> None:
        """End a process that this object started."""
        process.terminate()
        process.wait(timeout=30)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        self.processes.remove(process)

    def send(self, frames: Sequence[bytes], interface: str = FAR) -> None:
        """Put whole frames on the wire at the far end."""

        def open_socket() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            made.bind((interface, 0))
            return made

        with in_namespace(self.name, open_socket) as wire:
            for frame in frames:
                wire.send(frame)


def udp_frame(source: str, port: int, payload: bytes = b"V" * 8) -> bytes:
    """Ethernet, IPv4 and UDP (without a UDP checksum, which IPv4 allows)."""
    udp = struct.pack("!HHHH", 4000, port, 8 + len(payload), 0) + payload
    addresses = IPv4Address(source).packed + IPv4Address("192.0.2.1").packed
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0)
    total = sum(struct.unpack("!10H", head + addresses))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return bytes(12) + b"\x08\x00" + head[:10] + struct.pack("!H", checksum) + addresses + udp


@contextlib.contextmanager
def namespace(folder: Path) -> Iterator[Steered]:
    """Make a namespace with a veth pair; all is gone again afterwards."""
    name = f"sluice-cli-{secrets.token_hex(4)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    made = Steered(name, folder)
    try:
        pair = ["link", "add", NEAR, "type", "veth", "peer", "name", FAR]
        subprocess.run(["ip", "-n", name, *pair], check=True)
        for interface in (NEAR, FAR):
            # Without IPv6 nobody but the test sends anything.
            off = ["sysctl", "-qw", f"net.ipv6.conf.{interface}.disable_ipv6=1"]
            subprocess.run(made.command(*off), check=True)
            subprocess.run(["ip", "-n", name, "link", "set", interface, "up"], check=True)
        yield made
    finally:
        for process in list(made.processes):
            made.stop(process)
        subprocess.run(["ip", "netns", "del", name], check=True)

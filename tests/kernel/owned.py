# SPDX-License-Identifier: Apache-2.0
"""`sluice up` and applications as processes in a lab, for tests of ownership."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sluice_cli.lab import Host, Lab
from tests.ordinary_user import readable_python
from xdp.inventory import PIN_ROOT
from xdp.link import attached_program

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
SECONDS = 40.0  # deadline for what takes a second; compilers run on a shared machine
PORT = 8001
NOBODY = 65534

#: Small rings: opening them takes milliseconds.
POLICY = """
version = 1
[[lane]]
name = "votes"
ring = 256
quota = 256
[[lane]]
name = "bulk"
ring = 128
quota = 128
[[class]]
name = "client"
prefixes = ["10.81.0.0/16"]
peers = [{ address = "10.81.0.2", name = "alice" }]
[[service]]
name = "app"
ports = [8001]
  [[service.kind]]
  name = "vote"
  match = [{ offset = 0, value = "56" }]
  [[service.rule]]
  kind = "vote"
  action = "lane"
  lane = "votes"
  [[service.rule]]
  action = "lane"
  lane = "bulk"
[rings]
reserve = 64
tx = 64
[owner]
users = [65534]
"""

KERNEL_POLICY = """
version = 1
[[lane]]
name = "all"
end = "kernel"
[[service]]
name = "app"
ports = [8001]
  [[service.rule]]
  action = "lane"
  lane = "all"
"""

# An application as an ordinary user: says what it gets, line by line.
APPLICATION = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
from userspace.datagram.owned_lanes import open_owned
from xdp.errors import SluiceError
path, wait = sys.argv[1], float(sys.argv[2])
while True:
    try:
        with open_owned(path, wait=wait) as lanes:
            print("open", lanes.mode, lanes.owner.policy.peers[0].name, flush=True)
            while True:
                with lanes.receive(timeout=60) as batch:
                    print("got", *(batch[i].tobytes().decode() for i in range(len(batch))), flush=True)
    except SluiceError as error:
        print(type(error).__name__, error, flush=True)
        if wait <= 0 or type(error).__name__ != "InterfaceGoneError":
            break
"""

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, seconds: float = SECONDS) -> T:
    """Ask again and again until the answer is true."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)
    return answer


# What processes say; not as their ``stdout``, which has to be closed by somebody.
_said: weakref.WeakKeyDictionary[subprocess.Popen[bytes], int] = weakref.WeakKeyDictionary()


def start(host: Host, words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a process on a host, to be listened to by `read_line`."""
    reading, writing = os.pipe()
    try:
        process = host.popen(words, env=ENVIRONMENT, stdout=writing)
    finally:
        os.close(writing)
    _said[process] = reading
    weakref.finalize(process, os.close, reading)
    return process


def read_line(process: subprocess.Popen[bytes], seconds: float = SECONDS) -> str:
    """The next line that a process prints; "" at its end."""
    line = b""
    deadline = time.monotonic() + seconds
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        assert left > 0, f"nothing said within {seconds} s; {line!r} so far"
        if select.select([_said[process]], [], [], left)[0]:
            # One at a time: what follows the line stays for the next call.
            byte = os.read(_said[process], 1)
            if not byte:
                return line.decode()
            line += byte
    return line.decode().rstrip("\n")


def expect(process: subprocess.Popen[bytes], start: str) -> str:
    """The next line, which begins so."""
    line = read_line(process)
    assert line.startswith(start), f"{line!r}, not {start!r}"
    return line


def command(*words: str) -> list[str]:
    """The command line of this checkout."""
    return [sys.executable, "-m", "sluice_cli", *words]


class Up:
    """`sluice up` on the lab's server, ready."""

    def __init__(self, lab: Lab, folder: Path, policy: str = POLICY, *options: str) -> None:
        self.lab = lab
        self.policy = folder / "policy.toml"
        self.policy.write_text(policy, encoding="utf-8")
        self.process = start(
            lab.server, command("up", lab.server.interface, str(self.policy), "--json", *options)
        )
        self.ready = self.event()
        while self.ready.get("event") == "note":  # of what a killed owner had left
            self.ready = self.event()
        self.socket = self.ready.get("socket", "")

    def event(self) -> Any:
        """The next line that it says."""
        line = read_line(self.process)
        assert line, "sluice up has ended"
        return json.loads(line)

    def wait_for(self, text: str) -> str:
        """Read events up to one with this text."""
        while text not in (said := str(self.event().get("text"))):
            pass
        return said

    def application(self, *, wait: float = 0.0) -> subprocess.Popen[bytes]:
        """An application as user nobody; says "open", or why not."""
        return application(self.lab.server, self.socket, wait)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it as a service manager does; its exit code."""
        self.process.terminate()
        return self.process.wait(SECONDS)


def application(host: Host, path: str, wait: float = 0.0) -> subprocess.Popen[bytes]:
    """See `Up.application`."""
    return start(host, readable_python("-c", APPLICATION, path, str(wait)))


def sender(lab: Lab) -> socket.socket:
    """A socket of the client, connected to the service."""
    with lab.client.enter():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((str(lab.server.ipv4), PORT))
    return sock


def kernel_socket(lab: Lab) -> socket.socket:
    """A socket of the server, for what the program passes."""
    with lab.server.enter():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((str(lab.server.ipv4), PORT))
    sock.settimeout(SECONDS)
    return sock


def program_of(lab: Lab) -> tuple[int, str] | None:
    """What is on the server's interface: program id and mode."""
    with lab.server.enter():
        return attached_program(lab.server.ifindex)


def left_behind(lab: Lab) -> list[str]:
    """Files of the server's namespace in /run/sluice, and its pins."""
    inode = lab.server.path.stat().st_ino
    found = [path.name for path in Path("/run/sluice").glob(f"*{inode}-*")]
    return sorted(found + [str(path) for path in PIN_ROOT.glob(f"{inode}-*")])


def descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def end(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGKILL) -> None:
    """End a process that the lab started."""
    process.send_signal(number)
    process.wait(SECONDS)

# SPDX-License-Identifier: Apache-2.0
"""The portable backend where there is no Linux: its tests, in a process that hides what only Linux has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xdp.elsewhere import Library, declare, refuse_on_linux
from xdp.errors import UnsupportedError

ROOT = Path(__file__).resolve().parents[2]

#: Receiving, sending and columns through the calls that all backends have.
TESTS = ("test_mmsg_portable.py", "test_mmsg_portable_send.py", "test_fanout.py")

#: An application as it would be written on any system.
APPLICATION = """
import asyncio, socket, sys
import tests.unit.elsewhere
from userspace.datagram.aio import AsyncLanes
from userspace.datagram.batch_manager import UDPBatchManager
from userspace.datagram.lanes import open_lanes
from tests.unit.socket_backends import free_port, make_policy
from xdp.errors import UnsupportedError, UsageError

port = free_port()
with open_lanes(make_policy(port)) as lanes, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    print(lanes.mode, [refused["mode"] for refused in lanes.status()["refused"]])
    client.bind(("127.0.0.1", 0))
    client.settimeout(10)
    client.sendto(b"V question", ("127.0.0.1", port))
    with lanes.receive(timeout=10) as batch:
        batch[0][2:10] = b"answered"
        print(lanes.send_back(batch), client.recv(100))
    client.sendto(b"V again", ("127.0.0.1", port))

    async def one() -> bytes:
        async for batch in AsyncLanes(lanes):
            return bytes(batch[0])
        return b""

    print(asyncio.run(one()))
    with UDPBatchManager(lanes) as manager:
        manager.queue_packet(client.getsockname(), b"batched")
        manager.flush_batches()
        print(client.recv(100))
try:
    open_lanes(make_policy(port), interface="en0", mode="native")
except UnsupportedError as error:
    print(error)
print("bcc" in sys.modules or "pyroute2" in sys.modules)
"""


def test_the_backend_passes_its_tests() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.unit.elsewhere", "-p", "no:cacheprovider"]
    command += ["-q", "--noconftest", "-W", "error::ResourceWarning"]
    command += [str(ROOT / "tests/unit" / name) for name in TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_an_application() -> None:
    done = subprocess.run(
        [sys.executable, "-c", APPLICATION], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    mode, answer, waited, batched, refused, linux = done.stdout.splitlines()
    assert mode == "portable ['mmsg']"
    assert answer == "1 b'V answered'"
    assert waited == "b'V again'"
    assert batched == "b'batched'"
    assert refused == "XDP needs Linux"
    assert linux == "False"


def test_what_stands_in_is_for_other_systems() -> None:
    with pytest.raises(ImportError, match=r"not built: run python build\.py"):
        refuse_on_linux("a.module", "build.py")


def test_functions_refuse_and_constants_are_there() -> None:
    declared = declare("#define SEVEN 7\nenum two { NONE, ONE }; int of_c(int);")
    library = Library(declared, {"of_python": lambda number: number + 1})
    assert (library.SEVEN, library.ONE, library.of_python(1)) == (7, 1, 2)
    with pytest.raises(UnsupportedError, match="of_c needs Linux"):
        library.of_c(1)

# SPDX-License-Identifier: Apache-2.0
"""Every example in Python: the pages' blocks, in order, and docs/examples as a user runs them."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.documents import DOCUMENTS, ROOT, Block, blocks
from tests.ordinary_user import nobodys_python, readable_root
from tests.traffic.documented import (
    PORT,
    SECONDS,
    SOURCE_PORTS,
    Machine,
    code_blocks,
    interrupt,
    is_idle,
    machine,
    read_until,
    traffic,
    until,
)

pytestmark = [pytest.mark.root, pytest.mark.bpf]

API = code_blocks("docs/api.md", "python")
README_POLICY = code_blocks("README.md", "toml")[0].text + '\n[owner]\nusers = ["nobody"]\n'
#: In api.md; the test has a folder of its own.
SOCKET = "/run/sluice-eth1.sock"


@pytest.fixture
def readers() -> Iterator[Machine]:
    """In a folder that an ordinary user may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        with machine(folder, README_POLICY) as made:
            yield made


def test_no_example_is_left_out() -> None:
    """A new document or example needs a test that runs it."""
    found = {
        str(path.relative_to(ROOT)) for path in DOCUMENTS for one in blocks(path) if one.language == "python"
    }
    elsewhere = {"docs/connections.md"}  # tests/unit/test_connection_*.py run its blocks
    assert found == {"README.md", "docs/api.md", "docs/flow.md", "docs/performance.md"} | elsewhere
    assert len(code_blocks("README.md", "python")) == len(code_blocks("docs/performance.md", "python")) == 1
    examples = {path.name for path in (ROOT / "docs" / "examples").glob("*.py")}
    assert examples == {"asyncio_echo.py", "busy_thread.py", "owner_client.py", "receive.py", "workers.py"}


def test_flow(readers: Machine, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """docs/flow.md, in order: a batch manager, a peer that is held, and a door that holds it."""
    process = readers.start(["sluice", "up", "eth1", "policy.toml"])
    read_until(process, "serving")
    names: dict[str, Any] = {"__name__": "documented"}
    with readers.lab.server.enter():
        for block in code_blocks("docs/flow.md", "python"):
            if "userspace.simulation" in block.text:  # tests/unit/test_simulation_network.py runs that one
                continue
            exec(_compiled(block, tmp_path), names)
        said = capsys.readouterr().out
        assert re.search(
            r"IPv4Address\('10\.81\.0\.2'\): Held\(packets_per_second=500, burst=50, seconds=2\d", said
        )
        assert "PeerCounts(packets=0, bytes=0, drops=0)" in said
        first = "10 arrived, [] lost; round trip 0.04\n10 sent, 2 wait\n10 acknowledged, 2 more sent\n"
        assert said.startswith(first)
        door, peers = names["Door"](patience=0), ["10.81.0.2", "192.0.2.7"]
        with names["PeerHolds"].open(names["inventory"].find("eth1").map) as holds:
            names["look"](door, holds, peers, 1.0, 10)
            readers.send(50)
            until(lambda: holds.counts(peers)[IPv4Address("10.81.0.2")].packets == 50, "all counted")
            until(lambda: names["look"](door, holds, peers, 1.0, 10) or door.held, "a look that counts")
            assert [*holds.held()] == [*door.held] == [IPv4Address("10.81.0.2")]
            names["look"](door, holds, peers[1:], 1.0, 10)
            assert holds.held() == door.held == {}
    assert interrupt(process)[0] == 0


class TestApi:
    """docs/api.md, block by block in one namespace; what a block should have done is checked after it."""

    def test_all_in_order(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {"__name__": "documented"}
        done = set()
        with ExitStack() as cleanup:
            here = cleanup.enter_context(machine(tmp_path, code_blocks("docs/api.md", "toml")[0].text))
            clients = cleanup.enter_context(traffic(here.lab))
            cleanup.callback(lambda: names["lanes"].close() if "lanes" in names else None)
            for block in API:
                served = _serve(here, block)
                with here.lab.server.enter():
                    exec(_compiled(block, tmp_path), names)
                if served is not None:
                    assert interrupt(served)[0] == 0
                said = capsys.readouterr().out
                for mark, check in self.CHECKS.items():
                    if mark in block.text:
                        check(names, said)
                        done.add(mark)
            assert done == set(self.CHECKS)
            assert not here.carries_program()
            got = [_all(sock) for sock in clients]
            frames = [b"frame 0", b"frame 1", b"frame 2", b"a header, a body"]
            sent = [b"one", b"two", bytes(1472), b"a shred", *frames, b"a vote"]
            answers = (b"DONE", b"PASS", b"SEEN", b"ECHO")
            assert [one for one in got[0] if not one.startswith(answers)] == sent
            assert names["there"].payload_maximum == 1472
            counts = (names["answered"], names["forwarded"], names["seen"], names["served"].sent)
            for answer, count in zip(answers, counts, strict=True):
                sent_back = sum(one.startswith(answer) for found in got for one in found)
                assert 0 < sent_back <= count, "those over IPv6 arrive elsewhere"

    @staticmethod
    def _opened(names: dict[str, Any], said: str) -> None:
        assert said == "native-copy\n"

    @staticmethod
    def _refused(_names: dict[str, Any], said: str) -> None:
        assert re.fullmatch(r"native-zero-copy - .*no zero-copy.*\n", said)

    @staticmethod
    def _received(_names: dict[str, Any], said: str) -> None:
        lines = said.splitlines()
        assert lines
        assert lines == sorted(lines, key=lambda line: line[0]), "highest lane first"
        assert all(re.match(r"[01] b[\"']VOTE", line) for line in lines)

    @staticmethod
    def _counted(names: dict[str, Any], _said: str) -> None:
        assert names["received"] >= 100

    @staticmethod
    def _seen(names: dict[str, Any], _said: str) -> None:
        assert names["seen"] >= 50

    @staticmethod
    def _served(names: dict[str, Any], said: str) -> None:
        assert said == f"{names['served'].received} received, {names['served'].sent} sent\n"
        assert names["served"].received == names["served"].given > 0
        assert names["lanes"].closed

    @staticmethod
    def _gathered(names: dict[str, Any], said: str) -> None:
        assert names["port"] in SOURCE_PORTS
        assert names["address"] in {IPv4Address("10.81.0.2"), IPv6Address("fd81::2")}
        assert 0 < names["age"] < 60e9
        assert int(said.rsplit(": ", 1)[1]) > 0

    @staticmethod
    def _copied(names: dict[str, Any], said: str) -> None:
        assert said == "operation forbidden on released memoryview object\n"
        assert names["kept"].startswith(b"VOTE")

    @staticmethod
    def _held(names: dict[str, Any], said: str) -> None:
        assert said.startswith("packet 0 of this batch is still in use")
        assert names["batch"].released

    @staticmethod
    def _sent(names: dict[str, Any], _said: str) -> None:
        assert names["sent"] in {2, 3}

    @staticmethod
    def _written(names: dict[str, Any], said: str) -> None:
        assert said == "3 sent, 0 left\n"
        assert names["zero"].statistics().held == 0

    @staticmethod
    def _forwarded(names: dict[str, Any], said: str) -> None:
        assert names["forwarded"] > 0
        assert names["pieces"] == 1
        assert re.fullmatch(r"b'VOTE' from lane [01]\n", said)

    @staticmethod
    def _batched(names: dict[str, Any], said: str) -> None:
        assert re.fullmatch(r"[1-9]\d* received\n2 sent, [12]\.0 in a batch\n", said)
        assert names["totals"].waiting == 0

    @staticmethod
    def _answered(names: dict[str, Any], _said: str) -> None:
        assert names["answered"] > 0

    @staticmethod
    def _looked(names: dict[str, Any], said: str) -> None:
        assert int(said.split(maxsplit=1)[0]) == names["lane"].received > 0

    @staticmethod
    def _split(names: dict[str, Any], _said: str) -> None:
        assert names["totals"].keys() == {(queue,) for queue in range(len(names["threads"]))}
        assert any(names["totals"].values())
        assert names["lanes"].closed

    @staticmethod
    def _owned(_names: dict[str, Any], said: str) -> None:
        mode, count = said.split()
        assert mode == "native-copy"
        assert int(count) > 0

    @staticmethod
    def _explained(_names: dict[str, Any], said: str) -> None:
        assert said.startswith("there is no interface 'eth7' here (")

    @staticmethod
    def _controlled(names: dict[str, Any], said: str) -> None:
        first, second, held, third = said.splitlines()
        assert first.split()[0] == "2"
        assert re.match(r"\d+ {", second)
        assert re.match(r"{IPv4Address\('10\.81\.0\.2'\): Held\(packets_per_second=500, burst=50, ", held)
        assert third == "steer votes"
        assert names["link"].fd == -1

    #: By some text that only the block has.
    CHECKS: ClassVar[dict[str, Callable[[dict[str, Any], str], None]]] = {
        "print(lanes.mode)": _opened,
        'lanes.status()["refused"]': _refused,
        "print(lane, bytes(payload))": _received,
        "count(lanes, 100)": _counted,
        "batch.gather": _gathered,
        "kept = bytes(view)": _copied,
        "except BufferError": _held,
        "lanes.send(": _sent,
        "ZeroCopyUDP(lanes, port=8005)": _written,
        "zero.forward(": _forwarded,
        "UDPBatchManager(lanes": _batched,
        "lanes.send_back(batch)": _answered,
        '.lane("votes")': _looked,
        "lanes.split()": _split,
        "answer(lanes, 50)": _seen,
        "open_endpoint(Echo": _served,
        "open_lanes(owner=": _owned,
        'interface="eth7"': _explained,
        "program.test_run": _controlled,
    }


def _all(sock: socket.socket) -> list[bytes]:
    """What has arrived."""
    sock.setblocking(False)
    found = []
    while True:
        try:
            found.append(sock.recv(2048))
        except BlockingIOError:
            return found


def _serve(here: Machine, block: Block) -> subprocess.Popen[bytes] | None:
    if SOCKET not in block.text:
        return None
    process = here.start(["sluice", "up", "eth1", "policy.toml", "--socket", str(here.folder / "lanes.sock")])
    read_until(process, "serving")
    return process


def _compiled(block: Block, folder: Path) -> Any:
    return compile(block.text.replace(SOCKET, str(folder / "lanes.sock")), str(block), "exec")


def test_readme(readers: Machine) -> None:
    """The loop of the front page: it takes what comes, and leaves nothing behind."""
    process = readers.start(["python", "-c", code_blocks("README.md", "python")[0].text])
    until(readers.carries_program, "the program on the interface")
    until(lambda: _steered(readers), "sockets in the lanes")
    readers.send(100)
    until(lambda: is_idle(process), "all read")
    code, said = interrupt(process)
    assert "KeyboardInterrupt" in said
    assert code != 0
    assert not readers.carries_program()


def test_performance(tmp_path: Path) -> None:
    """The formula on the page is the code's."""
    with machine(tmp_path, README_POLICY) as here:
        process = here.start(["python", "-c", code_blocks("docs/performance.md", "python")[0].text])
        out, errors = process.communicate()
        assert not errors
        lane, reserve, transmit, frame = 4096 + 4096, 1024, 2048, 2048
        assert int(out) == frame * (2 * lane + reserve + 2 * transmit)
        process = here.start(["python", "docs/examples/receive.py", "eth1", "policy.toml"])
        status = ast.literal_eval(read_until(process, r"}\n"))
        assert status["memory_bytes"] == int(out) * len(status["queues"])
        interrupt(process)


class TestExamples:
    def test_receive(self, readers: Machine) -> None:
        """All that is sent is counted under its lane."""
        process = readers.start(["python", "docs/examples/receive.py", "eth1", "policy.toml"])
        status = ast.literal_eval(read_until(process, r"}\n"))
        assert status["mode"] == "native-copy"
        _exchange(readers, process)
        assert not readers.carries_program()

    def test_asyncio_echo(self, readers: Machine) -> None:
        process = readers.start(["python", "docs/examples/asyncio_echo.py", "eth1", "policy.toml"])
        status = ast.literal_eval(read_until(process, r"}\n"))
        assert status["mode"] == "native-copy"
        with readers.lab.client.enter():
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with client:
            client.settimeout(SECONDS)
            for number in range(20):
                client.sendto(b"VOTE %d" % number, (str(readers.lab.server.ipv4), PORT))
                assert client.recv(100) == b"VOTE %d" % number
        assert interrupt(process) == (0, "20 answered\n")
        assert not readers.carries_program()

    def test_workers(self, readers: Machine) -> None:
        process = readers.start(["python", "docs/examples/workers.py", "policy.toml", "2"])
        assert read_until(process, r"\n") == "2 workers\n"
        with readers.lab.client.enter():
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with client:
            client.settimeout(SECONDS)
            for number in range(20):
                client.sendto(b"VOTE %d" % number, (str(readers.lab.server.ipv4), PORT))
                assert client.recv(100) == b"VOTE %d" % number
        assert interrupt(process) == (0, "{'votes': 20, 'bulk': 0}\n")

    def test_owner_client(self, readers: Machine) -> None:
        """As an ordinary user."""
        up = readers.start(["sluice", "up", "eth1", "policy.toml"])
        read_until(up, "serving")
        process = readers.start(
            nobodys_python(str(readable_root() / "docs/examples/owner_client.py"), "eth1")
        )
        assert ast.literal_eval(read_until(process, r"}\n"))["mode"] == "native-copy"
        _exchange(readers, process)
        assert readers.carries_program(), "the owner's"
        assert interrupt(up)[0] == 0
        assert not readers.carries_program()

    def test_owner_client_waits_for_the_interface(self, readers: Machine) -> None:
        up = readers.start(["sluice", "up", "eth1", "policy.toml"])
        read_until(up, "serving")
        process = readers.start(["python", "docs/examples/owner_client.py", "eth1"])
        read_until(process, r"}\n")
        server, client = readers.lab.hosts
        server.run(["ip", "link", "delete", "eth1"])
        read_until(process, r"is gone\n")
        peer = ["peer", "name", client.interface, "netns", client.namespace]
        server.run(["ip", "link", "add", "eth1", "type", "veth", *peer])
        server.run(["ip", "link", "set", "eth1", "up"])
        assert ast.literal_eval(read_until(process, r"}\n"))["interface"] == "eth1"
        assert interrupt(process) == (0, "{}\n")
        assert interrupt(up)[0] == 0

    def test_busy_thread(self, readers: Machine) -> None:
        process = readers.start(["python", "docs/examples/busy_thread.py"])
        out, errors = process.communicate()
        assert not errors
        figures = re.findall(
            r"^(\w+) call: ([\d.]+) µs alone, ([\d.]+) µs beside a busy thread$", out.decode(), re.MULTILINE
        )
        assert [name for name, _, _ in figures] == ["short", "longer"]
        assert all(float(beside) > float(alone) > 0 for _, alone, beside in figures)


def _steered(here: Machine) -> int:
    """Packets that the program gave to sockets; asks by sending one."""
    here.send(1)
    return here.counters().steered


def _exchange(here: Machine, process: subprocess.Popen[bytes]) -> None:
    """Send to both lanes, and see the example count it."""
    before = here.counters().steered
    for _ in range(5):
        here.send(50)
        until(lambda: is_idle(process), "all read")
    here.send_from_stranger()
    until(lambda: here.counters().steered == before + 251, "all steered")
    until(lambda: is_idle(process), "all read")
    code, said = interrupt(process)
    assert code == 0
    assert ast.literal_eval(said) == {"votes": 250, "bulk": 1}

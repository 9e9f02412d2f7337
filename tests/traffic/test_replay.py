# SPDX-License-Identifier: Apache-2.0
"""Replay: what is in the capture arrives in the lab, and nowhere else."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sluice_cli.lab import Lab, remove
from sluice_cli.main import main
from sluice_cli.pcap import Capture, CaptureError
from sluice_cli.replay import Sender, parse_pace, parse_ports, parse_target, replay_capture
from sluice_cli.traffic import udp_frame
from xdp.errors import NotLoadedError, SluiceError, UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 10.0  # deadline for what takes milliseconds
SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python has no name for it
HERE = SimpleNamespace(
    mac="02:00:00:00:00:01", ipv4=IPv4Address("192.0.2.1"), ipv6=IPv6Address("2001:db8::1")
)
THERE = SimpleNamespace(
    mac="02:00:00:00:00:02", ipv4=IPv4Address("192.0.2.2"), ipv6=IPv6Address("2001:db8::2")
)


def write_capture(path: Path, packets: list[tuple[float, bytes]]) -> Path:
    out = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    for when, data in packets:
        out += struct.pack("<IIII", int(when), round(when % 1 * 1e6), len(data), len(data)) + data
    path.write_bytes(out)
    return path


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """Three datagrams to ports 53, 8001 and 53 within 20 ms, and an ARP-like frame."""
    packets = [
        (1.0, udp_frame(HERE, THERE, 53, b"one", source_port=1111)),
        (1.01, udp_frame(HERE, THERE, 8001, b"two", version=6, source_port=2222)),
        (1.01, bytes(60)),
        (1.02, udp_frame(HERE, THERE, 53, b"three", source_port=1111)),
    ]
    return write_capture(tmp_path / "some.pcap", packets)


def listen(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    if os.geteuid() == 0:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
    sock.bind((address, port))
    sock.settimeout(SECONDS)
    return sock


def start(capture: Path, to: str, *words: str, **options: Any) -> subprocess.Popen[Any]:
    """`sluice replay` as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
    command = [sys.executable, "-m", "sluice_cli", "replay", str(capture), "--to", to, *words]
    return subprocess.Popen(command, env=environment, **options)


@pytest.fixture
def sink() -> Iterator[socket.socket]:
    with listen("127.0.0.1", 0) as sock:
        yield sock


@pytest.fixture
def up_lab() -> Iterator[str]:
    name = f"test-{secrets.token_hex(3)}"
    Lab(name, persistent=True).up()
    yield name
    remove(name)


class TestSend:
    def test_in_order_and_counted(self, capture: Path, sink: socket.socket) -> None:
        address = ip_address("127.0.0.1")
        with Sender(address, sink.getsockname()[1]) as sender:
            summary = replay_capture(Capture(capture), sender, pace="flat")
        assert [sink.recv(100) for _ in range(3)] == [b"one", b"two", b"three"]
        assert (summary.read, summary.sent, summary.bytes, summary.passes) == (4, 3, 11, 1)
        assert summary.skipped == {"not_ip": 1}
        assert summary.read == summary.sent + sum(summary.skipped.values())

    @pytest.mark.parametrize(("count", "passes"), [(1, 0), (3, 0), (4, 1), (10, 3)])
    def test_loop_and_count(self, capture: Path, sink: socket.socket, count: int, passes: int) -> None:
        with Sender(ip_address("127.0.0.1"), sink.getsockname()[1]) as sender:
            summary = replay_capture(Capture(capture), sender, pace="flat", count=count, loop=True)
        assert [sink.recv(100) for _ in range(count)] == ([b"one", b"two", b"three"] * 4)[:count]
        assert (summary.sent, summary.passes) == (count, passes)
        assert summary.read == summary.sent + sum(summary.skipped.values())

    def test_a_capture_without_datagrams_does_not_loop_forever(self, tmp_path: Path) -> None:
        empty = write_capture(tmp_path / "arp.pcap", [(0, bytes(60))])
        with Sender(ip_address("127.0.0.1")) as sender:
            summary = replay_capture(Capture(empty), sender, loop=True)
        assert (summary.sent, summary.passes, summary.read) == (0, 1, 1)

    def test_source_ports_are_kept(self, tmp_path: Path, sink: socket.socket) -> None:
        frames = [udp_frame(HERE, THERE, 53, b"x", source_port=20_000 + i % 300) for i in range(600)]
        many = write_capture(tmp_path / "many.pcap", [(0, frame) for frame in frames])
        with Sender(ip_address("127.0.0.1"), sink.getsockname()[1], keep_source_port=True) as sender:
            summary = replay_capture(Capture(many), sender, pace="flat")
            assert summary.skipped == {}
            found = Counter(sink.recvfrom(100)[1][1] for _ in range(600))
        assert found == {20_000 + i: 2 for i in range(300)}

    def test_a_taken_source_port_is_a_reason(self, tmp_path: Path, sink: socket.socket) -> None:
        port = sink.getsockname()[1]
        one = write_capture(tmp_path / "one.pcap", [(0, udp_frame(HERE, THERE, 53, b"x", source_port=port))])
        with Sender(ip_address("127.0.0.1"), port, keep_source_port=True) as sender:
            assert replay_capture(Capture(one), sender).skipped == {"port_in_use": 1}

    def test_port_zero_is_a_reason(self, tmp_path: Path) -> None:
        one = write_capture(tmp_path / "one.pcap", [(0, udp_frame(HERE, THERE, 0, b"x"))])
        with Sender(ip_address("127.0.0.1")) as sender:
            assert replay_capture(Capture(one), sender).skipped == {"port_zero": 1}

    def test_original_pace_waits_as_the_capture_did(self, tmp_path: Path, sink: socket.socket) -> None:
        """Never early, by the receiver's clock; how late depends on the machine."""
        times = [5.0, 5.05, 5.02, 5.12]  # the third goes back in time: it follows at once
        frames = [(when, udp_frame(HERE, THERE, 53, b"x")) for when in times]
        paced = write_capture(tmp_path / "paced.pcap", frames)
        began = time.monotonic()
        with Sender(ip_address("127.0.0.1"), sink.getsockname()[1]) as sender:
            summary = replay_capture(Capture(paced), sender)
        assert summary.sent == 4
        assert time.monotonic() - began >= 0.05 + 0.10 - 0.001
        assert summary.seconds >= 0.15 - 0.001

    def test_rate(self, capture: Path, sink: socket.socket) -> None:
        with Sender(ip_address("127.0.0.1"), sink.getsockname()[1]) as sender:
            summary = replay_capture(Capture(capture), sender, pace=100.0, count=11, loop=True)
        assert summary.sent == 11
        assert summary.seconds >= 0.1 - 0.001

    def test_damage_is_an_error_after_what_came_before(self, capture: Path, sink: socket.socket) -> None:
        capture.write_bytes(capture.read_bytes()[:-1])
        with Sender(ip_address("127.0.0.1"), sink.getsockname()[1]) as sender, pytest.raises(CaptureError):
            replay_capture(Capture(capture), sender, pace="flat")
        assert [sink.recv(100) for _ in range(2)] == [b"one", b"two"]


class TestArguments:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("10.81.0.1", (IPv4Address("10.81.0.1"), None)),
            ("10.81.0.1:8001", (IPv4Address("10.81.0.1"), 8001)),
            ("fd81::1", (IPv6Address("fd81::1"), None)),
            ("[fd81::1]", (IPv6Address("fd81::1"), None)),
            ("[fd81::1]:65535", (IPv6Address("fd81::1"), 65535)),
            ("[fe80::1%cli0]:1", (IPv6Address("fe80::1%cli0"), 1)),
        ],
    )
    def test_targets(self, text: str, expected: object) -> None:
        assert parse_target(text) == expected

    @pytest.mark.parametrize(
        "text",
        ["", "host", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0", "[fd81::1]:x", ":53", "1:2:3"],
    )
    def test_no_targets(self, text: str) -> None:
        with pytest.raises(UsageError, match="--to"):
            parse_target(text)

    def test_paces(self) -> None:
        assert parse_pace("original") == "original"
        assert parse_pace("flat") == "flat"
        assert parse_pace("20k") == 20_000
        assert parse_pace("1.5M") == 1_500_000
        for text in ("", "fast", "0", "-1", "1e9", "nan", "inf", "2G", "9" * 400):
            with pytest.raises(UsageError, match="--pace"):
                parse_pace(text)

    def test_maps(self) -> None:
        assert parse_ports(("1=2", "3=4")) == {1: 2, 3: 4}
        for words in (("1",), ("1=0",), ("0=1",), ("1=65536",), ("a=b",), ("1=2", "1=3"), ("1=2=3",)):
            with pytest.raises(UsageError, match="--map"):
                parse_ports(words)


class TestCommand:
    def test_json_summary(
        self, capture: Path, sink: socket.socket, capsys: pytest.CaptureFixture[str]
    ) -> None:
        to = f"127.0.0.1:{sink.getsockname()[1]}"
        assert main(["replay", str(capture), "--to", to, "--pace", "flat", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document.pop("seconds") >= 0
        assert document == {
            "version": 1, "file": str(capture), "to": to, "read": 4, "sent": 3, "bytes": 11, "passes": 1,
            "interrupted": False, "skipped": {"not_ip": 1},
        }  # fmt: skip
        assert main(["replay", str(capture), "--to", to]) == 0
        assert "skipped 1: not_ip" in capsys.readouterr().out

    @pytest.mark.parametrize("to", ["192.0.2.1:53", "10.81.0.1", "2001:db8::1", "0.0.0.0:1", "[ff02::1]:1"])
    def test_strangers_are_refused(self, capture: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["replay", str(capture), "--to", to]) == UsageError.exit_code
        assert "--allow-any" in capsys.readouterr().err

    def test_errors(self, capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["replay", str(tmp_path / "no"), "--to", "127.0.0.1:9"]) == CaptureError.exit_code
        assert main(["replay", str(capture), "--to", "127.0.0.1:9", "--map", "1=2"]) == UsageError.exit_code
        arp = write_capture(tmp_path / "arp.pcap", [(0, bytes(60))])
        assert main(["replay", str(arp), "--to", "127.0.0.1:9"]) == SluiceError.exit_code
        assert "nothing was sent" in capsys.readouterr().err

    @pytest.mark.root
    def test_no_such_lab(self, capture: Path) -> None:
        words = ["replay", str(capture), "--to", "10.81.0.1", "--lab", "no-such-lab"]
        assert main(words) == NotLoadedError.exit_code

    @pytest.mark.root
    @pytest.mark.parametrize("version", [4, 6])
    def test_into_a_lab_with_ports_mapped(self, up_lab: str, capture: Path, version: int) -> None:
        with Lab.open(up_lab) as lab:
            address = str(lab.server.ipv4 if version == 4 else lab.server.ipv6)
            source = str(lab.client.ipv4 if version == 4 else lab.client.ipv6)
            with lab.server.enter():
                mapped, kept = listen(address, 5353), listen(address, 8001)
        with mapped, kept:
            words = [
                "replay",
                str(capture),
                "--lab",
                up_lab,
                "--to",
                address,
                "--map",
                "53=5353",
                "--pace",
                "flat",
            ]
            assert main([*words, "--source-port", "keep"]) == 0
            received = [mapped.recvfrom(100) for _ in range(2)]
            assert [payload for payload, _ in received] == [b"one", b"three"]
            assert {sender[:2] for _, sender in received} == {(source, 1111)}
            payload, sender = kept.recvfrom(100)
            assert (payload, sender[:2]) == (b"two", (source, 2222))

    @pytest.mark.root
    def test_to_a_link_local_address(self, up_lab: str, capture: Path) -> None:
        with Lab.open(up_lab) as lab:
            with lab.server.enter():
                sock = listen("::", 8001)
            to = f"[{lab.server.link_local}%cli0]:8001"
        with sock:
            assert main(["replay", str(capture), "--lab", up_lab, "--to", to, "--pace", "flat"]) == 0
            assert sock.recv(100) == b"one"

    @pytest.mark.root
    def test_inside_a_labs_shell(
        self, up_lab: str, capture: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """There the network is the lab's, so its addresses need no permission; others have no route."""
        with Lab.open(up_lab) as lab, lab.client.enter():
            assert main(["replay", str(capture), "--to", "10.81.0.1:9", "--pace", "flat"]) == 0
            assert main(["replay", str(capture), "--to", "192.0.2.1:9", "--pace", "flat"]) != 0
        assert "Network is unreachable" in capsys.readouterr().err

    def test_ctrl_c_shows_the_summary(self, capture: Path, sink: socket.socket) -> None:
        to = f"127.0.0.1:{sink.getsockname()[1]}"
        words = ["--loop", "--pace", "1k", "--json"]
        child = start(capture, to, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert sink.recv(100) == b"one"
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=SECONDS)
        finally:
            child.kill()
            child.wait()
        document = json.loads(out)
        assert document["interrupted"] is True
        assert document["sent"] >= 1
        assert document["read"] == document["sent"] + sum(document["skipped"].values())
        sink.setblocking(False)
        for _ in range(document["sent"] - 1):  # the first was read above
            sink.recv(100)
        with pytest.raises(BlockingIOError):
            sink.recv(100)
        assert child.returncode == 130
        assert "Traceback" not in err

    def test_progress_on_a_terminal(self, capture: Path, sink: socket.socket) -> None:
        to = f"127.0.0.1:{sink.getsockname()[1]}"
        master, slave = os.openpty()
        words = ["--loop", "--count", "100", "--pace", "100"]
        child = start(capture, to, *words, stdout=subprocess.DEVNULL, stderr=slave)
        os.close(slave)
        seen = b""
        try:
            while select.select([master], [], [], SECONDS)[0] and b" sent, " not in seen:
                seen += os.read(master, 4096)
        finally:
            child.kill()
            child.wait()
            os.close(master)
        assert b"\r" in seen
        assert b" sent, " in seen


@pytest.mark.root
def test_the_real_capture_byte_for_byte(vectors: Path, up_lab: str) -> None:
    file = vectors / "demo-shreds.pcap"
    expected = [datagram.payload for datagram in Capture(file)]
    with Lab.open(up_lab) as lab, lab.server.enter():
        sock = listen("10.81.0.1", 8001)
    with sock:
        assert main(["replay", str(file), "--lab", up_lab, "--to", "10.81.0.1:8001", "--pace", "20k"]) == 0
        assert [sock.recv(2048) for _ in expected] == expected

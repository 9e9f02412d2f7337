# SPDX-License-Identifier: Apache-2.0
"""Where ``sluice bench`` measures: a lab, the steer program on the server, a generator on the client.

All paths run behind the same program with the same policy.  Where the path under
test has no AF_XDP socket, the program finds its slot empty and passes to the
kernel: so the kernel-socket rivals pay for the same classification.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sluice_cli.bench_reference import compile_reference
from sluice_cli.bench_worker import Arguments
from sluice_cli.generator import Generator, Stream
from sluice_cli.lab import Lab
from sluice_cli.traffic import Template, udp_frame
from xdp.errors import SluiceError
from xdp.link import Link, attach
from xdp.policy import Policy
from xdp.program import SteerProgram, load_bytecode
from xdp.tables import compile_policy

PORT: Final = 9000
HEARTBEAT_PORT: Final = 9001
#: Directions in which the path itself is what sends.
SENDING: Final = frozenset(("transmit", "fanout", "manager"))
_START_TIMEOUT: Final = 30.0  # seconds; Python, imports and sockets on a busy machine
#: Added to a run's length for the generator, which starts before and is stopped after.
_MARGIN: Final = 5.0

# r0 = XDP_DROP; exit.  Sits on the client, so that nothing of the machine's time goes into what
# becomes of packets that were sent there.
_DROP: Final = bytes.fromhex("b700000001000000 9500000000000000")


@dataclass(frozen=True)
class Sample:
    """One run of one path; CPU in ns for each packet."""

    packets_per_second: float
    process_cpu_ns: float
    machine_cpu_ns: float
    loss: float


def bench_policy(port: int) -> Policy:
    """One lane for everybody on ``port``; heartbeats are answered on another."""
    return Policy.parse(
        f"""
        version = 1
        [[lane]]
        name = "bench"
        [[service]]
        name = "bench"
        ports = [{port}]
        [[service.rule]]
        action = "lane"
        lane = "bench"
        [[service]]
        name = "heartbeat"
        ports = [{HEARTBEAT_PORT}]
        [[service.rule]]
        kind = "heartbeat"
        action = "reply"
        lane = "bench"
        """,
        "bench",
    )


def _busy_ticks() -> float:
    """Seconds of CPU time that this machine was not idle, all CPUs (proc(5), /proc/stat)."""
    fields = [
        int(value) for value in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    ]
    idle = fields[3] + fields[4]
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")


class Room:
    """The bench's lab; a context manager.

    Args:
        receiver_cpu: the process under test is pinned to it.
        generator_cpu: the generator, and with it the server's XDP program and the copy into frames.
    """

    def __init__(self, receiver_cpu: int, generator_cpu: int) -> None:
        self.receiver_cpu = receiver_cpu
        self.generator_cpu = generator_cpu
        self.policy = bench_policy(PORT)
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as cleanup:
            self._directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="sluice-bench-")))
            self.lab = cleanup.enter_context(Lab(static_neighbours=True))
            self.program = cleanup.enter_context(SteerProgram.load())
            self.program.swap(compile_policy(self.policy))
            with self.lab.server.enter():
                link = attach(self.program, self.lab.server.ifindex)
            cleanup.callback(link.close)
            self.generator = cleanup.enter_context(Generator(self.lab.client, cpu=self.generator_cpu))
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @contextlib.contextmanager
    def dropping_client(self) -> Iterator[Link]:
        """The client drops what arrives there, before its network stack."""
        self.lab.client.detach()
        try:
            program = _Drop()
            try:
                with self.lab.client.enter():
                    link = attach(program, self.lab.client.ifindex)
            finally:
                program.close()
            try:
                yield link
            finally:
                link.close()
        finally:
            self.lab.client.attach_pass()

    def frame(self, size: int, port: int = PORT) -> bytes:
        """A UDP frame from client to server with ``size`` bytes of payload."""
        return udp_frame(self.lab.client, self.lab.server, port, bytes(size))

    def measure(
        self,
        path: str,
        direction: str,
        *,
        size: int,
        batch: int,
        seconds: float,
        touch: bool = False,
        linger: float = 0.0,
    ) -> Sample:
        """Run one path once.  The generator runs flat out, unless the path itself is what sends."""
        with contextlib.ExitStack() as cleanup:
            if direction != "receive":
                cleanup.enter_context(self.dropping_client())
            process = self._start(
                path, direction, size=size, batch=batch, seconds=seconds, touch=touch, linger=linger
            )
            cleanup.callback(end, process)
            wait_ready(process, path)
            if direction not in SENDING:
                stream = Stream([Template(self.frame(size))])
                self.generator.start([stream], seconds + _MARGIN, pristine=True)
                cleanup.callback(self._stop_generator)
            busy = _busy_ticks()
            report = _read_report(process, path)
            busy = _busy_ticks() - busy
            return _sample(report, busy)

    def _stop_generator(self) -> None:
        self.generator.stop()
        self.generator.wait()

    def _start(
        self,
        path: str,
        direction: str,
        *,
        size: int,
        batch: int,
        seconds: float,
        touch: bool = False,
        linger: float = 0.0,
    ) -> subprocess.Popen[str]:
        host = self.lab.server
        xsks = self.program.maps["xsks"].info.id
        command: list[str]
        if path.endswith("-c"):
            family = "xsk" if path.startswith("xsk") else "mmsg"
            program = "transmit" if direction in SENDING else direction
            command = [str(compile_reference(f"{family}_{program}", self._directory))]
            command += [
                "--batch",
                str(batch),
                "--seconds",
                str(seconds),
                "--size",
                str(size),
                "--port",
                str(PORT),
            ]
            if family == "xsk":
                command += ["--interface", host.interface]
                if direction not in SENDING:
                    command += ["--map-id", str(xsks), "--map-index", "0"]
            elif direction == "fanout":
                command += ["--ports", str(batch)]
            if direction in SENDING:
                frame = self._directory / f"frame-{size}"
                frame.write_bytes(udp_frame(host, self.lab.client, PORT, bytes(size)))
                command += ["--frame", str(frame), "--address", str(self.lab.client.ipv4)]
            command += ["--touch"] if touch else []
            command += ["--offload"] if "offload" in path else []
        else:
            arguments = Arguments(
                path=path,
                direction=direction,
                interface=host.interface,
                map_id=0 if direction in SENDING else xsks,
                cookie=self.program.cookie,
                batch=batch,
                size=size,
                port=PORT,
                seconds=seconds,
                touch=touch,
                linger=linger,
                address=str(self.lab.client.ipv4),
            )
            command = [sys.executable, "-m", "sluice_cli.bench_worker", json.dumps(asdict(arguments))]
        pinned = ["taskset", "-c", str(self.receiver_cpu), *command]
        return host.popen(pinned, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def round_trips(self, port: int, *, size: int, seconds: float, interval_us: int) -> dict[str, Any]:
        """Ping from the client; what tools/bench/ping.c reports."""
        ping = compile_reference("ping", self._directory)
        command = [
            str(ping),
            "--address",
            str(self.lab.server.ipv4),
            "--port",
            str(port),
            "--size",
            str(size),
        ]
        command += ["--seconds", str(seconds), "--interval", str(interval_us)]
        pinned = ["taskset", "-c", str(self.generator_cpu), *command]
        process = self.lab.client.popen(pinned, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            wait_ready(process, "ping")
            return _read_report(process, "ping")
        finally:
            end(process)

    @contextlib.contextmanager
    def echoing(self, path: str, *, size: int, seconds: float) -> Iterator[None]:
        """An echo server of this kind on the bench's port."""
        process = self._start(path, "echo", size=size, batch=64, seconds=seconds)
        try:
            wait_ready(process, path)
            yield
        finally:
            end(process)


class _Drop:
    def __init__(self) -> None:
        self.fd = load_bytecode("sluice_drop", _DROP)

    def close(self) -> None:
        os.close(self.fd)


def _sample(report: dict[str, Any], busy: float) -> Sample:
    packets = report["packets"]
    if not packets or not report["seconds"]:
        raise SluiceError("a path received nothing", hint="run it again with --verbose")
    return Sample(
        packets_per_second=packets / report["seconds"],
        process_cpu_ns=report["process_cpu_ns"] / packets,
        machine_cpu_ns=busy * 1e9 / packets,
        loss=report["lost"] / (packets + report["lost"]),
    )


def wait_ready(process: subprocess.Popen[str], path: str) -> None:
    """Until the path under test could receive.  Raises SluiceError."""
    if _line(process, _START_TIMEOUT) != "ready":
        raise failed(process, path)


def _read_report(process: subprocess.Popen[str], path: str) -> dict[str, Any]:
    line = _line(process, _START_TIMEOUT * 2)
    try:
        report: dict[str, Any] = json.loads(line)
    except ValueError:
        raise failed(process, path) from None
    return report


def _line(process: subprocess.Popen[str], timeout: float) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 0.1)[0]:
            return process.stdout.readline().strip()
    return ""


def failed(process: subprocess.Popen[str], path: str) -> SluiceError:
    """What to raise for a process that did not do what it should; it is ended."""
    process.kill()
    _, said = process.communicate()
    lines: Sequence[str] = said.strip().splitlines()
    return SluiceError(f"the path {path} failed: {lines[-1] if lines else 'it said nothing'}", detail=said)


def end(process: subprocess.Popen[str]) -> None:
    """Ask it to end, and see to it that it does."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()

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
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from pyroute2.ethtool.ioctl import IoctlEthtool

from sluice_cli.bench_process import START_TIMEOUT, end, read_report, wait_ready
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

Mode = Literal["native", "generic"]

PORT: Final = 9000
HEARTBEAT_PORT: Final = 9001
#: Directions in which the path itself is what sends.
SENDING: Final = frozenset(("transmit", "fanout", "manager"))
#: Where the generator's packets come from; what is answered to it there is dropped.
_GENERATOR_PORT: Final = 40000
#: Added to a run's length for the generator, which starts before and is stopped after.
_MARGIN: Final = 5.0

# Instructions of linux/bpf.h, as (code, registers: source and destination, offset, immediate).
_EXIT: Final = (0x95, 0, 0, 0)
_DROP: Final = ((0xB7, 0, 0, 1), _EXIT)  # r0 = XDP_DROP
#: Drops UDP to _GENERATOR_PORT (IPv4 without options), passes all else.
_DROP_ANSWERS: Final = (
    (0x61, 0x12, 0, 0),  # r2 = data
    (0x61, 0x13, 4, 0),  # r3 = data_end
    (0xB7, 0x00, 0, 2),  # r0 = XDP_PASS
    (0xBF, 0x24, 0, 0),  # r4 = r2
    (0x07, 0x04, 0, 38),  # r4 += Ethernet, IPv4, both ports
    (0x2D, 0x34, 3, 0),  # if r4 > r3: exit
    (0x69, 0x25, 36, 0),  # r5 = destination port
    (0x55, 0x05, 1, int.from_bytes(_GENERATOR_PORT.to_bytes(2, "big"), sys.byteorder)),  # another: exit
    (0xB7, 0x00, 0, 1),  # r0 = XDP_DROP
    _EXIT,
)


@dataclass(frozen=True)
class Task:
    """What one path is to do.  ``size``: bytes of payload; ``linger``: seconds; ``mode``: of the program."""

    path: str
    direction: str
    size: int
    batch: int
    seconds: float
    touch: bool = False
    linger: float = 0.0
    mode: Mode = "native"
    lanes: int = 1


@dataclass(frozen=True)
class Sample:
    """One run of one path; CPU in ns for each packet, memory in KiB (0: it does not tell)."""

    packets_per_second: float
    process_cpu_ns: float
    machine_cpu_ns: float
    loss: float
    rss_kib: int = 0
    umem_kib: int = 0


_HEARTBEAT_SERVICE: Final = f"""
[[service]]
name = "heartbeat"
ports = [{HEARTBEAT_PORT}]
[[service.rule]]
kind = "heartbeat"
action = "reply"
lane = "bench"
"""


def bench_policy(port: int, *, timestamps: bool = False) -> Policy:
    """One lane for everybody on ``port``; heartbeats are answered on another."""
    return Policy.parse(
        f"""
        version = 1
        [[lane]]
        name = "bench"
        timestamps = {str(timestamps).lower()}
        [[service]]
        name = "bench"
        ports = [{port}]
        [[service.rule]]
        action = "lane"
        lane = "bench"
        {_HEARTBEAT_SERVICE}
        """,
        "bench",
    )


def two_lanes_policy(port: int) -> Policy:
    """What begins as a question of tools/bench/ping.c has the high lane, all else the low one."""
    return Policy.parse(
        f"""
        version = 1
        [[lane]]
        name = "bench"
        [[lane]]
        name = "flood"
        [[service]]
        name = "bench"
        ports = [{port}]
        [[service.kind]]
        name = "question"
        match = [{{ offset = 0, value = "534c4842" }}]
        [[service.rule]]
        kind = "question"
        action = "lane"
        lane = "bench"
        [[service.rule]]
        action = "lane"
        lane = "flood"
        {_HEARTBEAT_SERVICE}
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
        self._link: Link | None = None
        self._mode: Mode | None = None
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as cleanup:
            self._directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="sluice-bench-")))
            self.lab = cleanup.enter_context(Lab(static_neighbours=True))
            self.program = cleanup.enter_context(SteerProgram.load())
            self.program.swap(compile_policy(bench_policy(PORT)))
            cleanup.callback(self._take_off)
            self.use("native")
            self.generator = cleanup.enter_context(Generator(self.lab.client, cpu=self.generator_cpu))
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _take_off(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = self._mode = None

    def use(self, mode: Mode) -> None:
        """Have the steer program on the server in this mode.  Raises SluiceError."""
        if mode == self._mode:
            return
        self._take_off()
        server = self.lab.server
        # What XDP sends arrives at an end without a native program only if that has NAPI: with GRO.  A
        # native program switches it on by itself, so it is nobody's advantage.
        with server.enter():
            with contextlib.closing(IoctlEthtool(server.interface)) as ethtool:
                ethtool.set_offload_flag("generic-receive-offload", mode == "generic")
            self._link = attach(self.program, server.ifindex, mode)
        self._mode = mode

    @contextlib.contextmanager
    def dropping_server(self) -> Iterator[None]:
        """The server drops what arrives there at once, in the driver, instead of steering it."""
        mode = self._mode or "native"
        self._take_off()
        try:
            link = _attach_instructions(self.lab.server, _DROP)
            try:
                yield
            finally:
                link.close()
        finally:
            self.use(mode)

    def two_lanes(self) -> contextlib.AbstractContextManager[None]:
        """The generator's packets go to a lower lane than questions do."""
        return self._under(two_lanes_policy(PORT))

    def timestamps(self) -> contextlib.AbstractContextManager[None]:
        """Frames carry the time at which they came."""
        return self._under(bench_policy(PORT, timestamps=True))

    @contextlib.contextmanager
    def _under(self, policy: Policy) -> Iterator[None]:
        self.program.swap(compile_policy(policy))
        try:
            yield
        finally:
            self.program.swap(compile_policy(bench_policy(PORT)))

    @contextlib.contextmanager
    def dropping_client(self, *, answers_only: bool = False) -> Iterator[None]:
        """The client drops what arrives there, before its network stack: all, or what answers the generator.

        So nothing of the machine's time goes into what becomes of packets that were sent there.
        """
        self.lab.client.detach()
        try:
            link = _attach_instructions(self.lab.client, _DROP_ANSWERS if answers_only else _DROP)
            try:
                yield
            finally:
                link.close()
        finally:
            self.lab.client.attach_pass()

    def frame(self, size: int, port: int = PORT) -> bytes:
        """A UDP frame from client to server with ``size`` bytes of payload."""
        payload = bytes(size)
        return udp_frame(self.lab.client, self.lab.server, port, payload, source_port=_GENERATOR_PORT)

    @contextlib.contextmanager
    def traffic(self, size: int, seconds: float, rate: float | None = None) -> Iterator[None]:
        """The generator runs, flat out or at a rate (packets/s), until the end of the block.

        The path under test copies frames, or is given copies, so it writes nothing into these.
        """
        stream = Stream([Template(self.frame(size))], rate=rate)
        self.generator.start([stream], seconds + _MARGIN, pristine=True)
        try:
            yield
        finally:
            self.generator.stop()
            self.generator.wait()

    def measure(self, task: Task) -> Sample:
        """Run one path once.  The generator runs flat out, unless the path itself is what sends."""
        self.use(task.mode)
        with contextlib.ExitStack() as cleanup:
            if task.direction != "receive":
                cleanup.enter_context(self.dropping_client())
            process = cleanup.enter_context(self.running(task))
            if task.direction not in SENDING:
                cleanup.enter_context(self.traffic(task.size, task.seconds))
            busy = _busy_ticks()
            report = read_report(process, task.path, task.seconds + START_TIMEOUT)
            busy = _busy_ticks() - busy
            return _sample(report, busy)

    @contextlib.contextmanager
    def running(self, task: Task) -> Iterator[subprocess.Popen[str]]:
        """The path under test as a process that is ready; it is ended with the block."""
        process = self._start(task)
        try:
            wait_ready(process, task.path)
            yield process
        finally:
            end(process)

    def _start(self, task: Task) -> subprocess.Popen[str]:
        command = self._reference(task) if task.path.endswith("-c") else self._worker(task)
        pinned = ["taskset", "-c", str(self.receiver_cpu), *command]
        return self.lab.server.popen(pinned, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _reference(self, task: Task) -> list[str]:
        """A C program of tools/bench."""
        host, sends = self.lab.server, task.direction in SENDING
        family = "xsk" if task.path.startswith("xsk") else "mmsg"
        program = compile_reference(f"{family}_{'transmit' if sends else task.direction}", self._directory)
        command = [str(program), "--batch", str(task.batch), "--seconds", str(task.seconds)]
        command += ["--size", str(task.size), "--port", str(PORT)]
        if family == "xsk":
            command += ["--interface", host.interface]
            if not sends:
                command += ["--map-id", str(self.program.maps["xsks"].info.id), "--map-index", "0"]
        elif task.direction == "fanout":
            command += ["--ports", str(task.batch)]
        if sends:
            frame = self._directory / f"frame-{task.size}"
            frame.write_bytes(udp_frame(host, self.lab.client, PORT, bytes(task.size)))
            command += ["--frame", str(frame), "--address", str(self.lab.client.ipv4)]
        command += ["--touch"] if task.touch else []
        command += ["--interval", str(round(task.linger * 1e6))] if task.linger else []
        command += ["--offload"] if "offload" in task.path else []
        return command

    def _worker(self, task: Task) -> list[str]:
        """A path in Python."""
        arguments = Arguments(
            path=task.path,
            direction=task.direction,
            interface=self.lab.server.interface,
            map_id=0 if task.direction in SENDING else self.program.maps["xsks"].info.id,
            cookie=self.program.cookie,
            batch=task.batch,
            size=task.size,
            port=PORT,
            seconds=task.seconds,
            touch=task.touch,
            linger=task.linger,
            address=str(self.lab.client.ipv4),
            mode=f"{task.mode}-copy",
            lanes=task.lanes,
        )
        return [sys.executable, "-m", "sluice_cli.bench_worker", json.dumps(asdict(arguments))]

    def round_trips(
        self, port: int, *, size: int, seconds: float, interval_us: int, beside_traffic: bool = False
    ) -> dict[str, Any]:
        """Ping from the client; what tools/bench/ping.c reports.

        Beside traffic it asks on time whether or not it was answered, and comes first on the generator's
        CPU: what is measured is the way and the server, not who waits for that CPU.
        """
        words = ["--address", str(self.lab.server.ipv4), "--port", str(port), "--size", str(size)]
        words += ["--seconds", str(seconds), "--interval", str(interval_us)]
        words += ["--open"] if beside_traffic else []
        with self.client_process("ping", words, first=beside_traffic) as process:
            return read_report(process, "ping", seconds + START_TIMEOUT)

    @contextlib.contextmanager
    def client_process(
        self, name: str, words: Sequence[str], *, first: bool = False
    ) -> Iterator[subprocess.Popen[str]]:
        """A C program of tools/bench on the client, on the generator's CPU; ``first``: in real time."""
        command = ["taskset", "-c", str(self.generator_cpu)]
        command += ["chrt", "--fifo", "1"] if first else []
        command += [str(compile_reference(name, self._directory)), *words]
        process = self.lab.client.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            wait_ready(process, name)
            yield process
        finally:
            end(process)


class _Loaded:
    def __init__(self, instructions: Sequence[tuple[int, int, int, int]]) -> None:
        self.fd = load_bytecode("sluice_bench", b"".join(struct.pack("=BBhi", *one) for one in instructions))

    def close(self) -> None:
        os.close(self.fd)


def _attach_instructions(host: Any, instructions: Sequence[tuple[int, int, int, int]]) -> Link:
    with contextlib.closing(_Loaded(instructions)) as program, host.enter():
        return attach(program, host.ifindex)


def _sample(report: dict[str, Any], busy: float) -> Sample:
    packets = report["packets"]
    if not packets or not report["seconds"]:
        raise SluiceError("a path received nothing", hint="run it again with --verbose")
    return Sample(
        packets_per_second=packets / report["seconds"],
        process_cpu_ns=report["process_cpu_ns"] / packets,
        machine_cpu_ns=busy * 1e9 / packets,
        loss=report["lost"] / (packets + report["lost"]),
        rss_kib=report["rss_kib"],
        umem_kib=report["umem_kib"],
    )

# SPDX-License-Identifier: Apache-2.0
"""The load generator: millions of packets per second out of a lab host, from one CPU.

The program bpf/generate.bpf.c decides packet by packet what is due and writes it; the kernel calls it
in a loop and transmits (live frames).  User space only starts, waits and reads the counts:

    with Generator(lab.client) as generator:
        result = generator.run(seconds=2, rate=500_000, templates=[Template(frame, stamp=0)])
        result.sent

Several streams, each with its own rate, frames and sequence numbers, share one generator and so one CPU.
That matters on veth: the receiving queue is the sending CPU modulo queues, and the receiving end's work is
as a rule done on the CPU that sent, so the packets of one generator seldom overrun the cable, whatever else
the machine does; packets for one queue from several CPUs easily do.  A receiver wants another CPU.

A packet counts as sent when the interface was given it.  What the other end had no room for is counted as
refused: sent - refused is what the other end's program sees.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import cffi

import bpf
from sluice_cli.lab import Host
from sluice_cli.traffic import STAMP_BYTES, Template, ones_sum
from xdp._libbpf import ffi as kernel
from xdp._libbpf import lib
from xdp.compile import compile_program
from xdp.errors import InterfaceGoneError, SluiceError, UnsupportedError, UsageError, VerifierError

__all__ = ["Generator", "GeneratorResult", "Stream", "StreamResult"]

#: No run is longer; whoever forgets to stop a generator gets the CPU back.
MAX_SECONDS: Final = 3600.0
_DEFAULT_BACKLOG: Final = 0.1  # seconds; longer than the stalls seen on busy machines

# One call of the kernel's loop: setting one up takes about 6 ms in which nothing is sent, and a
# generator can be stopped only between calls.
_CALL_SECONDS: Final = 0.2
_FIRST_CALL: Final = 1 << 17  # frames; 15 ms when most calls send nothing
_LONGEST_CALL: Final = 1 << 24
_BATCH: Final = 64  # frames between two chances for the receiving end to run (NAPI's own weight)
_XDP_MD_WORDS: Final = 6
_VALUES: Final = {
    "streams": "struct sluice_generate_stream *",
    "progress": "struct sluice_generate_progress *",
}
_LOG_BYTES: Final = 1 << 20
# What a receiver may have changed in a frame before it comes back: headers, and a heartbeat's payload.
_DIRTY_PAYLOAD: Final = 32


@dataclass(frozen=True)
class Stream:
    """One flow of packets.

    Args:
        templates: sent in turn; at least one.
        rate: packets per second; None: as fast as the machine allows.
        count: stop after so many packets; None: no limit.
        sources: choose the source address among so many, counted up from the template's; 0: the template's.
        ports: the same for the source port.
        seed: of that choice, which depends on it and the sequence number alone.
        backlog: seconds of delay that are caught up with (at up to 4 times the rate); what is older is
            given up and counted as missed.
        name: for the caller's own use.
    """

    templates: Sequence[Template]
    rate: float | None = None
    count: int | None = None
    sources: int = 0
    ports: int = 0
    seed: int = 0
    backlog: float = _DEFAULT_BACKLOG
    name: str = ""

    def __post_init__(self) -> None:
        if not self.templates:
            raise UsageError("a stream without a template")
        if self.rate is not None and not 0.01 <= self.rate <= 1e8:
            raise UsageError(f"rate is {self.rate}; allowed: 0.01 to 1e8 packets/s, or none for flat out")
        if self.count is not None and not 1 <= self.count < 1 << 63:
            raise UsageError(f"count is {self.count}; allowed: 1 and more, or none for no limit")
        if not 0 <= self.sources < 1 << 32 or not 0 <= self.ports <= 65535 or not 0 <= self.seed < 1 << 64:
            raise UsageError("sources has 32 bits, ports at most 65,535, seed 64 bits; none is negative")
        if not 0 <= self.backlog <= MAX_SECONDS:
            raise UsageError(f"backlog is {self.backlog}; allowed: 0 to {MAX_SECONDS:.0f} s")
        if (self.sources or self.ports) and any(template.datagram is None for template in self.templates):
            raise UsageError("sources and ports can be varied only in templates that are UDP datagrams")


@dataclass(frozen=True)
class StreamResult:
    """Exact counts of one stream.  ``seconds`` is from its first packet to its last."""

    name: str
    sent: int
    bytes: int
    missed: int
    seconds: float


@dataclass(frozen=True)
class GeneratorResult:
    """What was sent.

    ``seconds`` is from the first packet of any stream to the last.  ``refused`` is the interface's own
    count of frames that the other end had no room for during the run; with several generators on one
    interface it is of all of them, and it is 0 until the run is over.
    """

    sent: int
    refused: int
    seconds: float
    streams: tuple[StreamResult, ...]

    @property
    def rate(self) -> float:
        """Packets per second over the whole run, 0 when nothing was sent."""
        return self.sent / self.seconds if self.seconds else 0.0


class Generator:
    """Sends from a lab host's interface; loads its program at once and runs in a thread of its own.

    Args:
        host: whose interface sends, and in whose namespace.
        cpu: that the thread is pinned to; the last one that this process may use by default.

    Raises:
        UnsupportedError: bcc, headers or live frames (Linux 5.18) are missing.
        UsageError: no such CPU.
    """

    def __init__(self, host: Host, *, cpu: int | None = None) -> None:
        allowed = os.sched_getaffinity(0)
        if cpu is not None and cpu not in allowed:
            raise UsageError(f"no CPU {cpu} for this process", hint=f"allowed: {sorted(allowed)}")
        self.host = host
        self.cpu = max(allowed) if cpu is None else cpu
        compiled = compile_program("generate.bpf.c", "sluice_generate")
        self._maps = compiled.make_maps()
        self._program = _load(compiled.on(self._maps))
        self._thread: threading.Thread | None = None
        self._streams: tuple[Stream, ...] = ()
        self._control: Any = None
        self._frame = b""
        self._refused = 0
        self._stopping = threading.Event()
        self._error: SluiceError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop and unload; may be called twice."""
        self.stop()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._program >= 0:
            os.close(self._program)
            self._program = -1
            for opened in self._maps.values():
                opened.close()

    def run(
        self,
        seconds: float | None = None,
        count: int | None = None,
        *,
        rate: float | None = None,
        templates: Sequence[Template] = (),
        sources: int = 0,
        ports: int = 0,
        pristine: bool = False,
    ) -> GeneratorResult:
        """Send one stream for ``seconds`` or until ``count`` packets are sent, whichever is first."""
        stream = Stream(templates, rate=rate, count=count, sources=sources, ports=ports)
        self.start([stream], seconds, pristine=pristine)
        return self.wait()

    def start(
        self, streams: Sequence[Stream], seconds: float | None = None, *, pristine: bool = False
    ) -> None:
        """Begin to send; returns at once.

        ``pristine`` promises that the receiver writes nothing into the frames (it drops, passes or copies
        them).  A single template without stamp, sources and ports then costs next to nothing a packet:
        the highest rate there is.

        Raises:
            UsageError: already running, too many streams or templates, or nothing that would end it.
        """
        if self._thread is not None:
            raise UsageError("the generator is running already", hint="wait() for it first")
        if self._program < 0:
            raise UsageError("the generator is closed")
        header = _header()
        if not 1 <= len(streams) <= header.lib.SLUICE_GENERATE_STREAMS:
            raise UsageError(f"{len(streams)} streams; allowed: 1 to {header.lib.SLUICE_GENERATE_STREAMS}")
        if seconds is None and any(stream.count is None for stream in streams):
            raise UsageError("a stream without an end", hint="give seconds, or a count for every stream")
        if seconds is not None and not 0 < seconds <= MAX_SECONDS:
            raise UsageError(f"seconds is {seconds}; allowed: more than 0, at most {MAX_SECONDS:.0f}")
        self._streams = tuple(streams)
        self._fill_maps(pristine)
        self._stopping.clear()
        self._error = None
        self._refused = 0
        self._control = header.ffi.new("struct sluice_generate_control *")
        self._control.streams = len(streams)
        templates = [template for stream in streams for template in stream.templates]
        self._control.lazy_clock = all(stream.rate is None for stream in streams) and all(
            template.stamp is None for template in templates
        )
        self._control.duration_ns = int((MAX_SECONDS if seconds is None else seconds) * 1e9)
        self._write("control", 0, self._control)
        self._write("progress", 0, header.ffi.new("struct sluice_generate_progress *"))
        self._thread = threading.Thread(target=self._work, name="sluice-generator", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop sending, now; counts stay as they are from here on."""
        if self._thread is not None and not self._stopping.is_set():
            self._stopping.set()
            self._control.stop = 1
            self._write("control", 0, self._control)

    def wait(self, timeout: float | None = None) -> GeneratorResult:
        """Wait until all is sent (or for ``timeout`` seconds: TimeoutError) and return the counts.

        Interrupted by Ctrl-C, it stops the generator first.
        """
        if self._thread is None:
            raise UsageError("the generator is not running")
        try:
            self._thread.join(timeout)
        except BaseException:
            self.stop()
            raise
        if self._thread.is_alive():
            raise TimeoutError(f"the generator is not done after {timeout} s")
        self._thread = None
        if self._error is not None:
            raise self._error
        return self.result()

    @property
    def running(self) -> bool:
        """True while it sends."""
        return self._thread is not None and self._thread.is_alive()

    def result(self) -> GeneratorResult:
        """The counts so far; may be called at any time after `start`."""
        found: list[StreamResult] = []
        first, last = 0, 0
        for index, stream in enumerate(self._streams):
            entry = self._read("streams", index)
            seconds = (entry.last_ns - entry.first_ns) / 1e9
            found.append(StreamResult(stream.name, entry.sent, entry.bytes, entry.missed, seconds))
            if entry.sent:
                first = min(first or entry.first_ns, entry.first_ns)
                last = max(last, entry.last_ns)
        sent = sum(stream.sent for stream in found)
        return GeneratorResult(sent, self._refused, (last - first) / 1e9, tuple(found))

    def _work(self) -> None:
        """The thread: it enters namespace and CPU for itself alone, and ends there."""
        try:
            os.sched_setaffinity(0, {self.cpu})
            with self.host.enter():
                before = self._refused_so_far()
                self._loop()
                self._refused = self._refused_so_far() - before
        except SluiceError as error:
            self._error = error
        except OSError as error:
            self._error = InterfaceGoneError.from_errno(
                f"cannot send from {self.host.interface} in {self.host.namespace}",
                error.errno or 0,
                hint="does the lab still exist? see: sluice lab list",
            )

    def _refused_so_far(self) -> int:
        counters = self.host.statistics().items()
        return sum(value for name, value in counters if re.fullmatch(r"tx_queue_\d+_xdp_xmit_errors", name))

    def _loop(self) -> None:
        length = len(self._frame)
        frame = kernel.from_buffer("char[]", self._frame)
        context = kernel.new(f"uint32_t[{_XDP_MD_WORDS}]")
        context[1] = length  # data_end
        context[3] = self.host.ifindex  # ingress_ifindex: where XDP_TX sends
        run = kernel.new("struct sluice_test_run *")
        run.data_in, run.data_size_in = frame, length
        run.ctx_in, run.ctx_size_in = context, 4 * _XDP_MD_WORDS
        run.flags = lib.BPF_F_TEST_XDP_LIVE_FRAMES
        run.batch_size = _BATCH
        run.repeat = _FIRST_CALL
        while not self._stopping.is_set() and not self._over():
            began = time.monotonic()
            error = -lib.sluice_prog_test_run(self._program, run)
            if error == errno.EINTR:  # a signal, meant for the main thread
                continue
            if error:
                raise _run_error(error, self.host)
            took = max(time.monotonic() - began, 1e-4)
            wanted = int(run.repeat * min(4.0, _CALL_SECONDS / took))
            run.repeat = max(_FIRST_CALL, min(_LONGEST_CALL, wanted))

    def _over(self) -> bool:
        start = self._read("progress", 0).start_ns
        if start and time.monotonic_ns() - start >= self._control.duration_ns:
            return True
        return all(
            stream.count is not None and self._read("streams", index).sent >= stream.count
            for index, stream in enumerate(self._streams)
        )

    def _fill_maps(self, pristine: bool) -> None:
        header = _header()
        shift = header.lib.SLUICE_GENERATE_SHIFT
        total = sum(len(stream.templates) for stream in self._streams)
        if total > header.lib.SLUICE_GENERATE_TEMPLATES:
            raise UsageError(
                f"{total} templates; allowed: {header.lib.SLUICE_GENERATE_TEMPLATES} in all streams"
            )
        first = 0
        self._frame = b""
        for index, stream in enumerate(self._streams):
            entry = header.ffi.new("struct sluice_generate_stream *")
            entry.interval = 0 if stream.rate is None else round((10**9 << shift) / stream.rate)
            entry.backlog = int(stream.backlog * 1e9) << shift
            entry.limit = stream.count or 0
            entry.seed = stream.seed
            entry.first_template, entry.templates = first, len(stream.templates)
            entry.sources, entry.ports = stream.sources, stream.ports
            self._write("streams", index, entry)
            for template in stream.templates:
                encoded = _encode(template, bool(stream.sources), bool(stream.ports))
                if total == 1:
                    encoded.store = _changing_bytes(template, encoded, pristine)
                self._write("templates", first, encoded)
                self._frame = max(self._frame, template.frame, key=len)
                first += 1

    def _write(self, name: str, index: int, value: Any) -> None:
        raw = _header().ffi.buffer(value)
        key = kernel.new("uint32_t *", index)
        error = -lib.sluice_map_update(
            self._maps[name].fd, key, kernel.from_buffer("char[]", raw), lib.BPF_ANY
        )
        if error:
            raise SluiceError.from_errno(f"cannot write the generator's map {name!r}", error)

    def _read(self, name: str, index: int) -> Any:
        value = _header().ffi.new(_VALUES[name])
        raw = kernel.from_buffer("char[]", _header().ffi.buffer(value))
        error = -lib.sluice_map_lookup(self._maps[name].fd, kernel.new("uint32_t *", index), raw)
        if error:
            raise SluiceError.from_errno(f"cannot read the generator's map {name!r}", error)
        return value


@dataclass(frozen=True)
class _Header:
    ffi: Any
    lib: Any


@functools.cache
def _header() -> _Header:
    """bpf/include/generate.h as cffi reads it: the layout is written there and nowhere else."""
    text = re.sub(r"/\*.*?\*/", "", bpf.source("include/generate.h"), flags=re.DOTALL)
    text = "".join(line + "\n" for line in text.splitlines() if not re.match(r"#(?!define \w+\s+\d)", line))
    declared = cffi.FFI()
    for bits in (8, 16, 32, 64):
        declared.cdef(f"typedef uint{bits}_t __u{bits};")
    declared.cdef(text)
    return _Header(declared, declared.dlopen(None))


def _encode(template: Template, vary_source: bool, vary_port: bool) -> Any:
    """The map's value for a template: fields that the program writes are zeroed, the rest is summed up."""
    header = _header()
    entry = header.ffi.new("struct sluice_generate_template *")
    frame = bytearray(template.frame)
    entry.length = entry.store = len(frame)
    datagram = template.datagram
    if datagram is not None:
        entry.udp_check_offset = datagram.udp + 6
        if datagram.version == 4:
            if frame[datagram.udp + 6 : datagram.udp + 8] == b"\0\0":  # RFC 768: sent without a checksum
                entry.udp_check_offset = 0
            entry.ip_check_offset = datagram.network + 10
            frame[entry.ip_check_offset : entry.ip_check_offset + 2] = b"\0\0"
        if entry.udp_check_offset:
            frame[entry.udp_check_offset : entry.udp_check_offset + 2] = b"\0\0"
        if template.stamp is not None:
            entry.stamp_offset = datagram.payload + template.stamp
            size = header.ffi.sizeof("struct sluice_stamp")
            frame[entry.stamp_offset : entry.stamp_offset + size] = bytes(size)
        if vary_source:
            entry.source_offset = datagram.source.stop - 4
            entry.source = int.from_bytes(frame[entry.source_offset : datagram.source.stop], "big")
            frame[entry.source_offset : datagram.source.stop] = bytes(4)
        if vary_port:
            entry.port_offset = datagram.udp
            entry.port = int.from_bytes(frame[datagram.udp : datagram.udp + 2], "big")
            frame[datagram.udp : datagram.udp + 2] = bytes(2)
        end = datagram.payload + datagram.length
        length = (end - datagram.udp).to_bytes(4, "big")
        pseudo = bytes(frame[datagram.source] + frame[datagram.destination]) + length + b"\0\0\0\x11"
        entry.udp_sum = ones_sum(pseudo, "=") + ones_sum(bytes(frame[datagram.udp : end]), "=")
        if datagram.version == 4:
            size = (frame[datagram.network] & 0x0F) * 4
            entry.ip_sum = ones_sum(bytes(frame[datagram.network : datagram.network + size]), "=")
    header.ffi.memmove(entry.frame, bytes(frame), len(frame))
    return entry


def _changing_bytes(template: Template, encoded: Any, pristine: bool) -> int:
    """How much of a frame has to be stored again for each packet, when all frames hold the same template."""
    datagram = template.datagram
    patched = encoded.stamp_offset or encoded.source_offset or encoded.port_offset
    if pristine and not patched:
        return 0
    if datagram is None:
        return len(template.frame)
    end = datagram.payload if pristine else datagram.payload + _DIRTY_PAYLOAD
    if template.stamp is not None:
        end = max(end, datagram.payload + template.stamp + STAMP_BYTES)
    return min(end, len(template.frame))


def _load(instructions: bytes) -> int:
    log = kernel.new("char[]", _LOG_BYTES)
    code = kernel.from_buffer("char[]", instructions)
    descriptor = lib.sluice_prog_load(
        lib.BPF_PROG_TYPE_XDP, b"sluice_generate", b"Dual BSD/GPL", code, len(instructions) // 8,
        lib.BPF_XDP, 0, log, _LOG_BYTES, 1,
    )  # fmt: skip
    if descriptor == -errno.EPERM:
        raise UnsupportedError("not permitted to load the load generator", hint="run as root")
    if descriptor < 0:
        raise VerifierError(
            f"the kernel refuses the load generator: {os.strerror(-descriptor)}",
            hint="it needs Linux 5.18; --verbose shows the verifier's words",
            detail=kernel.string(log).decode(errors="replace"),
        )
    return descriptor


def _run_error(error: int, host: Host) -> SluiceError:
    what = f"live frames on {host.interface} in {host.namespace}"
    if error == errno.ENODEV:
        return InterfaceGoneError.from_errno(what, error, hint="the lab was taken down, or its link deleted")
    return UnsupportedError.from_errno(
        what, error, hint="it needs Linux 5.18 and a native XDP program on that interface; see: sluice doctor"
    )

# SPDX-License-Identifier: Apache-2.0
"""``sluice replay``: send a capture's datagrams to an address of the lab.

Addresses in the capture are somebody else's, so they are replaced: the destination by ``--to``, the source
by the sender's own.  Destination ports are kept unless mapped.  The datagrams leave through ordinary
sockets, so the kernel routes, resolves and fragments as for any program.
"""

from __future__ import annotations

import errno
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import click

from sluice_cli.lab import NETNS_DIRECTORY, Lab
from sluice_cli.lab_state import read_markers
from sluice_cli.output import Output, common_options, examples
from sluice_cli.pcap import Capture, CapturedDatagram
from xdp.errors import SluiceError, UsageError

Address = IPv4Address | IPv6Address
Pace = Literal["original", "flat"] | float

# A pause in the capture longer than this is cut to it: nobody waits for a capture's quiet night.
_LONGEST_GAP_NS: Final = 10 * 10**9
# Ahead of schedule by less than this, the next datagram is sent at once: a sleep takes 60 µs at least.
_SLEEP_SECONDS: Final = 0.0005
# Sockets kept open with ``--source-port keep``; more source ports than this take turns.
_MAX_SOCKETS: Final = 256
_PROGRESS_SECONDS: Final = 0.2
# What one datagram may meet without the others being in vain: full buffers, a size the path does not take.
_SKIPPED_ERRORS: Final = {
    errno.ENOBUFS: "no_buffer",
    errno.EMSGSIZE: "too_long",
    errno.EADDRINUSE: "port_in_use",
}


@dataclass
class Summary:
    """What a replay did; ``read == sent + sum(skipped.values())`` always."""

    read: int = 0
    sent: int = 0
    bytes: int = 0
    passes: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    skipped: Counter[str] = field(default_factory=Counter)

    def document(self) -> dict[str, object]:
        """The JSON document's part."""
        return {
            "read": self.read,
            "sent": self.sent,
            "bytes": self.bytes,
            "passes": self.passes,
            "seconds": round(self.seconds, 6),
            "interrupted": self.interrupted,
            "skipped": dict(sorted(self.skipped.items())),
        }


class Sender:
    """Sends datagrams to one address, in the calling thread's network namespace.

    Args:
        destination: where to; a link-local one needs its scope.
        port: for all of them; None: as captured, or as ``ports`` maps it.
        ports: captured destination port to another one.
        keep_source_port: bind to the captured source ports.
    """

    def __init__(
        self,
        destination: Address,
        port: int | None = None,
        *,
        ports: Mapping[int, int] | None = None,
        keep_source_port: bool = False,
    ) -> None:
        self._family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
        self._target = str(destination)
        if isinstance(destination, IPv6Address) and destination.scope_id:
            self._tail: tuple[int, ...] = (0, _scope(destination.scope_id))
            self._target = self._target.partition("%")[0]
        else:
            self._tail = ()
        self._port = port
        self._ports = dict(ports or {})
        self._keep = keep_source_port
        self._sockets: OrderedDict[int, socket.socket] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()

    def send(self, datagram: CapturedDatagram) -> str:
        """Send one; returns why not, or "" when it was sent.

        Raises:
            SluiceError: nothing can be sent there.
        """
        port = self._ports.get(datagram.destination_port, datagram.destination_port)
        port = port if self._port is None else self._port
        if port == 0:
            return "port_zero"
        try:
            self._socket(datagram.source_port).sendto(datagram.payload, (self._target, port, *self._tail))
        except OSError as error:
            reason = _SKIPPED_ERRORS.get(error.errno or 0)
            if reason is None:
                raise SluiceError.from_errno(
                    f"cannot send to {self._target} port {port}",
                    error.errno or 0,
                    hint="--lab NAME sends from a lab's client; `sluice lab list` shows labs",
                ) from None
            return reason
        return ""

    def _socket(self, source_port: int) -> socket.socket:
        key = source_port if self._keep else 0
        found = self._sockets.get(key)
        if found is None:
            if len(self._sockets) == _MAX_SOCKETS:
                self._sockets.popitem(last=False)[1].close()
            found = socket.socket(self._family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                found.bind(("", key))
            except OSError:
                found.close()
                raise
            self._sockets[key] = found
        elif self._keep:
            self._sockets.move_to_end(key)
        return found


def replay_capture(
    capture: Capture,
    sender: Sender,
    *,
    pace: Pace = "original",
    count: int | None = None,
    loop: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Send a capture's datagrams through ``sender``.

    Args:
        capture: read from its start, again and again with ``loop``.
        sender: closed by the caller.
        pace: "original" keeps the capture's distances (at most 10 s each), "flat" waits for nothing,
            a number is datagrams per second.
        count: stop after so many were sent.
        loop: begin again at the end; without ``count``, until interrupted.
        progress: told about every datagram.
        stop: ends it when set, from another thread or a signal handler; counts stay exact.

    Raises:
        CaptureError: the file is damaged; what came before was sent.
    """
    summary = Summary()
    stop = threading.Event() if stop is None else stop
    clock = _Clock(pace, stop)
    began = time.monotonic()
    try:
        while count is None or summary.sent < count:
            sent_before, base = summary.sent, (summary.read, summary.skipped.copy())
            with closing(_counted(capture, summary, base)) as datagrams:
                for datagram in datagrams:
                    clock.wait(datagram.time_ns)
                    reason = "interrupted" if stop.is_set() else sender.send(datagram)
                    if reason:
                        # counted in the capture's own counter, which the summary is made from
                        capture.skipped[reason] += 1
                    else:
                        summary.sent += 1
                        summary.bytes += len(datagram.payload)
                    if progress is not None:
                        progress.update(summary)
                    if summary.sent == count or stop.is_set():
                        break
                else:
                    summary.passes += 1
            if not loop or summary.sent == sent_before or stop.is_set():
                break
            clock.restart()
    finally:
        summary.seconds = time.monotonic() - began
        summary.interrupted = stop.is_set()
        if progress is not None:
            progress.finish()
    return summary


def _counted(
    capture: Capture, summary: Summary, base: tuple[int, Counter[str]]
) -> Generator[CapturedDatagram, None, None]:
    """The capture's datagrams, with its counts added to those of earlier passes however the pass ends."""
    try:
        yield from capture
    finally:
        summary.read = base[0] + capture.read
        summary.skipped = base[1] + capture.skipped


class _Clock:
    """When the next datagram is due.  Deadlines are absolute, so that delays do not add up."""

    def __init__(self, pace: Pace, stop: threading.Event) -> None:
        self._pace = pace
        self._stop = stop
        self._start = time.monotonic()
        self._number = 0
        self._due_ns = 0
        self._last_ns: int | None = None

    def restart(self) -> None:
        """A new pass begins: the distance to its first datagram is unknown, so it follows at once."""
        self._last_ns = None

    def wait(self, time_ns: int | None) -> None:
        if self._pace == "flat":
            return
        if self._pace == "original":
            if time_ns is not None:
                if self._last_ns is not None:
                    # Captures merged from several places may go back in time.
                    self._due_ns += min(max(0, time_ns - self._last_ns), _LONGEST_GAP_NS)
                self._last_ns = time_ns
            due = self._start + self._due_ns / 1e9
        else:
            due = self._start + self._number / self._pace
            self._number += 1
        while (ahead := due - time.monotonic()) > _SLEEP_SECONDS and not self._stop.wait(ahead):
            pass


class Progress:
    """A line on stderr, rewritten five times a second; silent unless stderr is a terminal."""

    def __init__(self) -> None:
        self._active = sys.stderr.isatty()
        self._next = 0.0
        self._shown = False
        self._began = time.monotonic()

    def update(self, summary: Summary) -> None:
        """Show it, when it is time again."""
        if not self._active or (now := time.monotonic()) < self._next:
            return
        self._next = now + _PROGRESS_SECONDS
        self._shown = True
        rate = summary.sent / max(now - self._began, 1e-9)
        sys.stderr.write(f"\r{summary.sent:,} sent, {rate:,.0f}/s\x1b[K")
        sys.stderr.flush()

    def finish(self) -> None:
        """Wipe the line."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


def parse_target(text: str) -> tuple[Address, int | None]:
    """ADDR, V4:PORT or [V6]:PORT.

    Raises:
        UsageError: it is none of them.
    """
    match = re.fullmatch(r"\[([^\]]+)\](?::(\d{1,5}))?", text) or re.fullmatch(r"([^:]+):(\d{1,5})", text)
    host, port = (match[1], match[2]) if match else (text, None)
    try:
        address = ip_address(host)
    except ValueError:
        raise UsageError(
            f"--to {text}: no address", hint="write 10.81.0.1, 10.81.0.1:8001, fd81::1 or [fd81::1]:8001"
        ) from None
    if port is not None and not 1 <= int(port) <= 65535:
        raise UsageError(f"--to {text}: port {port}; allowed: 1 to 65535")
    return address, None if port is None else int(port)


def parse_pace(text: str) -> Pace:
    """original, flat, or datagrams per second, with k or M."""
    if text == "original":
        return "original"
    if text == "flat":
        return "flat"
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text)
    rate = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]] if match else 0.0
    if not 0.001 <= rate <= 1e8:
        raise UsageError(
            f"--pace {text}: no pace", hint="write original, flat, or a rate such as 5000 or 20k"
        )
    return rate


def parse_ports(words: tuple[str, ...]) -> dict[int, int]:
    """FROM=TO, each."""
    found: dict[int, int] = {}
    for word in words:
        match = re.fullmatch(r"(\d{1,5})=(\d{1,5})", word)
        pair = (int(match[1]), int(match[2])) if match else (0, 0)
        if not all(1 <= port <= 65535 for port in pair):
            raise UsageError(f"--map {word}: no pair of ports", hint="write FROM=TO, such as 46049=8001")
        if pair[0] in found:
            raise UsageError(f"--map {word}: port {pair[0]} is mapped already")
        found[pair[0]] = pair[1]
    return found


def check_destination(address: Address, *, lab: str | None, allow_any: bool) -> None:
    """Refuse to send a stranger's capture to the outside world.

    Raises:
        UsageError: the address is neither loopback nor in a lab.
    """
    if allow_any or lab is not None or address.is_loopback or _inside_a_lab():
        return
    raise UsageError(
        f"{address} is neither loopback nor in a lab",
        hint="--lab NAME sends inside a lab; --allow-any if those who own that network want it",
    )


def _inside_a_lab() -> bool:
    """True in `sluice lab shell`: then nothing outside the lab can be reached."""
    here = Path("/proc/thread-self/ns/net").stat()
    for marker in read_markers()[0]:
        for name in marker.namespaces:
            try:
                there = (NETNS_DIRECTORY / name).stat()
            except FileNotFoundError:
                continue
            if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                return True
    return False


def _scope(name: str) -> int:
    try:
        return int(name) if name.isdigit() else socket.if_nametoindex(name)
    except OSError:
        raise UsageError(f"no interface {name!r}", hint="the lab's client has cli0") from None


@click.command(
    epilog=examples("""
        sudo sluice replay shreds.pcap --lab default --to 10.81.0.1:8001
        sudo sluice replay shreds.pcapng --lab default --to fd81::1 --map 46049=8001 --pace 20k
        sluice replay dns.pcap --to 127.0.0.1:5353 --pace flat --loop --count 100000 --json
    """)
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--to", required=True, metavar="ADDR[:PORT]", help="Destination; without PORT: as captured.")
@click.option("--map", "mapped", multiple=True, metavar="FROM=TO", help="Send what was for port FROM to TO.")
@click.option("--lab", metavar="NAME", help="Send from the client of this lab.")
@click.option("--pace", default="original", show_default=True, metavar="original|RATE|flat",
              help="The capture's own timing, datagrams per second (5000, 20k), or no waiting.")  # fmt: skip
@click.option("--count", type=click.IntRange(min=1), help="Stop after so many datagrams.")
@click.option("--loop", is_flag=True, help="Begin again at the end, until --count or Ctrl-C.")
@click.option("--source-port", type=click.Choice(["any", "keep"]), default="any", show_default=True,
              help="Keep the captured source ports, or use one of the system's choice.")  # fmt: skip
@click.option("--allow-any", is_flag=True, help="Send to addresses outside of labs and loopback.")
@common_options
def replay(
    output: Output,
    file: Path,
    to: str,
    mapped: tuple[str, ...],
    lab: str | None,
    pace: str,
    count: int | None,
    loop: bool,
    source_port: str,
    allow_any: bool,
) -> None:
    """Send the UDP datagrams of FILE (pcap or pcapng) to an address of the lab."""
    address, port = parse_target(to)
    ports = parse_ports(mapped)
    if port is not None and ports:
        raise UsageError("--map and a port in --to contradict each other", hint="use one of them")
    speed = parse_pace(pace)
    check_destination(address, lab=lab, allow_any=allow_any)
    with ExitStack() as stack:
        where: AbstractContextManager[Any] = nullcontext()
        if lab is not None:
            where = stack.enter_context(Lab.open(lab)).client.enter()
        stack.enter_context(where)
        keep = source_port == "keep"
        sender = stack.enter_context(Sender(address, port, ports=ports, keep_source_port=keep))
        options: dict[str, Any] = {
            "pace": speed,
            "count": count,
            "loop": loop,
            "stop": _stop_on_interrupt(stack),
        }
        summary = replay_capture(Capture(file), sender, progress=Progress(), **options)
    document = {"file": str(file), "to": to, **summary.document()}
    output.report(document, lambda: _show(output, summary))
    if summary.interrupted:
        raise KeyboardInterrupt
    if not summary.sent:
        raise SluiceError(
            f"{file}: nothing was sent", hint="it holds no whole UDP datagram; --json lists the reasons"
        )


def _stop_on_interrupt(stack: ExitStack) -> threading.Event:
    """An event that Ctrl-C sets; an exception could come between sending and counting."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        return stop  # only the main thread may handle signals
    before = signal.signal(signal.SIGINT, lambda _number, _frame: stop.set())
    stack.callback(signal.signal, signal.SIGINT, before)
    return stop


def _show(output: Output, summary: Summary) -> None:
    rate = summary.sent / summary.seconds if summary.seconds else 0.0
    output.line(f"read {summary.read:,}, sent {summary.sent:,} in {summary.seconds:.2f} s ({rate:,.0f}/s)")
    for reason, number in sorted(summary.skipped.items()):
        output.line(f"  skipped {number:,}: {reason}")

# SPDX-License-Identifier: Apache-2.0
"""``sluice lab dns``: a DNS server that knows nothing of Sluice, flooded, without and with it.

The server is Debian's nsd as it comes, on one host of the lab.  From the other
host a known resolver asks a steady number of questions, and strangers from tens
of thousands of addresses flood the same port.  Every question carries a number in
its name, and answers repeat the question, so it is known which were answered.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Final

import click
from pyroute2 import IPRoute

from sluice_cli.example_policy import example_policy
from sluice_cli.generator import Generator, Stream
from sluice_cli.lab import Lab
from sluice_cli.output import Output, Table, common_options, examples
from sluice_cli.traffic import STAMP_BYTES, Template, udp_frame
from xdp.errors import SluiceError, UnsupportedError

POLICY: Final = "dns.toml"

DNS_PORT: Final = 53
QUERY_PORT: Final = 5353
ZONE: Final = "lab.example"
QUERY_RATE: Final = 1000  # questions per second of the known resolver
STRANGERS: Final = IPv4Network("10.81.128.0/17")
_START_SECONDS: Final = 60.0  # of the server or of `sluice up`, which compiles; on a busy machine
#: After the last question, for answers that are on their way.
_QUIET_SECONDS: Final = 0.5
_RECEIVE_BUFFER: Final = 8 << 20
_SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h

# Offset of the stamp in a query: header, a label of two letters, the length of the next label.
STAMP: Final = 12 + 3 + 1


@dataclass(frozen=True)
class Run:
    """One flood.  ``refused``: packets, of both, that the server's end of the cable had no room for."""

    sluice: bool
    queries: int
    answered: int
    flood: int
    flood_per_second: int
    refused: int

    @property
    def lost(self) -> int:
        """Questions of the known resolver without an answer."""
        return self.queries - self.answered


def query() -> bytes:
    """A question for an A record of ``qq.<16 bytes for the stamp>.lab.example`` (RFC 1035, 4.1)."""
    header = struct.pack("!HHHHHH", 0x5155, 0x0000, 1, 0, 0, 0)
    labels = [b"qq", bytes(STAMP_BYTES), *(label.encode() for label in ZONE.split("."))]
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    return header + name + struct.pack("!HH", 1, 1)


class Answers:
    """Receives answers on the client until told to stop; which questions they repeat."""

    def __init__(self, lab: Lab) -> None:
        with lab.client.enter():
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        self._socket.bind((str(lab.client.ipv4), QUERY_PORT))
        self._socket.settimeout(0.1)
        self.numbers: set[int] = set()
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                data = self._socket.recv(2048)
            except TimeoutError:
                continue
            # QR and RCODE: an answer without an error, to one of our questions.
            if len(data) >= STAMP + STAMP_BYTES and data[2] & 0x80 and not data[3] & 0x0F:
                self.numbers.add(int.from_bytes(data[STAMP : STAMP + 8], sys.byteorder))
                self._last = time.monotonic()

    def settle(self) -> None:
        """Until no answer has come for a while."""
        while time.monotonic() - self._last < _QUIET_SECONDS:
            time.sleep(0.05)

    def close(self) -> None:
        """Stop receiving."""
        self._stop.set()
        self._thread.join()
        self._socket.close()


def start_server(lab: Lab, directory: Path) -> subprocess.Popen[bytes]:
    """Nsd with one zone, in the foreground, and answering."""
    program = shutil.which("nsd", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if program is None:
        raise UnsupportedError("there is no DNS server to flood", hint="apt-get install nsd")
    zone = directory / "zone"
    zone.write_text(
        f"$ORIGIN {ZONE}.\n$TTL 300\n@ SOA ns hostmaster 1 3600 600 86400 300\n@ NS ns\n"
        f"ns A {lab.server.ipv4}\n* A 192.0.2.1\n",
        encoding="ascii",
    )
    configuration = directory / "nsd.conf"
    configuration.write_text(
        f"""server:
            ip-address: {lab.server.ipv4}
            username: ""
            chroot: ""
            zonesdir: "{directory}"
            database: ""
            pidfile: "{directory}/nsd.pid"
            xfrdfile: "{directory}/xfrd.state"
            zonelistfile: "{directory}/zone.list"
            logfile: "{directory}/nsd.log"
            rrl-ratelimit: 0
        remote-control:
            control-enable: no
        zone:
            name: "{ZONE}"
            zonefile: "{zone}"
        """,
        encoding="ascii",
    )
    server = lab.server.popen([program, "-d", "-c", str(configuration)], stderr=subprocess.DEVNULL)
    _wait_for_answer(lab, server, directory)
    return server


def _wait_for_answer(lab: Lab, server: subprocess.Popen[bytes], directory: Path) -> None:
    with lab.client.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(0.2)
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and server.poll() is None:
            try:
                asking.sendto(query(), (str(lab.server.ipv4), DNS_PORT))
                asking.recv(2048)
            except (TimeoutError, ConnectionRefusedError):
                continue
            return
    log = directory / "nsd.log"
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    raise SluiceError("the DNS server does not answer", hint="--verbose shows its log", detail=said)


def start_sluice(lab: Lab, directory: Path) -> subprocess.Popen[str]:
    """``sluice up`` on the server, with the example policy alone; ready."""
    policy = example_policy(POLICY)
    command = [sys.executable, "-m", "sluice_cli", "up", lab.server.interface, str(policy), "--json"]
    command += ["--socket", str(directory / "lanes.sock")]
    log = directory / "up.log"
    with log.open("w", encoding="utf-8") as errors:
        process = lab.server.popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    line = process.stdout.readline() if select.select([process.stdout], [], [], _START_SECONDS)[0] else ""
    try:
        said = json.loads(line)
    except ValueError:
        said = {}
    if said.get("event") != "ready":
        error = said.get("error", {})
        raise SluiceError(
            f"`sluice up` failed: {error.get('message', 'it said nothing')}",
            hint=error.get("hint", "--verbose shows its log"),
            detail=log.read_text(encoding="utf-8", errors="replace"),
        )
    return process


def _route_strangers(lab: Lab) -> None:
    """Their answers go by way of the client, as they would by a router.

    Else the server's kernel looks for each of them on the link, and fills the neighbour table, which all
    network namespaces of the machine share.
    """
    with IPRoute(netns=lab.server.namespace, flags=0) as route:
        route.route("add", dst=str(STRANGERS), gateway=str(lab.client.ipv4))
    # The client neither forwards nor answers them.
    with IPRoute(netns=lab.client.namespace, flags=0) as route:
        route.route("add", dst=str(STRANGERS), type="blackhole")


def run_once(output: Output, *, sluice: bool, seconds: float, flood: int) -> Run:
    """One lab, one flood."""
    with ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="sluice-dns-")))
        lab = cleanup.enter_context(Lab(static_neighbours=True))
        _route_strangers(lab)
        start_server(lab, directory)
        if sluice:
            output.progress("with Sluice: sluice up")
            process = start_sluice(lab, directory)
            assert process.stdout is not None
            cleanup.callback(process.stdout.close)
        else:
            output.progress("without Sluice")
            lab.server.attach_pass()  # the generator's frames need a program at the other end of a veth
        generator = cleanup.enter_context(Generator(lab.client, cpu=min(os.sched_getaffinity(0))))
        answers = Answers(lab)
        cleanup.callback(answers.close)
        question = query()
        known = udp_frame(lab.client, lab.server, DNS_PORT, question, source_port=QUERY_PORT)
        stranger = STRANGERS.network_address
        other = udp_frame(lab.client, lab.server, DNS_PORT, question, source_address=stranger)
        generator.start(
            [
                Stream([Template(known, stamp=STAMP)], rate=QUERY_RATE, name="known"),
                Stream([Template(other)], rate=flood, sources=STRANGERS.num_addresses, name="flood"),
            ],
            seconds,
        )
        result = generator.wait()
        answers.settle()
        asked, flooded = result.streams
        return Run(
            sluice=sluice,
            queries=asked.sent,
            answered=len(answers.numbers),
            flood=flooded.sent,
            flood_per_second=round(flooded.sent / flooded.seconds) if flooded.seconds else 0,
            refused=result.refused,
        )


@click.command(
    name="dns",
    epilog=examples(
        """sudo sluice lab dns
        sudo sluice lab dns --seconds 10 --flood 1000000 --json"""
    ),
)
@click.option(
    "--seconds", type=click.FloatRange(0.5, 600), default=5.0, show_default=True, help="Of each flood."
)
@click.option("--flood", type=click.IntRange(1000, 20_000_000), default=600_000, show_default=True,
              help="Packets per second from strangers.")  # fmt: skip
@click.option("--only", type=click.Choice(["with", "without"]), help="Run only one of the two.")
@common_options
def dns(output: Output, seconds: float, flood: int, only: str | None) -> int:
    """Flood an unmodified DNS server, without Sluice and with it.

    Exit code 0 only when, with Sluice, every question of the known resolver was answered.
    """
    wanted = {"with": [True], "without": [False]}.get(only or "", [False, True])
    runs = [run_once(output, sluice=sluice, seconds=seconds, flood=flood) for sluice in wanted]
    ok = all(run.lost == 0 and run.queries > 0 for run in runs if run.sluice)
    document = {"runs": [{**asdict(run), "lost": run.lost} for run in runs], "ok": ok}
    output.report(document, lambda: output.table(_table(runs)))
    return 0 if ok else 1


def _table(runs: list[Run]) -> Table:
    rows: list[list[str]] = [
        [
            "with Sluice" if run.sluice else "without",
            f"{run.queries:,}",
            f"{run.answered:,}",
            f"{run.lost:,}",
            f"{run.flood_per_second:,}",
        ]
        for run in runs
    ]
    return Table(
        title="a DNS server under a flood of strangers",
        columns=["", "known asked", "answered", "lost", "flood packets/s"],
        rows=rows,
        right=frozenset({1, 2, 3, 4}),
    )

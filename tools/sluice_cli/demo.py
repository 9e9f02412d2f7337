# SPDX-License-Identifier: Apache-2.0
"""``sluice demo``: the promise, shown on this machine.

Two hosts of a lab.  The client sends votes and shreds of a staked peer, and from
thousands of other addresses a flood to the same port as the votes; the server
runs the validator's example policy and receives all lanes in Python.  The lowest
lane is worked at far more slowly than the flood comes in.

The flood is paced so that the interface loses nothing, so what is missing at the
end was lost by us or dropped with a reason, and the sums must show which.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from sluice_cli.demo_receiver import Arguments
from sluice_cli.demo_report import build_report, live_table, tables
from sluice_cli.example_policy import example_policy
from sluice_cli.generator import Generator, Stream
from sluice_cli.lab import CLIENT_V4, Lab
from sluice_cli.output import Output, common_options, examples
from sluice_cli.pcap import Capture
from sluice_cli.peers import Filter, peer_document
from sluice_cli.peers import select as busiest
from sluice_cli.replay import Sender, Summary, replay_capture
from sluice_cli.status_sample import read_counters
from sluice_cli.traffic import (
    SHRED_STAMP,
    VOTE_STAMP,
    Address,
    Template,
    shred_payload,
    udp_frame,
    vote_payload,
)
from xdp import inventory
from xdp.classify import Classifier
from xdp.counters import Counters
from xdp.errors import SluiceError, UsageError
from xdp.names import Names
from xdp.policy import Policy

#: The validator's example; the lab's client is one of its staked peers.
POLICY: Final = "validator.toml"

VOTE_PORT: Final = 8005
TURBINE_PORT: Final = 8002
VOTES: Final = 2000  # packets per second, half of them IPv6; a large cluster's votes
SHREDS: Final = 1000  # packets per second of each kind
FLOOD: Final = 300_000  # packets per second, unless the machine is slower
FLOOD_SOURCES: Final = 4096
#: The lowest lane is worked at this rate; ten times as much must come in, also on a machine that is slower.
SLOW_RATE: Final = 10_000.0
_CAPTURE_RATE: Final = 2000.0  # datagrams per second
_PIPE_BYTES: Final = 65536
_START_TIMEOUT: Final = 60.0  # seconds; compiling takes 2 of them on an idle machine
_FINISH_TIMEOUT: Final = 60.0
_END_TIMEOUT: Final = 10.0


@dataclass
class Sent:
    """What was sent, by name of the lane it belongs to."""

    packets: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    digests: dict[str, Counter[str]] = field(default_factory=dict)


class ReceiverProcess:
    """The application, in the server's namespace."""

    def __init__(self, lab: Lab, arguments: Arguments) -> None:
        command = [sys.executable, "-m", "sluice_cli.demo_receiver", json.dumps(asdict(arguments))]
        self._process = lab.server.popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout.fileno()
        self._said = b""
        self.latest: dict[str, Any] = {}

    def wait_ready(self) -> dict[str, Any]:
        """Until it receives. Raises SluiceError with what it said when it does not come up."""
        return self._next(_START_TIMEOUT)

    def poll(self) -> None:
        """Take in the reports that have come."""
        while (line := self._line(0)) is not None:
            self.latest = json.loads(line)

    def finish(self) -> dict[str, Any]:
        """Let it drain its lanes; the last report."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"finish\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None
        while True:
            report = self._next(_FINISH_TIMEOUT)
            if "frames_balanced" in report:
                return report

    def close(self) -> None:
        """End it; its program goes off the interface with it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _line(self, timeout: float) -> bytes | None:
        """The next whole line, or None when none came in time."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._said:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                return None
            more = os.read(self._pipe, _PIPE_BYTES)
            if not more:
                raise self._failed()
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        return line

    def _next(self, timeout: float) -> dict[str, Any]:
        line = self._line(timeout)
        if line is None:
            raise SluiceError(f"the demo's receiver said nothing for {timeout:.0f} s")
        found: dict[str, Any] = json.loads(line)
        return found

    def _failed(self) -> SluiceError:
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode(errors="replace")
        last = said.strip().splitlines()[-1] if said.strip() else "no word of why"
        return SluiceError(f"the demo's receiver ended: {last}", detail=said)


def streams(lab: Lab, flood: int, *, shreds: bool) -> list[Stream]:
    """Named by the lane they belong to."""
    client, server = lab.client, lab.server
    vote = vote_payload()
    found = [
        Stream(
            [Template(udp_frame(client, server, VOTE_PORT, vote, version=version), stamp=VOTE_STAMP)],
            rate=VOTES / 2,
            name="votes",
        )
        for version in (4, 6)
    ]
    if shreds:
        for kind in ("data", "code"):
            frame = udp_frame(client, server, TURBINE_PORT, shred_payload(kind))
            found.append(Stream([Template(frame, stamp=SHRED_STAMP)], rate=SHREDS, name=f"shreds-{kind}"))
    stranger = type(client.ipv4)("10.81.16.0")
    frame = udp_frame(client, server, VOTE_PORT, bytes(22), source_address=stranger)
    found.append(Stream([Template(frame)], rate=flood, sources=FLOOD_SOURCES, name="bulk"))
    return found


def expect_capture(path: Path, source: Address, policy: Policy, sent: Sent) -> None:
    """Read a capture and note which of its datagrams must arrive in which lane.

    Raises:
        UsageError: it holds no UDP datagram.
    """
    classifier = Classifier(policy)
    names = [lane.name for lane in policy.lanes]
    for datagram in Capture(path):
        payload = bytes(datagram.payload)
        verdict = classifier.classify_datagram(source, TURBINE_PORT, payload, time.monotonic_ns())
        if verdict.lane is not None:
            lane = names[verdict.lane]
            sent.packets[lane] += 1
            sent.digests.setdefault(lane, Counter())[hashlib.sha256(payload).hexdigest()] += 1
    if not sent.packets:
        raise UsageError(f"{path} holds no UDP datagrams", hint="`sluice replay --help` says what is read")


def send_capture(path: Path, lab: Lab, cpu: int) -> Summary:
    """Replay its datagrams to the turbine port, from the generator's CPU.

    A flood from one CPU leaves room on the cable; a second one that sends may find it full.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        with lab.client.enter(), Sender(lab.server.ipv4, TURBINE_PORT) as sender:
            return replay_capture(Capture(path), sender, pace=_CAPTURE_RATE)
    finally:
        os.sched_setaffinity(0, before)


def _counters(lab: Lab) -> Counters:
    with lab.server.enter():
        return read_counters(inventory.find(lab.server.interface))


@click.command(
    epilog=examples(
        """sudo sluice demo
        sudo sluice demo --seconds 20
        sudo sluice demo --pcap shreds.pcap --json"""
    )
)
@click.option("--pcap", type=click.Path(path_type=Path), help="Send this capture's datagrams as shreds.")
@click.option("--seconds", type=click.FloatRange(1, 3600), default=5.0, show_default=True, help="Of traffic.")
@click.option("--flood", type=click.IntRange(1000, 20_000_000), default=FLOOD, show_default=True,
              help="Packets per second into the lowest lane.")  # fmt: skip
@common_options
def demo(output: Output, pcap: Path | None, seconds: float, flood: int) -> int:
    """Show the promise: votes arrive while the low lane is flooded.

    Builds two hosts on this machine, loads the validator's example policy on one,
    sends votes, shreds and a flood from the other, receives all lanes in Python,
    and takes everything down.  Exit code 0 only when the highest lane lost nothing
    and all counters add up.
    """
    path = example_policy(POLICY)
    policy = Policy.load(path)
    if pcap is not None and not pcap.is_file():
        raise UsageError(f"there is no file {pcap}", hint="give a pcap or pcapng file with UDP datagrams")
    document = _run(output, path, policy, pcap, seconds, flood)
    output.report(document, lambda: output.tables(tables(document)))
    return 0 if document["ok"] else 1


def _run(
    output: Output, path: Path, policy: Policy, pcap: Path | None, seconds: float, flood: int
) -> dict[str, Any]:
    names = [lane.name for lane in policy.lanes]
    arguments = Arguments(
        policy=str(path),
        interface="",
        slow_lane=names.index("bulk"),
        slow_rate=SLOW_RATE,
        digest_lanes=[] if pcap is None else [names.index("shreds-data"), names.index("shreds-code")],
    )
    with ExitStack() as cleanup:
        sent = Sent()
        if pcap is not None:  # a file that can't be read is told before anything is built
            expect_capture(pcap, CLIENT_V4.ip, policy, sent)
        output.progress("building the lab")
        lab = cleanup.enter_context(Lab(static_neighbours=True))
        arguments.interface = lab.server.interface
        output.progress("loading the program, opening the lanes")
        receiver = ReceiverProcess(lab, arguments)
        cleanup.callback(receiver.close)
        ready = receiver.wait_ready()
        output.progress(f"lanes are open ({ready['mode']}); sending for {seconds:g} s")
        generator = cleanup.enter_context(Generator(lab.client, cpu=min(os.sched_getaffinity(0))))
        began = time.monotonic()
        generator.start(streams(lab, flood, shreds=pcap is None), seconds)
        capture = None if pcap is None else send_capture(pcap, lab, generator.cpu)
        _watch(output, lab, receiver, generator, names)
        result = generator.wait()
        for stream in result.streams:
            sent.packets[stream.name] += stream.sent
            sent.missed += stream.missed
        output.progress("draining")
        last = receiver.finish()
        return build_report(
            policy=policy,
            sent=sent.packets,
            missed=sent.missed,
            digests=sent.digests,
            capture=None if capture is None else capture.document(),
            receiver=last,
            counters=_counters(lab),
            peers=_peers(lab, policy),
            seconds=result.seconds or (time.monotonic() - began),
        )


def _watch(
    output: Output,
    lab: Lab,
    receiver: ReceiverProcess,
    generator: Generator,
    names: list[str],
) -> None:
    """Until the generator is done: a live table for those who watch."""

    def frames() -> Iterator[tuple[dict[str, Any], Any]]:
        while generator.running:
            receiver.poll()
            table = live_table(names, generator.result(), receiver.latest, _counters(lab))
            yield {}, [table]
            _pause(generator)

    if sys.stdout.isatty() and not output.json:
        output.watch(frames())
        return
    while generator.running:
        receiver.poll()
        _pause(generator)


def _pause(generator: Generator) -> None:
    """A quarter of a second, or until the generator is done."""
    deadline = time.monotonic() + 0.25
    while generator.running and time.monotonic() < deadline:
        time.sleep(0.02)


def _peers(lab: Lab, policy: Policy) -> list[dict[str, Any]]:
    names = Names.from_policy(policy)
    with lab.server.enter():
        wanted = Filter(5, "packets", None, None, everything=False, held=False)
        found, _ = busiest(inventory.find(lab.server.interface), names, wanted, {})
    return [peer_document(peer, names, {}) for peer in found]

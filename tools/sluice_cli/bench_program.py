# SPDX-License-Identifier: Apache-2.0
"""``sluice bench program``: what one packet costs in the steer program.

The kernel's test runs (BPF_PROG_TEST_RUN) repeat a packet in a loop and tell the mean time of a
round.  That includes the loop itself, so the cost of a program that does nothing stands beside every
row.  Each case is run many times for a moment, in turns with the others; the least is taken, because
whatever else the machine does can only add to it.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final, Literal

import click

from sluice_cli.idle_socket import IdleSocket
from sluice_cli.output import Output, Table, common_options, examples
from xdp._libbpf import ffi, lib
from xdp.errors import SluiceError
from xdp.policy import Policy
from xdp.program import SteerProgram, load_bytecode
from xdp.tables import compile_policy

_PORT: Final = 8001
#: Addresses that the random-peers build draws from; as many as strangers are remembered.
_RANDOM_PEERS: Final = lib.SLUICE_MAX_STRANGERS
#: So many that hardly any address comes twice: a flood of invented ones.
_NEW_PEERS: Final = 1 << 24
#: Test runs of one call: some ms, so short that most calls are not interrupted.
_ROUNDS: Final = 20_000
#: Before random peers are measured each of them has to be there: 65,536 * 20 draws miss none.
_WARM_UP: Final = 20 * _RANDOM_PEERS

# A real policy: kinds told apart by a pattern, classes by prefixes, a configured peer, a limited lane.
_POLICY: Final = f"""
version = 1
[[lane]]
name = "votes"
[[lane]]
name = "limited"
rate = 100000000
burst = 100000000
[[class]]
name = "staked"
prefixes = ["10.0.0.0/8", "2001:db8::/32"]
peers = ["192.0.2.7", "2001:db8:ffff::7"]
[[service]]
name = "tpu"
ports = [{_PORT}]
  [[service.kind]]
  name = "vote"
  match = [{{ offset = 0, value = "56" }}]
  [[service.rule]]
  kind = "vote"
  action = "lane"
  lane = "votes"
  [[service.rule]]
  action = "lane"
  lane = "limited"
"""

# linux/bpf.h: r0 = XDP_PASS; exit
_EMPTY: Final = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)

Family = Literal["v4", "v6"]


@dataclass
class Case:
    """One row: a packet and a program to run it in."""

    name: str
    family: Family
    peers: Literal["hot", "random", "new"]
    fd: int
    frame: bytes
    best_ns: int = field(default=1 << 62)

    def run(self, rounds: int = _ROUNDS) -> None:
        """Once more; keeps the least."""
        run = ffi.new("struct sluice_test_run *")
        held = ffi.from_buffer("char[]", self.frame)
        run.data_in, run.data_size_in, run.repeat = held, len(self.frame), rounds
        result = lib.sluice_prog_test_run(self.fd, run)
        if result < 0:
            raise SluiceError.from_errno(f"test run of {self.name}", -result)
        self.best_ns = min(self.best_ns, run.duration_ns)


@click.command(
    epilog=examples(
        """sudo sluice bench program
        sudo sluice bench program --seconds 20 --json"""
    )
)
@click.option(
    "--seconds", type=click.FloatRange(0.5, 600), default=8.0, show_default=True, help="How long to measure."
)
@common_options
def program(output: Output, seconds: float) -> None:
    """Measure the steer program's time per packet, by the kernel's own test runs.

    Cases: a port that is not ours; a hot peer, configured or not, in an unlimited and a limited lane;
    random peers among 65,536; addresses that never came before, as a flood invents them. The figures hold
    the kernel's loop, which "empty" shows by itself. Lanes have an AF_XDP socket, so the program goes all
    its way; handing over to the socket is not in it.
    """
    rows = program_rows(seconds)
    output.report({"results": rows}, lambda: output.table(program_table(rows)))


def program_rows(seconds: float) -> list[dict[str, Any]]:
    """A row for each case."""
    cases, empty = measure(seconds)
    return [
        {
            "direction": "program",
            "family": case.family,
            "peers": case.peers,
            "case": case.name,
            "ns_per_packet": case.best_ns,
            "empty_ns": empty,
        }
        for case in cases
    ]


def program_table(rows: Sequence[dict[str, Any]]) -> Table:
    """For people."""
    empty = rows[0]["empty_ns"]
    return Table(
        ["case", "family", "peers", "ns/packet", "without the loop"],
        [
            [row["case"], row["family"], row["peers"], str(row["ns_per_packet"]),
             str(row["ns_per_packet"] - empty)]
            for row in rows
        ],
        right=frozenset({3, 4}),
        title=f"an empty program: {empty} ns",
    )  # fmt: skip


def measure(seconds: float) -> tuple[list[Case], int]:
    """All cases with their best times in nanoseconds, and that of a program that does nothing."""
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        # The last CPU: the first one serves most interrupts.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        idle = stack.enter_context(IdleSocket())
        hot = stack.enter_context(_loaded(idle, ()))
        empty_fd = load_bytecode("sluice_empty", _EMPTY)
        stack.callback(os.close, empty_fd)

        hot_cases = [Case(name, family, "hot", hot.fd, frame) for name, family, frame in _frames(_HOT)]
        random_cases: list[Case] = []
        for peers, count in _DRAWN:
            for name, family, frame in _frames(_RANDOM):
                # Each its own: the strangers of another case would lie between this one's.
                own = stack.enter_context(_loaded(idle, (f"SLUICE_BENCH_RANDOM_PEERS={count}",)))
                random_cases.append(Case(name, family, peers, own.fd, frame))
        empty = Case("empty", "v4", "hot", empty_fd, hot_cases[0].frame)
        _take_turns([empty, *hot_cases], seconds * 0.6)
        for case in random_cases:
            # Apart from the others, which would find their caches empty.
            case.run(_WARM_UP)
            _take_turns([case], seconds * 0.1)
        return [*hot_cases, *random_cases], empty.best_ns


def _loaded(idle: IdleSocket, defines: Sequence[str]) -> SteerProgram:
    loaded = SteerProgram.load(defines=defines)
    try:
        loaded.swap(compile_policy(Policy.parse(_POLICY)))
        # Test runs come from queue 0.
        idle.fill(loaded.maps["xsks"], lib.SLUICE_MAX_LANES)
    except BaseException:
        loaded.close()
        raise
    return loaded


def _take_turns(cases: Sequence[Case], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        for case in cases:
            case.run()
        if time.monotonic() >= deadline:
            return


_VOTE, _OTHER = b"\x56" + bytes(21), bytes(22)  # frames of 64 bytes in IPv4
_HOT: Final = (
    ("not ours", "192.0.2.7", "2001:db8:ffff::7", 1, _VOTE),
    ("configured peer", "192.0.2.7", "2001:db8:ffff::7", _PORT, _VOTE),
    ("stranger", "10.1.2.3", "2001:db8::1:2:3", _PORT, _VOTE),
    ("stranger, lane limit", "10.1.2.3", "2001:db8::1:2:3", _PORT, _OTHER),
)
_DRAWN: Final[tuple[tuple[Literal["random", "new"], int], ...]] = (
    ("random", _RANDOM_PEERS), ("new", _NEW_PEERS),
)  # fmt: skip
_RANDOM: Final = (("stranger", "10.1.2.3", "2001:db8::1:2:3", _PORT, _VOTE),)


def _frames(cases: Sequence[tuple[str, str, str, int, bytes]]) -> list[tuple[str, Family, bytes]]:
    found: list[tuple[str, Family, bytes]] = []
    for name, v4, v6, port, payload in cases:
        found += [(name, "v4", _frame(v4, port, payload)), (name, "v6", _frame(v6, port, payload))]
    return found


def _frame(source: str, port: int, payload: bytes) -> bytes:
    """Ethernet, IP and UDP; checksums are not looked at by the program."""
    address: IPv4Address | IPv6Address = ip_address(source)
    udp = struct.pack("!HHHH", 4000, port, 8 + len(payload), 0) + payload
    if isinstance(address, IPv4Address):
        target = IPv4Address("192.0.2.1").packed
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + address.packed + target
        return bytes(12) + b"\x08\x00" + ip + udp
    target = IPv6Address("2001:db8:ffff::1").packed
    ip = struct.pack("!IHBB", 6 << 28, len(udp), 17, 64) + address.packed + target
    return bytes(12) + b"\x86\xdd" + ip + udp

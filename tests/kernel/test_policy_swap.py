# SPDX-License-Identifier: Apache-2.0
"""Policies swapped under fire: no packet sees half of each, none is lost, peers stay who they are."""

from __future__ import annotations

import os
import struct
import threading
import time
from ipaddress import IPv4Address, ip_address

import pytest

from tests.kernel import frames
from tests.kernel.steer_runs import XDP_DROP, XDP_PASS, XDP_REDIRECT, SteerRuns
from xdp._libbpf import ffi, lib
from xdp.abi import pack_address
from xdp.errors import PolicyError
from xdp.policy import Policy
from xdp.policy_maps import wait_for_running_programs
from xdp.tables import KnownTable, compile_policy

pytestmark = pytest.mark.bpf

PORT = 8001
SWAPS = 250


def turn(*, even: bool) -> Policy:
    """Two policies that agree on nothing: service, class, kind, lane, and what is done.

    In the even one service 1 owns the port, class 1 the source, kind 1 the payload, and the packet is
    steered to lane 1.  In the odd one it is service 2, class 2, kind 2, lane 2, and the lanes before
    and after are drops by rules that only a mixture would meet.
    """
    number = 1 if even else 2
    other = 3 - number
    classes = {number: '["198.18.0.0/15", "2001:db8::/32"]', other: '["192.0.2.0/24"]'}
    kinds = {number: 'value = "90"', other: 'value = "91"'}
    rules = f"""
  [[service.rule]]
  class = "class{number}"
  kind = "kind{number}"
  action = "lane"
  lane = "lane{number}"
  [[service.rule]]
  action = "drop"
"""
    body = "".join(
        f'  [[service.kind]]\n  name = "kind{n}"\n  match = [{{ offset = 0, {kinds[n]} }}]\n' for n in (1, 2)
    )
    services = "".join(
        f'[[service]]\nname = "service{n}"\nports = [{PORT if n == number else 9}]\n{body}{rules}'
        for n in (1, 2)
    )
    return Policy.parse(
        "version = 1\n"
        + "".join(f'[[lane]]\nname = "lane{n}"\n' for n in range(3))
        + "".join(f'[[class]]\nname = "class{n}"\nprefixes = {classes[n]}\n' for n in (1, 2))
        + services
    )


class Fire(threading.Thread):
    """Runs packets on one CPU until told to stop; keeps every combination of metadata that came out."""

    def __init__(self, runs: SteerRuns, cpu: int, sources: list[str]) -> None:
        super().__init__()
        self.program = runs.program
        self.cpu = cpu
        self.frames = [frames.udp_frame(source, PORT, b"\x90\x91") for source in sources]
        self.enough = threading.Event()
        self.started = threading.Event()
        self.actions: dict[int, int] = {}
        self.seen: dict[tuple[int, int, int, int], int] = {}

    def run(self) -> None:
        os.sched_setaffinity(0, {self.cpu})
        run = ffi.new("struct sluice_test_run *")
        out = ffi.new("char[]", 2048)
        while not self.enough.is_set():
            for frame in self.frames:
                held = ffi.from_buffer("char[]", frame)
                run.data_in, run.data_size_in, run.repeat = held, len(frame), 1
                run.data_out, run.data_size_out = out, 2048
                if lib.sluice_prog_test_run(self.program.fd, run):
                    return
                self.actions[run.retval] = self.actions.get(run.retval, 0) + 1
                if run.retval == XDP_REDIRECT:
                    *_, lane, service, kind, class_id = struct.unpack_from("=IIQHHBBBB", ffi.buffer(out))
                    key = (lane, service, kind, class_id)
                    self.seen[key] = self.seen.get(key, 0) + 1
            self.started.set()


@pytest.fixture
def fire(runs: SteerRuns) -> list[Fire]:
    """A shooter per CPU (at most four)."""
    sources = ["198.18.0.1", "2001:db8::1", *(f"198.19.0.{host}" for host in range(50))]
    return [Fire(runs, cpu, sources) for cpu in range(min(os.cpu_count() or 1, 4))]


def test_every_verdict_belongs_to_one_policy(runs: SteerRuns, fire: list[Fire]) -> None:
    # The payload's first byte is 0x90 for kind 1, so the odd policy looks for 0x90 under the number 2.
    even, odd = turn(even=True), turn(even=False)
    tables = [compile_policy(even), compile_policy(odd)]
    first = runs.program.swap(tables[0])
    assert runs(fire[0].frames[0]).meta is not None
    for shooter in fire:
        shooter.start()
    try:
        for shooter in fire:
            assert shooter.started.wait(30)
        start = time.monotonic()
        for number in range(SWAPS):
            assert runs.program.swap(tables[(number + 1) % 2]) == first + number + 1
        elapsed = time.monotonic() - start
    finally:
        for shooter in fire:
            shooter.enough.set()
            shooter.join()
    assert runs.program.policy_maps.generation == first + SWAPS
    seen: dict[tuple[int, int, int, int], int] = {}
    for shooter in fire:
        assert shooter.actions.keys() == {XDP_REDIRECT}
        for key, count in shooter.seen.items():
            seen[key] = seen.get(key, 0) + count
    print(f"{SWAPS} swaps in {elapsed:.2f} s, {sum(seen.values())} packets: {seen}")
    assert seen.keys() == {(1, 1, 1, 1), (2, 2, 2, 2)}
    assert min(seen.values()) > 100
    assert runs.program.counters().balanced


def with_peers(count: int, *, first: int = 0, prefixes: int = 0) -> Policy:
    """``count`` configured peers from 100.64.0.0 on, and as many /28 of other addresses as asked for."""
    peers = ", ".join(f'"{IPv4Address(0x64400000 + first + number)}"' for number in range(count))
    nets = ", ".join(f'"{IPv4Address(0x0A000000 + 16 * number)}/28"' for number in range(prefixes))
    return Policy.parse(f"""
version = 1
[[lane]]
name = "high"
[[lane]]
name = "low"
[[class]]
name = "friends"
peers = [{peers}]
[[class]]
name = "nets"
prefixes = [{nets}]
[[service]]
name = "s"
ports = [{PORT}]
  [[service.rule]]
  class = "friends"
  action = "lane"
  lane = "high"
  [[service.rule]]
  class = "nets"
  action = "drop"
  [[service.rule]]
  action = "lane"
  lane = "low"
""")


def test_peers_keep_their_numbers_and_counters(runs: SteerRuns) -> None:
    runs.use(with_peers(10))
    sources = [str(IPv4Address(0x64400000 + number)) for number in range(10)]
    addresses = [pack_address(ip_address(source)) for source in sources]
    for count, source in enumerate(sources, 1):
        for _ in range(count):
            assert runs(frames.udp_frame(source, PORT)).lane == 0
    before = [(runs.peer(address).id, runs.peer(address).peer.packets) for address in addresses]
    assert len({number for number, _ in before}) == 10

    # The first five leave, ten new ones come: nobody's number changes, no number is given twice.
    runs.use(with_peers(15, first=5))
    for address, (number, packets) in list(zip(addresses, before, strict=True))[5:]:
        assert (runs.peer(address).id, runs.peer(address).peer.packets) == (number, packets)
    for address in addresses[:5]:
        assert runs.program.maps["known"].lookup(address) is None
    held = {struct.unpack_from("=I", value, ffi.offsetof("struct sluice_known", "id"))[0]
            for _, value in runs.program.maps["known"].items()}  # fmt: skip
    assert len(held) == 15
    assert 0 not in held

    # Who has left is a stranger, with another class; who came is a friend.
    got = runs(frames.udp_frame(sources[0], PORT))
    assert got.lane == 1
    assert got.meta is not None
    assert got.meta.peer == 0
    got = runs(frames.udp_frame(str(IPv4Address(0x64400000 + 19)), PORT))
    assert got.lane == 0
    assert got.meta is not None
    assert got.meta.peer in held


def test_a_stranger_that_becomes_a_friend(runs: SteerRuns) -> None:
    runs.use(with_peers(1))
    later = str(IPv4Address(0x64400001))
    got = runs(frames.udp_frame(later, PORT))
    assert (got.lane, got.meta and got.meta.peer) == (1, 0)
    runs.use(with_peers(2))
    got = runs(frames.udp_frame(later, PORT))
    assert got.lane == 0
    assert got.meta is not None
    assert got.meta.peer == runs.peer_number(2) > 0


def test_fifty_thousand_peers_and_prefixes(runs: SteerRuns) -> None:
    big, small = with_peers(50_000, prefixes=50_000), with_peers(3)
    tables = compile_policy(big)
    start = time.monotonic()
    runs.program.swap(tables)
    first = time.monotonic() - start
    assert sum(1 for _ in runs.program.maps["known"].items()) == 50_000
    for number in (0, 1, 777, 49_999):
        assert runs(frames.udp_frame(str(IPv4Address(0x64400000 + number)), PORT)).lane == 0
        inside = str(IPv4Address(0x0A000000 + 16 * number + 5))
        assert runs(frames.udp_frame(inside, PORT)).name == "drop_policy"
    assert runs(frames.udp_frame(str(IPv4Address(0x64400000 + 50_000)), PORT)).lane == 1
    start = time.monotonic()
    runs.program.swap(tables)
    again = time.monotonic() - start
    start = time.monotonic()
    runs.use(small)
    away = time.monotonic() - start
    print(f"50,000 peers and prefixes: {first:.2f} s, again {again:.2f} s, away {away:.2f} s")
    assert sum(1 for _ in runs.program.maps["known"].items()) == 3
    assert runs(frames.udp_frame("10.0.0.5", PORT)).lane == 1
    # Generous: what it takes here is about a tenth of it.
    assert max(first, again, away) < 20


def test_a_bank_that_is_used_again_keeps_nothing(runs: SteerRuns) -> None:
    """Ports, patterns, rules and prefixes of the policy before the last are gone, not merely hidden."""
    runs.use(turn(even=True))
    runs.use(turn(even=False))
    runs.use(with_peers(1, prefixes=2))
    runs.use(with_peers(1))
    for bank in range(2):
        rows = runs.program.maps[f"prefixes_{bank}"]
        assert sum(1 for _ in rows.items()) == (1 if bank == runs.program.policy_maps.generation % 2 else 3)
    ports = dict(runs.program.maps["ports"].items())
    used = [key for key, value in ports.items() if value[0]]
    assert sorted(struct.unpack("=I", key)[0] for key in used) == [PORT, lib.SLUICE_PORTS + PORT]
    for name in ("patterns", "rules"):
        size = runs.program.maps[name].info.max_entries
        assert sum(1 for _ in runs.program.maps[name].items()) == size
    assert not any(any(value) for _, value in runs.program.maps["patterns"].items())


def test_tables_that_do_not_fit_change_nothing(runs: SteerRuns) -> None:
    runs.use(with_peers(1))
    generation = runs.program.policy_maps.generation
    tables = compile_policy(with_peers(1))
    too_many = lib.SLUICE_MAX_KNOWN + 1
    object.__setattr__(tables, "known", KnownTable(tables.known.keys, tables.known.ids, too_many))
    with pytest.raises(PolicyError, match="131,073 configured peers; at most 131,072 fit"):
        runs.program.swap(tables)
    assert runs.program.policy_maps.generation == generation


def test_two_writers_take_turns(runs: SteerRuns) -> None:
    """Neither is lost, and what is in force in the end is one of the two, whole."""
    tables = [compile_policy(turn(even=even)) for even in (True, False)]
    first = runs.program.policy_maps.generation
    writers = [
        threading.Thread(target=lambda mine=mine: [runs.program.swap(mine) for _ in range(20)])
        for mine in tables
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert runs.program.policy_maps.generation == first + 40
    got = runs(frames.udp_frame("198.18.0.1", PORT, b"\x90\x91"))
    assert got.meta is not None
    assert got.meta[-4:] in {(1, 1, 1, 1), (2, 2, 2, 2)}


def test_waiting_for_packets_on_their_way(runs: SteerRuns) -> None:
    """A grace period takes some time, an immediate return would be none; and it leaves no descriptor."""
    held = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(20):
        wait_for_running_programs()
    assert len(os.listdir("/proc/self/fd")) == held  # noqa: PTH208
    assert runs.raw(frames.udp_frame("198.18.0.1", 7))[0] == XDP_PASS != XDP_DROP

# SPDX-License-Identifier: Apache-2.0
"""Peers held at the door: exact counts by test runs, who is touched and who is not, how a hold ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

from tests.kernel import frames
from tests.kernel.steer_runs import SteerRuns
from xdp._libbpf import ffi
from xdp.abi import REASONS, pack_address
from xdp.classify import Classifier
from xdp.errors import UnsupportedError, UsageError
from xdp.holds import Held, HoldTable, PeerHolds
from xdp.maps import BpfMap

pytestmark = pytest.mark.bpf

PORT = 8001
HELD, OTHER, HELD_V6, STRANGER = "203.0.113.9", "203.0.113.10", "2001:db8::9", "198.18.0.1"
#: No packet of a test waits so long for its turn.
LONG = 600.0


def policy(*peers: str, more: str = "", peer_rate: int | None = None) -> str:
    named = ", ".join(f'"{peer}"' for peer in peers or (HELD, OTHER, HELD_V6))
    limit = f"peer_rate = {peer_rate}\npeer_burst = 2\n" if peer_rate else ""
    return f"""
version = 1
[[lane]]
name = "high"
[[lane]]
name = "low"
[[class]]
name = "friends"
peers = [{named}]
{limit}
[[service]]
name = "s"
ports = [{PORT}]
{more}
  [[service.rule]]
  action = "lane"
  lane = "high"
"""


@pytest.fixture
def holds(runs: SteerRuns) -> Iterator[PeerHolds]:
    runs.use(policy())
    with PeerHolds(runs.program.maps) as made:
        yield made


def send(runs: SteerRuns, source: str, count: int) -> list[str]:
    packet = frames.udp_frame(source, PORT, bytes(16))
    return [runs(packet).name for _ in range(count)]


@pytest.mark.parametrize("address", [HELD, HELD_V6])
def test_a_held_peer_and_no_other(runs: SteerRuns, holds: PeerHolds, address: str) -> None:
    """As many as the burst, then none; whoever else comes, comes through."""
    before = runs.program.counters().verdicts
    counts = holds.counts([address, OTHER, STRANGER])
    assert counts.keys() == {ip_address(address), ip_address(OTHER)}
    holds.hold(address, 1, 7, seconds=LONG)
    assert send(runs, address, 20) == ["steer"] * 7 + ["drop_held"] * 13
    for source in {OTHER, STRANGER, HELD, HELD_V6} - {address}:
        assert set(send(runs, source, 20)) == {"steer"}
    after = holds.counts([address, OTHER])
    old, new = (one[ip_address(address)] for one in (counts, after))
    packets, size, drops = (now - then for then, now in zip(old, new, strict=True))
    assert (packets, drops) == (20, 13)
    assert size == 20 * len(frames.udp_frame(address, PORT, bytes(16)))
    assert holds.drops([OTHER]) == {ip_address(OTHER): counts[ip_address(OTHER)].drops}
    counters = runs.program.counters()
    assert counters.verdicts["drop_held"].packets - _packets(before, "drop_held") == 13
    (held,) = holds.held().items()
    assert held[0] == ip_address(address)
    assert held[1]._replace(seconds=0) == Held(1, 7, 0, 13)
    assert LONG - 60 < held[1].seconds <= LONG


def _packets(verdicts: object, name: str) -> int:
    found = verdicts.get(name)  # type: ignore[attr-defined]
    return 0 if found is None else found.packets


def test_the_rate_is_that_of_the_reference(runs: SteerRuns, holds: PeerHolds) -> None:
    """Never more than rate * time + burst, and what a classifier says of the same times."""
    rate, burst = 2000, 20
    assert runs.policy is not None
    classifier = Classifier(runs.policy)
    packet = frames.udp_frame(HELD, PORT, bytes(16))
    start = time.monotonic_ns()
    holds.hold(HELD, rate, burst, seconds=LONG)
    classifier.hold(IPv4Address(HELD), rate, burst, until_ns=start + 10**12, now_ns=start)
    got: Counter[str] = Counter()
    least: Counter[str] = Counter()
    while time.monotonic_ns() - start < 2e8:
        least[REASONS[classifier.classify(packet, time.monotonic_ns()).reason]] += 1
        got[runs(packet).name] += 1
    elapsed = (time.monotonic_ns() - start) / 1e9
    assert got.keys() == {"steer", "drop_held"}
    assert got["steer"] <= rate * elapsed + burst
    # The program reads its clock a moment later than the classifier is told: each is near the other.
    assert abs(got["steer"] - least["steer"]) <= burst + 2


def test_a_hold_comes_before_the_class_and_the_stricter_wins(runs: SteerRuns, holds: PeerHolds) -> None:
    runs.use(policy(peer_rate=1))
    holds.hold(HELD, 1, 1, seconds=LONG)
    assert send(runs, HELD, 3) == ["steer", "drop_held", "drop_held"]
    holds.hold(OTHER, 1, 5, seconds=LONG)
    assert send(runs, OTHER, 7) == ["steer"] * 2 + ["drop_peer_limit"] * 3 + ["drop_held"] * 2


def test_over_a_hold_nothing_is_demoted_or_answered(runs: SteerRuns, holds: PeerHolds) -> None:
    heartbeat = '  [[service.rule]]\n  kind = "heartbeat"\n  action = "reply"\n  lane = "high"\n'
    demoting = '  [[service.rule]]\n  action = "lane"\n  lane = "high"\n  peer_rate = 1\n  demote = "low"\n'
    runs.use(policy(more=heartbeat + demoting))
    holds.hold(HELD, 1, 1, seconds=LONG)
    probe = bytearray(ffi.buffer(ffi.new("struct sluice_heartbeat *", {"type": 1})))
    probe[0:4] = b"SLHB"
    packet = frames.udp_frame(HELD, PORT, bytes(probe))
    assert [runs(packet).name for _ in range(2)] == ["reply", "drop_held"]
    assert send(runs, HELD, 2) == ["drop_held"] * 2


def test_renewed_it_is_no_new_burst(runs: SteerRuns, holds: PeerHolds) -> None:
    holds.hold(HELD, 1, 4, seconds=LONG)
    assert send(runs, HELD, 5) == ["steer"] * 4 + ["drop_held"]
    holds.hold(HELD, 1, 4, seconds=LONG)
    assert send(runs, HELD, 1) == ["drop_held"]
    holds.hold(HELD, 1, 6, seconds=LONG)
    assert send(runs, HELD, 3) == ["steer"] * 2 + ["drop_held"]
    assert holds.held()[ip_address(HELD)].drops == 3
    # What a slow rate has used up does not keep a fast one waiting.
    holds.hold(HELD, 1_000_000, 1, seconds=LONG)
    time.sleep(0.001)
    assert send(runs, HELD, 1) == ["steer"]


def test_released(runs: SteerRuns, holds: PeerHolds) -> None:
    holds.hold(HELD, 1, 1, seconds=LONG)
    assert send(runs, HELD, 2) == ["steer", "drop_held"]
    assert holds.release(HELD)
    assert not holds.release(HELD)
    assert not holds.release(OTHER)
    assert not holds.release(STRANGER)
    assert holds.held() == {}
    assert set(send(runs, HELD, 9)) == {"steer"}
    holds.hold(HELD, 1, 2, seconds=LONG)
    assert send(runs, HELD, 3) == ["steer", "steer", "drop_held"]


def test_it_ends_by_itself(runs: SteerRuns, holds: PeerHolds) -> None:
    """The program compares with its own clock: a hold whose time is over lets everything through."""
    with PeerHolds(runs.program.maps, clock=lambda: time.monotonic_ns() - 10**9) as earlier:
        earlier.hold(HELD, 1, 1, seconds=1.0)  # over now
    assert holds.held() == {}
    assert set(send(runs, HELD, 9)) == {"steer"}
    holds.hold(HELD, 1, 1, seconds=0.05)
    assert send(runs, HELD, 1) == ["steer"]
    deadline = time.monotonic() + 10
    while "drop_held" in (found := send(runs, HELD, 2)):
        assert time.monotonic() < deadline
    assert found == ["steer"] * 2


def test_killed_the_holder_leaves_nobody_held(runs: SteerRuns, holds: PeerHolds) -> None:
    """Another process holds, and is killed: its hold goes on to its end, and no longer."""
    code = textwrap.dedent(f"""
        import signal
        from xdp.holds import PeerHolds
        from xdp.maps import BpfMap
        ids = {_ids(runs)!r}
        with PeerHolds.open(lambda name: BpfMap.by_id(ids[name])) as holds:
            holds.hold("{HELD}", 1, 1, seconds=1.0)
            print("held", flush=True)
            signal.pause()
    """)
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while holds.held():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert set(send(runs, HELD, 5)) == {"steer"}


def _ids(runs: SteerRuns) -> dict[str, int]:
    return {name: runs.program.maps[name].info.id for name in ("known", "peer_holds", "hold_marks")}


def test_over_a_swap_of_the_policy(runs: SteerRuns, holds: PeerHolds) -> None:
    """Who stays is held; who leaves is not, nor when it comes back, nor who gets its number."""
    for address in (HELD, HELD_V6):
        holds.hold(address, 1, 1, seconds=LONG)
        assert send(runs, address, 2) == ["steer", "drop_held"]
    numbers = [runs.peer(pack_address(ip_address(address))).id for address in (HELD, HELD_V6)]
    runs.use(policy(HELD_V6, OTHER))
    assert set(send(runs, HELD, 3)) == {"steer"}
    assert send(runs, HELD_V6, 2) == ["drop_held"] * 2
    assert [*holds.held()] == [ip_address(HELD_V6)]
    runs.use(policy(HELD_V6, OTHER, "203.0.113.77", "203.0.113.78"))
    new = [runs.peer(pack_address(ip_address(f"203.0.113.{host}"))).id for host in (77, 78)]
    assert numbers[0] in new
    for host in (77, 78):
        assert set(send(runs, f"203.0.113.{host}", 3)) == {"steer"}
    runs.use(policy())
    assert set(send(runs, HELD, 3)) == {"steer"}
    assert send(runs, HELD_V6, 2) == ["drop_held"] * 2


def test_what_came_too_late_for_a_peer_that_left(runs: SteerRuns, holds: PeerHolds) -> None:
    """Its number is free, and held: whoever gets the number is not."""
    number = runs.peer(pack_address(ip_address(HELD))).id
    runs.use(policy(OTHER, HELD_V6))
    with HoldTable(runs.program.maps) as table:
        table.set(number, 10**9, 0, time.monotonic_ns() + 10**12, time.monotonic_ns())
        assert table.numbers() == [number]
    assert holds.held() == {}
    runs.use(policy(OTHER, HELD_V6, "203.0.113.99"))
    assert runs.peer(pack_address(ip_address("203.0.113.99"))).id == number
    assert set(send(runs, "203.0.113.99", 3)) == {"steer"}


class LeavesMeanwhile:
    """The map of configured peers, in which one is gone at the second look."""

    def __init__(self, known: BpfMap) -> None:
        self._known = known
        self._looks = 0

    def lookup(self, key: bytes) -> bytes | None:
        self._looks += 1
        return self._known.lookup(key) if self._looks == 1 else None


def test_a_peer_that_leaves_while_it_is_held(runs: SteerRuns, holds: PeerHolds) -> None:
    maps: dict[str, BpfMap] = dict(runs.program.maps)
    maps["known"] = LeavesMeanwhile(maps["known"])  # type: ignore[assignment]
    with PeerHolds(maps) as racing, pytest.raises(UsageError, match="no configured peer"):
        racing.hold(HELD, 1, 1)
    assert holds.held() == {}
    assert set(send(runs, HELD, 5)) == {"steer"}


def test_many_at_once(runs: SteerRuns, holds: PeerHolds) -> None:
    """More than are read one by one; sums are those of the program."""
    everybody = [str(IPv4Address(0x64400000 + number)) for number in range(1500)]
    runs.use(policy(*everybody))
    for number, address in enumerate(everybody):
        if number % 100 == 7:
            holds.hold(address, 1, 1 + number % 3, seconds=LONG)
    dropped = sum(
        send(runs, address, 4).count("drop_held") for address in everybody[::20] + everybody[7::100]
    )
    counts = holds.counts([*everybody, STRANGER])
    assert len(counts) == 1500
    assert sum(one.drops for one in counts.values()) == dropped == sum(holds.drops(everybody).values()) > 0
    held = holds.held()
    assert set(held) == {ip_address(address) for address in everybody[7::100]}
    assert sum(one.drops for one in held.values()) == dropped
    assert {str(address): one.burst for address, one in held.items()} == {
        address: 1 + number % 3 for number, address in enumerate(everybody) if number % 100 == 7
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((STRANGER, 1, 1, 1.0), "198.18.0.1 is no configured peer, and only those can be held"),
        (("nobody", 1, 1, 1.0), "'nobody' is no address; allowed: one IPv4 or IPv6 address"),
        ((None, 1, 1, 1.0), "None is no address"),
        ((HELD, 0, 1, 1.0), "rate of a hold: 0; allowed: a whole number from 1 to 10,000,000"),
        ((HELD, 10_000_001, 1, 1.0), "rate of a hold: 10000001"),
        ((HELD, 1.5, 1, 1.0), "rate of a hold: 1.5"),
        ((HELD, 1, 0, 1.0), "burst of a hold: 0; allowed: a whole number from 1 to 1,000,000"),
        ((HELD, 1, True, 1.0), "burst of a hold: True"),
        ((HELD, 1, 1, 0), "seconds of a hold: 0; allowed: above 0, at most 3,600"),
        ((HELD, 1, 1, float("nan")), "seconds of a hold: nan"),
        ((HELD, 1, 1, 3601), "seconds of a hold: 3601"),
        ((HELD, 1, 1, "1"), "seconds of a hold: '1'"),
    ],
)
def test_refused(holds: PeerHolds, arguments: tuple[object, ...], message: str) -> None:
    address, rate, burst, seconds = arguments
    with pytest.raises(UsageError) as error:
        holds.hold(address, rate, burst, seconds=seconds)  # type: ignore[arg-type]
    assert str(error.value).startswith(message)
    if address == STRANGER:
        assert "prefix_rate" in error.value.hint
    assert holds.held() == {}


def test_a_program_without_holds(runs: SteerRuns) -> None:
    opened: list[BpfMap] = []

    def open_map(name: str) -> BpfMap:
        if name == "hold_marks":
            raise UsageError("no such map")
        opened.append(BpfMap(os.dup(runs.program.maps[name].fd)))
        return opened[-1]

    with pytest.raises(UsageError, match="no such map"):
        PeerHolds.open(open_map)
    assert [one.fd for one in opened] == [-1, -1]
    with pytest.raises(UnsupportedError, match="knows of no peers that are held"):
        PeerHolds({"known": runs.program.maps["known"]})


def test_closing_twice(runs: SteerRuns, holds: PeerHolds) -> None:
    holds.hold(HELD, 1, 1, seconds=LONG)
    holds.close()
    holds.close()
    assert send(runs, HELD, 2) == ["steer", "drop_held"]

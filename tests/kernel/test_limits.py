# SPDX-License-Identifier: Apache-2.0
"""Rate limits in real time: never more than rate * time + burst, and nothing taken from who conforms.

Clocks are read around the runs, so a busy machine makes the bounds wider but never wrong.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, ip_address

import pytest

from tests.kernel import frames
from tests.kernel.steer_runs import XDP_DROP, XDP_REDIRECT, SteerRuns
from xdp._libbpf import ffi, lib
from xdp.abi import pack_address

pytestmark = pytest.mark.bpf

PORT = 8001
RATE, BURST = 2000, 50
SECONDS = 0.3
PEER = f"peer_rate = {RATE}\npeer_burst = {BURST}\n"
PREFIX = f"prefix_rate = {RATE}\nprefix_burst = {BURST}\n"
LANE = f"rate = {RATE}\nburst = {BURST}\n"
FRIEND, STRANGER, FRIEND_V6, STRANGER_V6 = "203.0.113.9", "198.18.0.1", "2001:db8::9", "2001:db8::1"


def policy(
    *, rule: str = "", high: str = "", low: str = "", action: str = "lane", end: str = "socket"
) -> str:
    return f"""
version = 1
[[lane]]
name = "high"
{high}
[[lane]]
name = "low"
end = "{end}"
{low}
[[class]]
name = "friends"
peers = ["{FRIEND}", "203.0.113.10", "{FRIEND_V6}"]
[[service]]
name = "s"
ports = [{PORT}]
  [[service.rule]]
  action = "{action}"
  lane = "high"
{rule}
"""


def flood(runs: SteerRuns, sources: Sequence[str], seconds: float = SECONDS) -> tuple[dict[str, int], float]:
    """As many packets as can be for some time: how many ended how, and the longest the time can have been."""
    packets = [frames.udp_frame(source, PORT, bytes(16)) for source in sources]
    ended: dict[str, int] = {}
    start = time.monotonic_ns()
    while time.monotonic_ns() - start < seconds * 1e9:
        for packet in packets:
            name = runs(packet).name
            ended[name] = ended.get(name, 0) + 1
    return ended, (time.monotonic_ns() - start) / 1e9


def check_limited(allowed: int, elapsed: float, *, rate: int = RATE, burst: int = BURST) -> None:
    """No more than the limit allows in ``elapsed`` seconds; and not much less, as there were always packets.

    "Not much less": on a busy machine the flood may pause for so long that the bucket runs over.
    """
    assert allowed <= rate * elapsed + burst
    assert allowed >= burst
    assert allowed >= 0.2 * rate * elapsed


@pytest.mark.parametrize("source", [FRIEND, STRANGER, FRIEND_V6, STRANGER_V6])
def test_peer_limit_drops(runs: SteerRuns, source: str) -> None:
    runs.use(policy(rule=PEER))
    ended, elapsed = flood(runs, [source])
    check_limited(ended["steer"], elapsed)
    assert ended["drop_peer_limit"] > 0
    assert ended.keys() == {"steer", "drop_peer_limit"}
    assert runs.peer(pack_address(ip_address(source))).peer.drops >= ended["drop_peer_limit"]


def test_each_peer_has_its_own_limit(runs: SteerRuns) -> None:
    """One that floods takes nothing from one that conforms."""
    runs.use(policy(rule=PEER))
    flood(runs, [FRIEND])
    ended, elapsed = flood(runs, ["203.0.113.10", STRANGER])
    check_limited(ended["steer"], elapsed, rate=2 * RATE, burst=2 * BURST)


@pytest.mark.parametrize(
    "sources",
    [
        [f"198.18.0.{host}" for host in range(1, 100)],  # one /24
        [f"2001:db8:5:{net:x}::{host}" for net in range(10) for host in range(1, 10)],  # one /48
    ],
)
def test_prefix_limit_holds_for_all_its_strangers(runs: SteerRuns, sources: list[str]) -> None:
    runs.use(policy(rule=PREFIX))
    ended, elapsed = flood(runs, sources)
    check_limited(ended["steer"], elapsed)
    assert ended.keys() == {"steer", "drop_prefix_limit"}


def test_invented_sources_of_one_prefix_share_its_limit(runs: SteerRuns) -> None:
    """Each packet from another address: the peer limit never bites, the prefix limit does."""
    runs.use("stranger_prefix = { v4 = 16, v6 = 48 }\n" + policy(rule=PEER + PREFIX))
    start = time.monotonic_ns()
    allowed = sum(
        runs(frames.udp_frame(str(IPv4Address(0xC6120000 + number)), PORT)).name == "steer"
        for number in range(20_000)
    )
    check_limited(allowed, (time.monotonic_ns() - start) / 1e9)


def test_prefix_limit_is_not_for_configured_peers(runs: SteerRuns) -> None:
    runs.use(policy(rule=PREFIX))
    ended, _ = flood(runs, [FRIEND, "203.0.113.10", FRIEND_V6], 0.1)
    assert ended.keys() == {"steer"}


def test_lane_limit_holds_for_everybody_together(runs: SteerRuns) -> None:
    runs.use(policy(high=LANE))
    ended, elapsed = flood(runs, [FRIEND, STRANGER, FRIEND_V6, STRANGER_V6])
    check_limited(ended["steer"], elapsed)
    assert ended.keys() == {"steer", "drop_lane_limit"}


@pytest.mark.parametrize(
    ("rule", "high"),
    [(PEER + 'demote = "low"', ""), (PREFIX + 'demote = "low"', ""), ("", LANE + 'demote = "low"')],
)
@pytest.mark.parametrize("end", ["socket", "kernel"])
def test_demotion(runs: SteerRuns, rule: str, high: str, end: str) -> None:
    """What is over goes to the lower lane, all of it, and is counted there."""
    runs.use(policy(rule=rule, high=high, end=end))
    before = runs.program.counters()
    ended, elapsed = flood(runs, [STRANGER])
    check_limited(ended["steer"], elapsed)
    demoted = "pass_demoted" if end == "kernel" else "steer_demoted"
    assert ended.keys() == {"steer", demoted}
    after = runs.program.counters()
    assert after.lanes[0].demoted_from - before.lanes[0].demoted_from == ended[demoted]
    assert after.lanes[1].demoted_to - before.lanes[1].demoted_to == ended[demoted]
    # The rule chose the upper lane; the lower one has seen nothing of its own.
    assert after.lanes[1].seen == before.lanes[1].seen
    assert after.balanced


def test_demoted_packets_are_limited_in_their_new_lane(runs: SteerRuns) -> None:
    low_rate, low_burst = 500, 10
    low = f"rate = {low_rate}\nburst = {low_burst}"
    runs.use(policy(rule=PEER + 'demote = "low"', low=low))
    ended, elapsed = flood(runs, [FRIEND])
    check_limited(ended["steer"], elapsed)
    check_limited(ended["steer_demoted"], elapsed, rate=low_rate, burst=low_burst)
    assert ended.keys() == {"steer", "steer_demoted", "drop_lane_limit"}
    assert runs.program.counters().lanes[1].verdicts["drop_lane_limit"].packets >= ended["drop_lane_limit"]


def test_conforming_traffic_is_untouched(runs: SteerRuns) -> None:
    """A packet whenever the clock says that one is due, for every limit at once."""
    runs.use(policy(rule=PEER + PREFIX, high=LANE))
    packet = frames.udp_frame(STRANGER, PORT)
    # A burst at once is within the limits.
    assert [runs(packet).name for _ in range(BURST)] == ["steer"] * BURST
    interval = 1_000_000_000 // RATE
    due = time.monotonic_ns() + interval
    end = due + int(SECONDS * 1e9)
    sent = 0
    while (now := time.monotonic_ns()) < end:
        if now < due:
            continue
        assert runs(packet).name == "steer", sent
        sent += 1
        # What a stall of this machine made late beyond half a burst is not sent any more.
        due = max(due + interval, now - BURST // 2 * interval)
    assert sent > 0.2 * RATE * SECONDS


def test_burst_is_exact(runs: SteerRuns) -> None:
    """A rate of one packet a second: within a test, the burst is all there is."""
    for burst in (1, 2, 3, 17, 1000):
        runs.forget_limits()
        runs.use(policy(rule=f"peer_rate = 1\npeer_burst = {burst}"))
        packet = frames.udp_frame(FRIEND, PORT)
        start = time.monotonic()
        ended = [runs(packet).name for _ in range(burst + 5)]
        elapsed = time.monotonic() - start
        assert ended[:burst] == ["steer"] * burst
        assert ended.count("steer") <= burst + elapsed


def test_order_of_limits(runs: SteerRuns) -> None:
    """Peer, prefix, lane: the first that is over names the reason."""
    slow = "rate = 1\n{0}burst = 1\n"
    peer, prefix = ("peer_" + slow.format("peer_"), "prefix_" + slow.format("prefix_"))
    for rule, high, reason in (
        (peer + prefix, slow.format(""), "drop_peer_limit"),
        (prefix, slow.format(""), "drop_prefix_limit"),
        ("", slow.format(""), "drop_lane_limit"),
    ):
        runs.forget_limits()
        runs.use(policy(rule=rule, high=high))
        packet = frames.udp_frame(STRANGER, PORT)
        assert runs(packet).name == "steer"
        assert runs(packet).name == reason


def test_untouched_limits(runs: SteerRuns) -> None:
    """Passed and dropped by policy: no limit moves."""
    for action in ("pass", "drop"):
        runs.use(policy().replace('action = "lane"\n  lane = "high"', f'action = "{action}"'))
        ended, _ = flood(runs, [FRIEND], 0.02)
        assert ended.keys() == {f"{action}_policy"}
    assert runs.peer(pack_address(ip_address(FRIEND))).peer.tat_ns == 0


def on_cpus(work: Callable[[int], int], cpus: Sequence[int]) -> list[int]:
    """``work(cpu)`` at the same time on each of the CPUs, in a thread pinned there."""
    barrier = threading.Barrier(len(cpus))
    results: dict[int, int] = {}

    def run(cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread
        barrier.wait()
        results[cpu] = work(cpu)

    threads = [threading.Thread(target=run, args=(cpu,)) for cpu in cpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(cpus)
    return [results[cpu] for cpu in cpus]


@pytest.mark.parametrize("limit", ["peer", "prefix", "lane"])
def test_limits_hold_across_cpus(runs: SteerRuns, limit: str) -> None:
    """Every CPU floods the same limit by long runs inside the kernel; together they get what one would."""
    cpus = sorted(
        os.sched_getaffinity(threading.main_thread().native_id or 0) | set(range(os.cpu_count() or 1))
    )
    cpus = cpus[:4]  # on a single CPU the limit holds as well, but nothing races
    rate, burst = 200_000, 100
    words = f"rate = {rate}\n{{0}}burst = {burst}\n"
    rule = "" if limit == "lane" else f"{limit}_{words.format(limit + '_')}"
    # XDP_PASS for what is allowed: a redirect would keep the kernel busy with its socket.
    text = policy(rule=rule, high=words.format("") if limit == "lane" else "")
    runs.use(text.replace('name = "high"', 'name = "high"\nend = "kernel"'))
    packet = frames.udp_frame(STRANGER, PORT)
    before = runs.program.counters()
    start = time.monotonic_ns()

    def work(_cpu: int) -> int:
        run = ffi.new("struct sluice_test_run *")
        held = ffi.from_buffer("char[]", packet)
        run.data_in, run.data_size_in, run.repeat = held, len(packet), 400_000
        return int(lib.sluice_prog_test_run(runs.program.fd, run))

    assert on_cpus(work, cpus) == [0] * len(cpus)
    elapsed = (time.monotonic_ns() - start) / 1e9
    after = runs.program.counters()
    assert after.seen.packets - before.seen.packets == 400_000 * len(cpus)
    allowed = after.verdicts["pass_lane"].packets - (
        before.verdicts["pass_lane"].packets if "pass_lane" in before.verdicts else 0
    )
    assert allowed <= rate * elapsed + burst
    assert allowed > burst
    assert after.balanced
    # Given up after losing the race eight times in a row: dropped, and told.
    contended = after.limit_contended - before.limit_contended
    print(f"{limit}: {allowed} of {400_000 * len(cpus)} in {elapsed:.3f} s, contended {contended}")
    assert contended < 0.01 * 400_000 * len(cpus)


def test_over_the_limit_is_dropped_by_action(runs: SteerRuns) -> None:
    """The verdict is not only counted: XDP_DROP and XDP_REDIRECT are what the kernel gets."""
    runs.use(policy(rule="peer_rate = 1\npeer_burst = 1"))
    packet = frames.udp_frame(FRIEND, PORT)
    assert [runs.raw(packet)[0] for _ in range(2)] == [XDP_REDIRECT, XDP_DROP]

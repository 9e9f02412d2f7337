# SPDX-License-Identifier: Apache-2.0
"""GCRA holds what it promises over any window, and the tables of strangers stay bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xdp._libbpf import lib
from xdp.classify_limit import (
    HoldTimestamps,
    Limit,
    PrefixTimestamps,
    StrangerTimestamps,
    Timestamps,
    next_tat,
)
from xdp.tables import limit_ns

SECOND = 1_000_000_000

RATES = st.integers(1, 10_000_000)
BURSTS = st.integers(1, 1000)


def passed_times(limit: Limit, arrivals: list[int]) -> list[int]:
    timestamps = Timestamps()
    return [now for now in arrivals if not timestamps.over(b"peer", limit, now)]


@given(RATES, BURSTS, st.lists(st.integers(0, 3 * SECOND), max_size=300))
def test_no_window_holds_more_than_burst_and_rate_allow(rate: int, burst: int, gaps: list[int]) -> None:
    now, arrivals = SECOND, []
    for gap in gaps:
        # Gaps of the order of the interval are where a mistake would show.
        now += gap % (4 * SECOND // rate + 1)
        arrivals.append(now)
    times = passed_times(Limit(*limit_ns(rate, burst)), arrivals)
    for first in range(len(times)):
        for last in range(first, len(times)):
            # rate * window, in exact arithmetic
            assert (last - first + 1 - burst) * SECOND <= rate * (times[last] - times[first])


@given(RATES, BURSTS, st.integers(SECOND, 10 * SECOND), st.lists(st.integers(0, SECOND), max_size=100))
def test_traffic_within_the_rate_is_never_dropped(
    rate: int, burst: int, start: int, extra: list[int]
) -> None:
    interval, _ = limit_ns(rate, burst)
    limit = Limit(*limit_ns(rate, burst))
    arrivals = [start]
    for gap in extra:
        arrivals.append(arrivals[-1] + interval + gap)
    assert passed_times(limit, arrivals) == arrivals


@given(RATES, BURSTS, st.integers(SECOND, 10 * SECOND))
def test_exactly_a_burst_passes_at_once(rate: int, burst: int, now: int) -> None:
    limit = Limit(*limit_ns(rate, burst))
    assert len(passed_times(limit, [now] * (burst + 10))) == burst


@given(RATES, BURSTS, st.lists(st.tuples(st.integers(0, SECOND), st.integers(1, 8)), max_size=40))
def test_conforming_is_judged_as_by_a_token_bucket(
    rate: int, burst: int, clumps: list[tuple[int, int]]
) -> None:
    """The continuous-state form (ITU-T I.371), counted in nanoseconds, as another way to say the same."""
    interval, tolerance = limit_ns(rate, burst)
    limit, timestamps = Limit(interval, tolerance), Timestamps()
    now = updated = SECOND
    level = 0
    for gap, count in clumps:
        now += gap % (3 * interval + 1)
        for _ in range(count):
            drained = max(0, level - (now - updated))
            conforms = drained <= tolerance
            assert timestamps.over(7, limit, now) is not conforms
            if conforms:
                level, updated = drained + interval, now


def test_a_packet_over_the_limit_leaves_no_trace() -> None:
    limit = Limit(*limit_ns(10, 1))
    assert next_tat(0, SECOND, limit) == SECOND + 100_000_000
    assert next_tat(SECOND + 100_000_000, SECOND + 99_999_999, limit) is None
    assert next_tat(SECOND + 100_000_000, SECOND + 100_000_000, limit) == SECOND + 200_000_000


def test_keys_have_limits_of_their_own() -> None:
    limit, timestamps = Limit(*limit_ns(1, 1)), Timestamps()
    assert [timestamps.over(key, limit, SECOND) for key in (b"a", b"b", b"a")] == [False, False, True]


def through(holds: HoldTimestamps, key: bytes, now_ns: int, count: int = 10) -> int:
    return sum(not holds.over(key, now_ns) for _ in range(count))


def test_a_hold_begins_goes_on_and_ends() -> None:
    holds, slow = HoldTimestamps(), Limit(SECOND, 2 * SECOND)
    assert through(holds, b"a", 0) == 10  # not held
    holds.set(b"a", slow, 100 * SECOND, SECOND)
    assert (through(holds, b"a", SECOND), through(holds, b"b", SECOND)) == (3, 10)
    holds.set(b"a", slow, 100 * SECOND, SECOND)
    assert through(holds, b"a", SECOND) == 0  # renewed: no new burst
    assert through(holds, b"a", 3 * SECOND) == 2
    assert through(holds, b"a", 100 * SECOND) == 10  # over: its end is not in it
    holds.set(b"a", slow, 200 * SECOND, 100 * SECOND)
    assert through(holds, b"a", 100 * SECOND) == 3  # anew
    holds.clear(b"a")
    holds.clear(b"a")
    assert through(holds, b"a", 100 * SECOND) == 10


def test_what_a_slow_hold_has_used_up_does_not_keep_a_fast_one_waiting() -> None:
    holds = HoldTimestamps()
    holds.set(b"a", Limit(SECOND, 9 * SECOND), 100 * SECOND, 0)
    assert through(holds, b"a", 0) == 10
    holds.set(b"a", Limit(1000, 1000), 100 * SECOND, 0)  # two at once
    assert through(holds, b"a", 999) == 0
    assert through(holds, b"a", 1000) == 1
    assert through(holds, b"a", 10_000) == 2


def test_only_holds_of_who_stays_are_kept() -> None:
    holds = HoldTimestamps()
    for key in (b"a", b"b"):
        holds.set(key, Limit(SECOND, 0), 100 * SECOND, 0)
    holds.keep(lambda key: key == b"b")
    assert (through(holds, b"a", 0), through(holds, b"b", 0)) == (10, 1)


def test_strangers_least_recently_seen_are_forgotten_first() -> None:
    limit, strangers = Limit(*limit_ns(1, 1)), StrangerTimestamps(size=2)
    assert not strangers.over(b"a", limit, SECOND)
    assert not strangers.over(b"b", limit, SECOND)
    assert strangers.over(b"a", limit, SECOND)  # over its limit, but seen
    assert not strangers.over(b"c", limit, SECOND)  # in the place of b
    assert len(strangers) == 2
    assert strangers.over(b"a", limit, SECOND)
    assert not strangers.over(b"b", limit, SECOND)


def test_strangers_are_bounded() -> None:
    limit, strangers = Limit(*limit_ns(1, 1)), StrangerTimestamps()
    for number in range(lib.SLUICE_MAX_STRANGERS + 1000):
        strangers.over(number.to_bytes(16, "big"), limit, SECOND)
    assert len(strangers) == lib.SLUICE_MAX_STRANGERS


def test_prefixes_are_exact_until_the_table_is_full() -> None:
    limit, prefixes = Limit(*limit_ns(1, 1)), PrefixTimestamps(size=100)
    assert not any(prefixes.over((4, number), limit, SECOND) for number in range(100))
    assert all(prefixes.over((4, number), limit, SECOND) for number in range(100))


def test_inventing_prefixes_neither_fills_memory_nor_washes_out_a_limit() -> None:
    limit, prefixes = Limit(*limit_ns(1, 1)), PrefixTimestamps(size=100)
    assert not prefixes.over((4, 0), limit, SECOND)
    new = sum(not prefixes.over((4, number), limit, SECOND) for number in range(1, 100_000))
    assert new <= 99 + lib.SLUICE_PREFIX_BUCKETS
    assert len(prefixes) <= 100 + lib.SLUICE_PREFIX_BUCKETS
    assert prefixes.over((4, 0), limit, SECOND)


def test_expired_prefixes_make_room() -> None:
    limit, prefixes = Limit(*limit_ns(1, 1)), PrefixTimestamps(size=100)
    for number in range(300):
        prefixes.over((4, number), limit, SECOND)
    later = 10 * SECOND
    assert not prefixes.over((4, 1000), limit, later)
    assert len(prefixes) == 1

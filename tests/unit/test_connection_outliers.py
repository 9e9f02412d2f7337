# SPDX-License-Identifier: Apache-2.0
"""Outliers: who is left out, for how long, and how many at most."""

from __future__ import annotations

import json
import math
from random import Random

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from userspace.connection.outliers import (
    LEAST_GAP,
    TIMES_MAXIMUM,
    Change,
    Outliers,
    OutlierSettings,
    Record,
)
from xdp.errors import UsageError


def made(count: int, *, seed: int = 0, **options: float) -> tuple[Outliers[int], list[Record[int]]]:
    """So many endpoints, without jitter unless asked for."""
    outliers = Outliers[int](OutlierSettings(**{"jitter": 0.0, **options}), rng=Random(seed))  # type: ignore[arg-type]
    return outliers, [outliers.add(0.0, number) for number in range(count)]


def results(record: Record[int], outliers: Outliers[int], now: float, good: int, bad: int) -> None:
    """Failures with a success after each, so that none are in a row."""
    for _ in range(bad):
        outliers.failure(now, record)
        record.success()
    for _ in range(good - bad):
        record.success()


# --- failures in a row


def test_five_failures_in_a_row() -> None:
    outliers, (record, *_) = made(10)
    for _ in range(4):
        assert not outliers.failure(0.0, record)
    record.success()
    for _ in range(4):
        assert not outliers.failure(0.0, record)
    assert outliers.failure(0.0, record)
    assert not outliers.failure(0.0, record)  # it is out already
    assert (outliers.ejected, outliers.ejections) == (1, 1)
    assert outliers.on_timeout(29.999) == []
    assert outliers.on_timeout(30.0) == [Change(0, ejected=False)]
    assert outliers.ejected == 0
    for _ in range(4):  # counting begins anew
        assert not outliers.failure(31.0, record)


def test_times_grow_and_are_forgotten() -> None:
    outliers, (record, *_) = made(10, consecutive=1, interval=1000.0)
    now, times = 0.0, []
    for _ in range(12):
        assert outliers.failure(now, record)
        back = outliers.next_timeout()
        while (now := back) % 1000 == 0:  # a look at the rates, no return
            outliers.on_timeout(now)
            back = outliers.next_timeout()
        times.append(now)
        assert Change(0, ejected=False) in outliers.on_timeout(now)
    spans = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert spans[:3] == [30.0, 60.0, 90.0]
    assert max(spans) == 300.0

    outliers, (record, *_) = made(10, consecutive=1, base_time=10.0, interval=10.0)
    assert outliers.failure(0.0, record)
    outliers.on_timeout(10.0)  # back; in this interval it was out
    assert outliers.failure(11.0, record)
    assert outliers._returns.when(0) == 11.0 + 20.0
    for now in range(20, 100, 10):  # two intervals would be enough
        outliers.on_timeout(float(now))
    assert outliers.failure(100.0, record)
    assert outliers._returns.when(0) == 110.0


def test_times_are_spread() -> None:
    outliers, records = made(100, consecutive=1, jitter=0.5, share=1.0)
    for record in records:
        outliers.failure(0.0, record)
    backs = [outliers._returns.when(record.key) for record in records]
    assert min(backs) >= 30.0
    assert max(backs) < 45.0
    assert max(backs) - min(backs) > 10.0
    assert len(set(backs)) > 90


# --- success rates


def test_a_rate_far_below_the_others() -> None:
    outliers, records = made(20)
    for record in records[1:]:
        results(record, outliers, 1.0, 200, 2)
    results(records[0], outliers, 1.0, 200, 100)
    assert outliers.next_timeout() == 10.0
    assert outliers.on_timeout(9.999) == []
    assert outliers.on_timeout(10.0) == [Change(0, ejected=True)]
    assert records[1].good == records[1].bad == 0  # an interval is judged by itself


def test_a_rate_that_is_only_a_little_lower_is_none() -> None:
    """Where all do well sigma is nearly 0."""
    outliers, records = made(20)
    for record in records[1:]:
        results(record, outliers, 1.0, 1000, 0)
    results(records[0], outliers, 1.0, 1000, int(1000 * LEAST_GAP * 0.9))
    assert outliers.on_timeout(10.0) == []
    for record in records[1:]:
        results(record, outliers, 11.0, 1000, 0)
    results(records[0], outliers, 11.0, 1000, int(1000 * LEAST_GAP * 1.2))
    assert outliers.on_timeout(20.0) == [Change(0, ejected=True)]


@pytest.mark.parametrize(("count", "requests"), [(4, 200), (20, 49)])
def test_too_little_is_known(count: int, requests: int) -> None:
    outliers, records = made(count)
    for record in records[1:]:
        results(record, outliers, 1.0, requests, 0)
    results(records[0], outliers, 1.0, requests, requests)
    assert outliers.on_timeout(10.0) == []


def test_when_all_fail_alike_nobody_is_an_outlier() -> None:
    outliers, records = made(20)
    for record in records:
        results(record, outliers, 1.0, 300, 150)
    assert outliers.on_timeout(10.0) == []


def test_those_who_are_out_do_not_count() -> None:
    outliers, records = made(20, endpoints=20, share=0.5)
    for _ in range(5):
        outliers.failure(0.0, records[1])
    for record in records:
        results(record, outliers, 1.0, 200, 150 if record.key == 0 else 0)
    assert outliers.on_timeout(10.0) == []  # 19 are left


# --- how many


def test_no_more_than_a_share_is_out_and_the_worst_first() -> None:
    outliers, records = made(30, deviations=0.5)
    for record in records:
        results(record, outliers, 1.0, 200, 100 + record.key if record.key < 6 else 0)
    assert [change.key for change in outliers.on_timeout(10.0)] == [5, 4, 3]  # 10 % of 30
    for _ in range(10):
        assert not outliers.failure(11.0, records[7])
    assert outliers.ejected == 3


@pytest.mark.parametrize(
    ("count", "share", "most"), [(1, 0.1, 1), (5, 0.0, 1), (19, 0.1, 1), (20, 0.1, 2), (4, 1.0, 4)]
)
def test_one_may_always_be_out(count: int, share: float, most: int) -> None:
    outliers, records = made(count, consecutive=1, share=share)
    assert sum(outliers.failure(0.0, record) for record in records) == most


def test_who_is_removed_is_out_of_everything() -> None:
    outliers, records = made(10, consecutive=1)
    assert outliers.failure(0.0, records[0])
    outliers.remove(0)
    outliers.remove(0)
    assert (len(outliers), outliers.ejected) == (9, 0)
    assert outliers.failure(0.0, records[1])  # there is room again
    assert not outliers.failure(0.0, records[0])  # what is told of it comes too late
    assert outliers.on_timeout(40.0) == [Change(1, ejected=False)]
    for number in range(1, 10):
        outliers.remove(number)
    assert outliers.next_timeout() == math.inf


def test_names_are_given_once() -> None:
    outliers, _ = made(2)
    with pytest.raises(UsageError, match="endpoint 1 is there already"):
        outliers.add(0.0, 1)


def test_time_goes_forwards_only() -> None:
    outliers, (record, *_) = made(10, consecutive=1)
    outliers.on_timeout(100.0)
    outliers.failure(50.0, record)
    assert outliers._returns.when(0) == 130.0
    with pytest.raises(UsageError, match="now is seconds"):
        outliers.on_timeout(math.nan)


@pytest.mark.parametrize(
    "wrong",
    [{"consecutive": 0}, {"consecutive": 1.5}, {"interval": 0.0}, {"interval": math.nan},
     {"base_time": math.inf}, {"maximum_time": -1}, {"jitter": 1.1}, {"share": "x"}, {"deviations": -1.0},
     {"endpoints": 1}, {"results": 0}],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(wrong))} is "):
        OutlierSettings(**wrong)  # type: ignore[arg-type]


def test_settings_are_json() -> None:
    told = json.loads(msgspec.json.encode(OutlierSettings()))
    assert told["consecutive"] == 5
    assert msgspec.json.decode(b'{"share": 0.2}', type=OutlierSettings).share == 0.2
    outliers, (record, *_) = made(10, consecutive=1)
    outliers.failure(0.0, record)
    assert repr(outliers) == "<Outliers: 1 of 10 ejected, 1 so far>"


class Anything(RuleBasedStateMachine):
    """Never more out than may be; whoever is out comes back; changes and records agree."""

    @initialize(share=st.sampled_from([0.0, 0.1, 0.5]), jitter=st.sampled_from([0.0, 1.0]))
    def begin(self, share: float, jitter: float) -> None:
        self.outliers = Outliers[int](
            OutlierSettings(share=share, jitter=jitter, results=5, endpoints=2, deviations=1.0), rng=Random(1)
        )
        self.records: dict[int, Record[int]] = {}
        self.out: dict[int, float] = {}
        self.most = 0
        self.now = 0.0

    @rule(key=st.integers(0, 9))
    def add_or_remove(self, key: int) -> None:
        if key in self.records:
            self.outliers.remove(key)
            del self.records[key]
            self.out.pop(key, None)
        else:
            self.records[key] = self.outliers.add(self.now, key)
            self.most = max(1, self.most)

    @rule(key=st.integers(0, 9), good=st.integers(0, 10), bad=st.integers(0, 6))
    def report(self, key: int, good: int, bad: int) -> None:
        record = self.records.get(key)
        if record is not None:
            for _ in range(bad):
                room = len(self.out) < max(1, int(len(self.records) * self.outliers._settings.share))
                run = record.run
                ejected = self.outliers.failure(self.now, record)
                assert ejected == (room and key not in self.out and run >= 4)
                if ejected:
                    self.out[key] = self.now
            for _ in range(good):
                record.success()

    @rule(step=st.sampled_from([0.1, 5.0, 10.0, 100.0]))
    def time(self, step: float) -> None:
        self.now += step
        for key, ejected in self.outliers.on_timeout(self.now):
            if ejected:
                assert key not in self.out
                self.out[key] = self.now
            else:
                assert self.now >= self.out.pop(key) + 30.0
        assert self.outliers.next_timeout() > self.now

    @invariant()
    def agrees(self) -> None:
        assert self.outliers.ejected == len(self.out)
        for key, record in self.records.items():
            assert record.ejected == (key in self.out)
            assert 0 <= record.times <= TIMES_MAXIMUM
        assert all(self.now < since + 600.0 for since in self.out.values())
        assert (self.outliers.next_timeout() == math.inf) == (not self.records)


Anything.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestAnything = Anything.TestCase

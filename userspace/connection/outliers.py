# SPDX-License-Identifier: Apache-2.0
"""Outliers: endpoints that do worse than the others get nothing for a while.

    outliers = Outliers[str](OutlierSettings(), rng=random.Random(seed))
    record = outliers.add(now, "a")            # one for each endpoint
    record.success()
    if outliers.failure(now, record): ...      # it is ejected from now on
    for key, ejected in outliers.on_timeout(now): ...          # at outliers.next_timeout()

Results of requests are all it knows; nobody is asked.  There are two ways out, both those of Envoy's outlier
detection and gRPC's (proposal A50):

- ``consecutive`` failures without a success between them: at once;
- a success rate below mean - ``deviations`` * sigma of all: looked at every ``interval`` seconds, with enough
  endpoints and results to tell.  What is less than :data:`LEAST_GAP` below the mean is no outlier: where all
  do well, sigma is so small that the one with a single failure would be.

The first time is ``base_time`` seconds, the n-th n times that, up to ``maximum_time``; each interval in which
it never was ejected takes one from n again.  Times are spread by ``jitter``, so that those who were ejected
together do not return together.

No more than ``share`` of the endpoints are out at a time, but one always may be.  If more do badly it is not
the endpoints: the caller's own network, say.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

import msgspec

from userspace.connection.timers import LATEST, Timers, checked_now
from xdp.errors import UsageError

if TYPE_CHECKING:
    from random import Random

K = TypeVar("K", bound=Hashable)

#: Part of the results, 0 to 1: whose success rate is less than this below the mean is not worth ejecting.
LEAST_GAP: Final = 0.02
#: Ejections that count for the time of the next: more would only take longer to be forgotten.
TIMES_MAXIMUM: Final = 100
#: Seconds: a day; longer is not for a while.
TIME_MAXIMUM: Final = 86_400.0
#: Seconds, of intervals and ejections: shorter ones are noise, and each interval is a walk over all.
TIME_MINIMUM: Final = 0.1
#: Of settings that count something: failures, endpoints, results.
COUNT_MAXIMUM: Final = 1_000_000

_NEVER: Final = math.inf


def check_number(name: str, value: object, least: float, most: float, unit: str = "") -> None:
    """UsageError unless it is a number in that range, both included."""
    if type(value) not in {int, float} or not least <= value <= most:  # type: ignore[operator]
        raise UsageError(f"{name} is from {least:g} to {most:g}{unit and ' ' + unit}, not {value!r}")


def check_count(name: str, value: object, least: int, most: int) -> None:
    """UsageError unless it is a whole number in that range, both included."""
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{name} is a whole number from {least} to {most}, not {value!r}")


class OutlierSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Who is an outlier, and for how long; defaults are Envoy's.  UsageError for values out of range."""

    #: Failures in a row.
    consecutive: int = 5
    #: Seconds between looks at success rates.
    interval: float = 10.0
    #: Seconds of the first ejection, and of the longest.
    base_time: float = 30.0
    maximum_time: float = 300.0
    #: Times are longer by up to this part of them, at random.
    jitter: float = 0.1
    #: Of all endpoints, 0 to 1: so many may be out at a time, or one.
    share: float = 0.1
    #: Standard deviations below the mean.  At 1.9 it takes five endpoints for one to be so far away.
    deviations: float = 1.9
    #: Success rates are compared when so many endpoints have so many results in an interval.
    endpoints: int = 5
    results: int = 100

    def __post_init__(self) -> None:
        check_count("consecutive", self.consecutive, 1, COUNT_MAXIMUM)
        check_count("endpoints", self.endpoints, 2, COUNT_MAXIMUM)
        check_count("results", self.results, 1, COUNT_MAXIMUM)
        for name in ("interval", "base_time", "maximum_time"):
            check_number(name, getattr(self, name), TIME_MINIMUM, TIME_MAXIMUM, "seconds")
        for name in ("jitter", "share"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        check_number("deviations", self.deviations, 0.0, 100.0)


class Record(Generic[K]):
    """The results of one endpoint."""

    __slots__ = ("back_at", "bad", "ejected", "good", "key", "run", "times")

    def __init__(self, key: K) -> None:
        self.key = key
        #: Successes and failures in this interval.
        self.good = 0
        self.bad = 0
        #: Failures since the last success.
        self.run = 0
        #: Ejections that are not forgotten.
        self.times = 0
        self.ejected = False
        #: When it was taken back last.
        self.back_at = -_NEVER

    def success(self) -> None:
        """A request was answered as it should be."""
        self.good += 1
        self.run = 0


class Change(NamedTuple, Generic[K]):
    """An endpoint is ejected from now on, or it is not any more."""

    key: K
    ejected: bool


class Outliers(Generic[K]):
    """Finds those who do worse than the others; see the module.

    One endpoint takes some 300 bytes.  UsageError for a time that is none.
    """

    __slots__ = ("_next_look", "_now", "_records", "_returns", "_rng", "_settings", "ejected", "ejections")

    def __init__(self, settings: OutlierSettings, *, rng: Random) -> None:
        self._settings = settings
        self._rng = rng
        self._records: dict[K, Record[K]] = {}
        self._returns = Timers[K]()
        self._next_look = _NEVER
        self._now = -LATEST
        #: How many are ejected now, and how often somebody was.
        self.ejected = 0
        self.ejections = 0

    def __len__(self) -> int:
        return len(self._records)

    def add(self, now: float, key: K) -> Record[K]:
        """Another endpoint; UsageError if it is there already."""
        self._now = now = checked_now(now, self._now)
        if key in self._records:
            raise UsageError(f"endpoint {key!r} is there already")
        if not self._records:
            self._next_look = now + self._settings.interval
        record = self._records[key] = Record(key)
        return record

    def remove(self, key: K) -> None:
        """It is gone; nothing happens when there is none."""
        record = self._records.pop(key, None)
        if record is not None and record.ejected:
            self.ejected -= 1
            self._returns.cancel(key)
        if not self._records:
            self._next_look = _NEVER

    def failure(self, now: float, record: Record[K]) -> bool:
        """A request failed; True when the endpoint is ejected for it."""
        self._now = now = checked_now(now, self._now)
        record.bad += 1
        record.run += 1
        return record.run >= self._settings.consecutive and self._eject(now, record)

    def _eject(self, now: float, record: Record[K]) -> bool:
        """False when it is out already, has been removed, or too many are."""
        most = max(1, int(len(self._records) * self._settings.share))
        if record.ejected or self.ejected >= most or self._records.get(record.key) is not record:
            return False
        record.ejected = True
        record.times = min(record.times + 1, TIMES_MAXIMUM)
        settings = self._settings
        seconds = min(settings.base_time * record.times, settings.maximum_time)
        self._returns.set(record.key, now + seconds * (1.0 + settings.jitter * self._rng.random()))
        self.ejected += 1
        self.ejections += 1
        return True

    def next_timeout(self) -> float:
        """When to call :meth:`on_timeout`; infinite while there are no endpoints."""
        return min(self._next_look, self._returns.next())

    def on_timeout(self, now: float) -> list[Change[K]]:
        """Who is back, and who is out."""
        self._now = now = checked_now(now, self._now)
        changes: list[Change[K]] = []
        for key in self._returns.due(now):
            record = self._records[key]
            record.ejected = False
            record.back_at = now
            record.run = record.good = record.bad = 0
            self.ejected -= 1
            changes.append(Change(key, ejected=False))
        if now >= self._next_look:
            self._next_look = now + self._settings.interval
            changes += self._look(now)
        return changes

    def _look(self, now: float) -> list[Change[K]]:
        """Compare success rates, forget old ejections, and begin a new interval."""
        settings = self._settings
        rates: list[tuple[float, Record[K]]] = []
        for record in self._records.values():
            total = record.good + record.bad
            if total >= settings.results and not record.ejected:
                rates.append((record.good / total, record))
            record.good = record.bad = 0
            if record.times and not record.ejected and record.back_at + settings.interval <= now:
                record.times -= 1
        if len(rates) < settings.endpoints:
            return []
        mean = math.fsum(rate for rate, _ in rates) / len(rates)
        variance = math.fsum((rate - mean) ** 2 for rate, _ in rates) / len(rates)
        bound = mean - max(settings.deviations * math.sqrt(variance), LEAST_GAP)
        worst = sorted((pair for pair in rates if pair[0] < bound), key=lambda pair: pair[0])
        return [Change(record.key, ejected=True) for _, record in worst if self._eject(now, record)]

    def __repr__(self) -> str:
        return f"<Outliers: {self.ejected} of {len(self)} ejected, {self.ejections} so far>"

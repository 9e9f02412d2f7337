# SPDX-License-Identifier: Apache-2.0
"""ReconnectionManager: which connections may try again, and when.

    manager = ReconnectionManager(now, rng=random.Random(seed))
    manager.schedule(now, key, Cause.LOST)            # it is gone, and wanted back
    ...                                               # at manager.next_timeout():
    for key in manager.on_timeout(now): ...           # attempts that took too long: end them
    for key in manager.take_due(now): ...             # begin an attempt for each of these
    manager.on_failed(now, key, Cause.REFUSED)        # or
    manager.on_connected(now, key)
    manager.on_proved(now, key)                       # whenever the peer was heard

A key stands for a connection and is any hashable thing.  What is known of it ends when the connection has
proved itself, or with :meth:`~ReconnectionManager.cancel`:

- Attempts are made after the delays of :mod:`~userspace.connection.backoff`.  A connection that comes up and
  is lost before it has proved itself is one more attempt in vain: it has been heard, and has lived for
  ``proof_time``, or the delays go on growing.  So nobody is asked again and again who accepts and hangs up.
- After ``attempts`` in vain ``on_give_up(key, cause)`` is called, once.  The key is not forgotten: it is
  probed at the longest delay, until it is proved or cancelled.  What failed on this side (:data:`OURS`) is
  no reason to give up a peer.
- All attempts together keep within ``rate`` a second and ``burst`` at once.  Who is due when there is no
  room stands in line, and nobody overtakes: a thousand connections are tried within half a second, and the
  end of a partition that cut off a hundred thousand is no stampede.
- When interface or route come back (:meth:`~ReconnectionManager.on_link_up`) nobody waits for a timer: those
  who wait stand in line at once, and so do those whose attempt began before, as it was sent into nothing.
  Delays begin anew, since what made them grow is over.  The number of attempts in vain stays.

Every key has one timer.  Reports of a key that is not known change nothing: they may come late.
Times are seconds of any monotonic clock; one that goes backwards is taken as the latest.
"""

from __future__ import annotations

import math
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import msgspec

from userspace.connection.backoff import Backoff, check_number
from userspace.connection.states import Cause
from userspace.connection.timers import LATEST, Timers, checked_now
from userspace.flow.bucket import TokenBucket
from xdp.errors import SluiceError, UsageError

if TYPE_CHECKING:
    from random import Random

K = TypeVar("K", bound=Hashable)

#: Attempts a second, and at once: 1,000 connections are all tried within (1,000 - 100) / 2,000 = 0.45 s, and
#: 100,000 within 50 s, at 20 Mb/s if each begins with the 1,200 bytes of a QUIC handshake.
RATE: Final = 2000.0
BURST: Final = 100
#: Attempts a second, or at once: more is no limit.
RATE_MAXIMUM: Final = 1_000_000.0
#: Causes that say nothing of the peer: the delays grow, but nobody is given up for them.
OURS: Final = frozenset({Cause.LINK_DOWN, Cause.LOCAL_ERROR})
#: Seconds: while keys stand in line the caller is woken for attempts of so long together, not for each.
PACE: Final = 0.01
#: Seconds that a connection has to live: as long as the usual interval of heartbeats, so that one who
#: accepts and falls silent is not taken for one who is back.
PROOF_TIME: Final = 5.0
#: Seconds that an attempt may take: QUIC sends its first packet after 0, 1, 3 and 7 s (RFC 9002, 6.2.2).
ATTEMPT_TIMEOUT: Final = 10.0
#: Seconds: the longest of both; longer is no limit for people.
TIME_MAXIMUM: Final = 3600.0
#: Seconds, and the shortest of an attempt: less than a round trip around the world makes all of them vain.
ATTEMPT_TIMEOUT_MINIMUM: Final = 0.5
#: Seconds for which an attempt that began for a link that came back is left alone by the next one that does:
#: netlink tells of carrier, address and route one after the other, a bad cable all the time, and a handshake
#: has to come to its end in between.
HURRY: Final = 1.0
#: Keys: ten times as many as a large service has peers, some 40 MB.
LIMIT: Final = 100_000
LIMIT_MAXIMUM: Final = 10_000_000
#: Characters that are kept of what a callback raised.
ERROR_LENGTH: Final = 200


class TooManyConnectionsError(SluiceError):
    """As many connections are being reconnected as may be at the same time."""


class Phase(StrEnum):
    """What is done for a key."""

    #: Its delay has not passed.
    WAITING = "waiting"
    #: It has, and the key stands in line.
    READY = "ready"
    #: An attempt is being made.
    TRYING = "trying"
    #: The connection is up, and has not proved itself.
    UNPROVED = "unproved"


class Reconnection(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one key: times are of the caller's clock, seconds."""

    phase: Phase
    since: float
    #: Attempts in vain since it was last proved, but for those that failed on this side; ``given_up`` when
    #: they were too many.
    failures: int
    given_up: bool
    #: Of what happened to it last.
    cause: Cause
    #: When its timer is due: the next attempt, the end of this one, the end of the proof; None: no timer.
    timer: float | None


class ReconnectionSnapshot(msgspec.Struct, kw_only=True):
    """Counts of a manager, for people and JSON.

    Of keys: taken_up = proved + cancelled + all in phases.
    Of attempts: attempts + late = connected + failed + abandoned + those who are trying.
    """

    #: Keys by what is done for them.
    phases: dict[Phase, int] = msgspec.field(default_factory=lambda: dict.fromkeys(Phase, 0))
    #: Of these, those that are given up and only probed.
    given_up: int = 0
    taken_up: int = 0
    proved: int = 0
    cancelled: int = 0
    attempts: int = 0
    connected: int = 0
    #: Attempts that failed; of these the ones that took too long.
    failed: int = 0
    timed_out: int = 0
    #: Attempts that ended otherwise: anew when the link came back, or cancelled.
    abandoned: int = 0
    #: Connections that came up although their attempt had been ended.
    late: int = 0
    #: Connections that were lost before they had proved themselves.
    lost_early: int = 0
    #: How often a key was given up, and how often the link came back.
    gave_up: int = 0
    link_ups: int = 0
    callback_errors: int = 0
    last_callback_error: str = ""


class _Record:
    __slots__ = ("cause", "failures", "given_up", "heard", "hurried", "phase", "since", "step")

    def __init__(self, now: float, phase: Phase, cause: Cause) -> None:
        self.phase = phase
        self.since = now
        self.cause = cause
        self.failures = 0
        #: Delays that were over in vain; as ``failures``, but anew when the link came back.
        self.step = 0
        self.given_up = False
        #: The attempt that is being made, or will be next, was brought forward by the link.
        self.hurried = False
        #: The peer has been heard since the connection is up.
        self.heard = False


class ReconnectionManager(Generic[K]):
    """Decides when to try again; see the module.  Sans-I/O: the same seed and calls give the same answers.

    rng               where jitter comes from
    backoff           the delays
    rate, burst       attempts a second and at once, of all keys together
    proof_time        seconds that a connection has to live before it counts as one
    attempt_timeout   seconds that an attempt may take
    limit             keys at the same time, at most
    on_give_up        called with key and cause when all attempts of a key were in vain; it may call back in,
                      and what it raises is counted and told in the snapshot

    Raises UsageError for values out of range, and every method for what is no time.
    """

    __slots__ = (
        "_attempt_timeout", "_backoff", "_batch", "_bucket", "_counts", "_limit", "_line", "_now",
        "_on_give_up", "_proof_time", "_records", "_rng", "_timers",
    )  # fmt: skip

    def __init__(
        self,
        now: float,
        *,
        rng: Random,
        backoff: Backoff | None = None,
        rate: float = RATE,
        burst: int = BURST,
        proof_time: float = PROOF_TIME,
        attempt_timeout: float = ATTEMPT_TIMEOUT,
        limit: int = LIMIT,
        on_give_up: Callable[[K, Cause], object] | None = None,
    ) -> None:
        check_number("rate of attempts", rate, 1.0, RATE_MAXIMUM, "a second")
        check_number("burst of attempts", burst, 1.0, RATE_MAXIMUM)
        check_number("proof time", proof_time, 0.0, TIME_MAXIMUM, "seconds")
        check_number("attempt timeout", attempt_timeout, ATTEMPT_TIMEOUT_MINIMUM, TIME_MAXIMUM, "seconds")
        if type(limit) is not int or not 1 <= limit <= LIMIT_MAXIMUM:
            raise UsageError(f"limit of keys is a whole number from 1 to {LIMIT_MAXIMUM}, not {limit!r}")
        self._now = checked_now(now, -LATEST)
        self._rng = rng
        self._backoff = Backoff() if backoff is None else backoff
        self._bucket = TokenBucket(self._now, rate, burst)
        self._batch = max(1, int(min(rate * PACE, burst)))  # attempts that the caller is woken for
        self._proof_time = proof_time
        self._attempt_timeout = attempt_timeout
        self._limit = limit
        self._on_give_up = on_give_up
        self._records: dict[K, _Record] = {}
        self._timers = Timers[K]()
        self._line = OrderedDict[K, None]()  # who is READY, in the order of becoming so
        self._counts = ReconnectionSnapshot()

    # --- what the caller wants

    def schedule(self, now: float, key: K, cause: Cause) -> None:
        """The connection is not there, and wanted: there will be an attempt, after a delay.

        Nothing changes when it is being reconnected already.  One that was up and had not proved itself
        was an attempt in vain.  Raises TooManyConnectionsError when there are as many keys as there may be.
        """
        now = self._clock(now)
        record = self._records.get(key)
        if record is None:
            record = self._take_up(now, key, Phase.WAITING, cause)
            self._wait(now, key, record)
        elif record.phase is Phase.UNPROVED:
            self._counts.lost_early += 1
            self._fail(now, key, record, cause)

    def cancel(self, key: K) -> None:
        """It is not wanted any more: nothing will happen for this key, and nothing is known of it."""
        record = self._records.get(key)
        if record is not None:
            self._counts.cancelled += 1
            if record.phase is Phase.TRYING:
                self._counts.abandoned += 1
            self._forget(key, record)

    def is_reconnecting(self, key: K) -> bool:
        """Whether an attempt is being made, or will be; not while a connection is up, proved or not."""
        record = self._records.get(key)
        return record is not None and record.phase is not Phase.UNPROVED

    def has_given_up(self, key: K) -> bool:
        """Whether all attempts were in vain, so that it is only probed, and has not been proved since."""
        record = self._records.get(key)
        return record is not None and record.given_up

    # --- what became of it

    def on_connecting(self, now: float, key: K) -> None:
        """An attempt begins.

        That is known for what :meth:`take_due` gave, and only counts its time from now.  Any other attempt
        is the caller's own, as the first one to a new peer is: neither delays nor ``rate`` hold it up.
        Raises TooManyConnectionsError as :meth:`schedule` does.
        """
        now = self._clock(now)
        record = self._records.get(key)
        if record is None:
            record = self._take_up(now, key, Phase.TRYING, Cause.ASKED)
            self._counts.attempts += 1
        elif record.phase is not Phase.TRYING:
            record.hurried = False
            self._begin(now, key, record)
            return
        record.since = now
        self._timers.set(key, now + self._attempt_timeout)

    def on_connected(self, now: float, key: K) -> None:
        """The connection is up, also when its attempt was said to be over: answers may come late."""
        now = self._clock(now)
        record = self._records.get(key)
        if record is None or record.phase is Phase.UNPROVED:
            return
        self._counts.connected += 1
        if record.phase is not Phase.TRYING:
            self._counts.late += 1
        self._enter(now, key, record, Phase.UNPROVED)
        record.cause = Cause.OPENED
        record.heard = False
        self._timers.set(key, now + self._proof_time)

    def on_proved(self, now: float, key: K) -> None:
        """The peer was heard over this connection: traffic or a heartbeat.  As often as it was."""
        now = self._clock(now)
        record = self._records.get(key)
        if record is not None and record.phase is Phase.UNPROVED:
            record.heard = True
            if now >= record.since + self._proof_time:
                self._prove(key, record)

    def on_failed(self, now: float, key: K, cause: Cause) -> None:
        """An attempt failed, or a connection was lost before it had proved itself.

        Nothing changes when no attempt is being made: it was ended before.
        """
        now = self._clock(now)
        record = self._records.get(key)
        if record is None:
            return
        if record.phase is Phase.TRYING:
            self._counts.failed += 1
        elif record.phase is Phase.UNPROVED:
            self._counts.lost_early += 1
        else:
            return
        self._fail(now, key, record, cause)

    def on_link_up(self, now: float, keys: Iterable[K] | None = None) -> list[K]:
        """Interface or route came back for these keys, or for all: who waits may try at once.

        Returns those whose attempt is over by that, to be ended by the caller: they stand in line again.
        """
        now = self._clock(now)
        self._counts.link_ups += 1
        over = []
        for key in [*self._records] if keys is None else keys:
            record = self._records.get(key)
            if record is None or record.phase is Phase.UNPROVED:
                continue
            record.step = 0
            if record.phase is Phase.READY:
                continue
            if record.phase is Phase.TRYING:
                if record.hurried and now < record.since + HURRY:
                    continue
                self._counts.abandoned += 1
                over.append(key)
            record.cause = Cause.LINK_UP
            record.hurried = True
            self._enter(now, key, record, Phase.READY)
        return over

    # --- when to do what

    def next_timeout(self) -> float:
        """When to call :meth:`on_timeout` and :meth:`take_due`; infinite: never."""
        at = self._timers.next()
        if self._line:
            at = min(at, self._bucket.time_until(self._now, min(len(self._line), self._batch)))
        return at

    def on_timeout(self, now: float) -> list[K]:
        """Delays are over, proofs complete, attempts too long: returns the last, to be ended by the caller.

        They have failed, and wait for the next one.  After a stall of the caller's loop what has arrived
        meanwhile should be read first.
        """
        now = self._clock(now)
        over = []
        for key in self._timers.due(now):
            record = self._records[key]
            if record.phase is Phase.WAITING:
                self._enter(now, key, record, Phase.READY)
            elif record.phase is Phase.TRYING:
                over.append(key)
                self._counts.failed += 1
                self._counts.timed_out += 1
                self._fail(now, key, record, Cause.TIMED_OUT)
            elif record.heard:
                self._prove(key, record)
        return over

    def take_due(self, now: float) -> list[K]:
        """Those that may try now, in the order in which they became due: the caller begins their attempts.

        As many as ``rate`` and ``burst`` have room for; :meth:`next_timeout` says when there is more.
        """
        now = self._clock(now)
        taken = []
        while self._line and self._bucket.take(now, 1):
            key = next(iter(self._line))
            self._begin(now, key, self._records[key])
            taken.append(key)
        return taken

    # --- looking at it

    def __len__(self) -> int:
        return len(self._records)

    def look(self, key: K) -> Reconnection | None:
        """What is known of a key; None when nothing is, so either it is well or nobody wants it."""
        record = self._records.get(key)
        if record is None:
            return None
        at = self._timers.when(key)
        return Reconnection(
            phase=record.phase,
            since=record.since,
            failures=record.failures,
            given_up=record.given_up,
            cause=record.cause,
            timer=at if at < math.inf else None,
        )

    def snapshot(self) -> ReconnectionSnapshot:
        """All counts, as they are now."""
        return msgspec.structs.replace(self._counts, phases=self._counts.phases.copy())

    def __repr__(self) -> str:
        phases = ", ".join(f"{count} {phase}" for phase, count in self._counts.phases.items())
        return f"<ReconnectionManager {phases}; {self._counts.given_up} given up>"

    # --- inside

    def _clock(self, now: float) -> float:
        self._now = now = checked_now(now, self._now)
        return now

    def _take_up(self, now: float, key: K, phase: Phase, cause: Cause) -> _Record:
        if len(self._records) >= self._limit:
            raise TooManyConnectionsError(
                f"{self._limit} connections are being reconnected, no more can be",
                hint="cancel those whose endpoints are not wanted any more, or set a higher limit",
            )
        record = self._records[key] = _Record(now, phase, cause)
        self._counts.taken_up += 1
        self._counts.phases[phase] += 1
        return record

    def _enter(self, now: float, key: K, record: _Record, phase: Phase) -> None:
        """Another phase: in line and without a timer, or out of line."""
        self._counts.phases[record.phase] -= 1
        self._counts.phases[phase] += 1
        if phase is Phase.READY:
            self._timers.cancel(key)
            self._line[key] = None
        elif record.phase is Phase.READY:
            del self._line[key]
        record.phase = phase
        record.since = now

    def _wait(self, now: float, key: K, record: _Record) -> None:
        self._timers.set(key, now + self._backoff.delay(record.step + 1, self._rng))

    def _begin(self, now: float, key: K, record: _Record) -> None:
        self._counts.attempts += 1
        self._enter(now, key, record, Phase.TRYING)
        self._timers.set(key, now + self._attempt_timeout)

    def _fail(self, now: float, key: K, record: _Record, cause: Cause) -> None:
        """One more in vain.  The callback comes last: whatever it does, it finds everything as it is."""
        record.failures += cause not in OURS
        record.step += 1
        record.cause = cause
        record.hurried = False
        self._enter(now, key, record, Phase.WAITING)
        self._wait(now, key, record)
        if record.given_up or record.failures < self._backoff.attempts:
            return
        record.given_up = True
        self._counts.given_up += 1
        self._counts.gave_up += 1
        if self._on_give_up is None:
            return
        try:
            self._on_give_up(key, cause)
        except Exception as error:  # noqa: BLE001 - the caller's own, told in the snapshot
            self._counts.callback_errors += 1
            told = "".join(traceback.format_exception_only(error))
            self._counts.last_callback_error = " ".join(told.split())[:ERROR_LENGTH]

    def _prove(self, key: K, record: _Record) -> None:
        self._counts.proved += 1
        self._forget(key, record)

    def _forget(self, key: K, record: _Record) -> None:
        self._timers.cancel(key)
        self._line.pop(key, None)
        self._counts.phases[record.phase] -= 1
        self._counts.given_up -= record.given_up
        del self._records[key]

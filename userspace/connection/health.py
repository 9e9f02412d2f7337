# SPDX-License-Identifier: Apache-2.0
"""ConnectionHealthMonitor: which connections are well, which are not, and which are dead.

    monitor = ConnectionHealthMonitor(now, random.Random(seed))
    monitor.subscribe(lambda connection, old, new: ...)
    monitor.add(now, 7)
    for probe in monitor.take_probes(now):             # whenever next_timeout() has come
        send_ping(probe.connection, probe.sequence)    # and a kernel probe, if probe.kernel
    monitor.on_heard(now, 7)                           # anything that came from the peer
    monitor.on_pong(now, 7, sequence)                  # the answer to a ping

**Silence is not what counts, unanswered questions are.**  A peer that was not heard for a while is asked: a
heartbeat every ``interval`` seconds, less jitter, or earlier when the silence is unusual for it
(:mod:`~userspace.connection.suspicion`).  Traffic takes the place of heartbeats, but for one in
:data:`CONFIRM` intervals: only an answer proves that both ways are open, and tells the round-trip time.  A
question without an answer makes the peer suspect.  It is asked ``probe_rate`` times a second then, within the
budget of all (:mod:`~userspace.connection.probes`), until it is heard or dead.

**Dead** is who was not heard for ``dead_after`` seconds and left as many questions in a row unanswered as
prove it (:func:`~userspace.connection.suspicion.questions_needed`).  With the defaults:

- A peer that lives is not declared dead in 1,000 hours at 60 % loss: 0.6**60 for each of its heartbeats.
- One that died is within 15 s in which our own loop did not stall and our link was not down.  The budget
  suffices for 1,500 that fall silent together where 60 % are lost, and for 10,000 that lost nothing for some
  minutes.  If there are more, verdicts come later, never on less evidence; unhealthy they are in seconds.

Time in which our own loop stalled counts for nothing (:mod:`~userspace.connection.stalls`); nor does time in
which our link is down, unless a tenth of the peers is heard all the same.  Who is dead is still asked once an
interval; when it answers it is unhealthy, and then better step by step.

A host whose kernel program answers, while the application does not, is alive: it is unhealthy, and dead after
``busy_after`` seconds only.  A report that nobody listens (ICMP) proves nothing, for anybody can send one: it
makes us ask at once, and unhealthy if that has no answer.

``on_heard`` believes the caller.  Who calls it for datagrams whose sender could be forged lets an attacker
keep a dead peer alive.  Whoever reports on a connection that is not known does nothing: it may be late.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import msgspec

from userspace.connection.callbacks import Callbacks
from userspace.connection.grading import UNANSWERED, Cause, Status
from userspace.connection.health_record import RESOLUTION, Phase, Record, Verdict
from userspace.connection.health_report import ConnectionHealth, HealthSettings, HealthSummary
from userspace.connection.probes import Probe, ProbeBudget
from userspace.connection.questions import LossRate
from userspace.connection.stalls import THRESHOLD, AwakeTimers
from userspace.connection.suspicion import deviations
from xdp.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from random import Random

#: Intervals after which a peer is asked in spite of its traffic.
CONFIRM: Final = 3.0
#: Part of an interval after which it is asked again when only traffic came, until it is unhealthy.
AGAIN: Final = 0.25
#: φ of a silence after which a peer is asked before the interval is over: once in 100 million by chance.
UNUSUAL: Final = 8.0
#: Seconds of missed probes that are made up for: as late as a loop may be without a stall.
CATCH_UP: Final = THRESHOLD
#: Seconds after which a suspect that stands in line is looked at before its turn.
IN_LINE: Final = 2.0
#: Outcomes that the loss of all connections together is of.
LOSS_WINDOW: Final = 1024
#: Seconds after a link went down in which what had arrived before is read; and the part of its connections
#: that has to be heard later to show that the silence of the others is not its fault.
LINK_DRAIN: Final = 1.0
LINK_HEARD: Final = 0.1
#: Questions that wait to be taken; until they are, no more are asked.
PENDING_MOST: Final = 65_536
#: Sequences of a connection: one that is added again has others, and takes no old answer for a new one.
_SEQUENCES: Final = 1 << 32
#: Packets of one report: what a counter of 32 bits holds.
_PACKETS_MOST: Final = (1 << 32) - 1

_NEVER: Final = math.inf


class ConnectionHealthMonitor:
    """Health of many connections; see the module.  Sans-I/O: the same seed and calls do the same.

    Connections are whole numbers.  Raises UsageError for what is no time, in every method.
    """

    __slots__ = (
        "_added", "_budget", "_callbacks", "_confirm", "_counts", "_held", "_lifted", "_loss", "_pace",
        "_probes", "_records", "_rng", "_settings", "_timers", "_unusual", "local",
    )  # fmt: skip

    def __init__(self, now: float, rng: Random, settings: HealthSettings | None = None) -> None:
        self._settings = settings = settings if settings is not None else HealthSettings()
        self._rng = rng
        self._records: dict[int, Record] = {}
        self._added = 0
        self._timers = AwakeTimers(now)
        #: Our own loop.
        self.local = self._timers.local
        self._budget = ProbeBudget(now, settings.probe_budget)
        self._probes: list[Probe] = []
        self._pace = 1.0 / settings.probe_rate
        self._confirm = CONFIRM * settings.interval
        self._unusual = deviations(UNUSUAL)
        self._loss = LossRate(LOSS_WINDOW)
        # Connections whose link is down; those that were heard all the same.
        self._held = self._lifted = 0
        self._callbacks: Callbacks[int, Status, Status] = Callbacks()
        self._counts = HealthSummary()

    # --- time

    def next_timeout(self) -> float:
        """When to call :meth:`on_timeout` or :meth:`take_probes`; infinite: never."""
        return self._timers.latest if self._probes else self._timers.next_timeout()

    def on_timeout(self, now: float) -> None:
        """Do what is due."""
        at = self._timers.clock(now)
        local, timers, records = self.local, self._timers, self._records
        local.calm(at)
        if at >= local.grace_until:
            while len(self._probes) < PENDING_MOST:
                for connection in timers.due(at):
                    self._fire(at, connection, records[connection])
                    if len(self._probes) >= PENDING_MOST:
                        break
                for connection in self._budget.take(at):
                    self._probe(at, connection, records[connection])
                if timers.next() > at:
                    break
            timers.other = self._budget.next_time(at)
        self._callbacks.deliver()

    def take_probes(self, now: float) -> list[Probe]:
        """Do what is due, and say what is to be sent at once, each once."""
        self.on_timeout(now)
        probes, self._probes = self._probes, []
        # A callback may have removed some.
        return [probe for probe in probes if probe.connection in self._records]

    def on_tick(self, now: float, due: float) -> None:
        """The caller's loop has run, and meant to at ``due`` at the latest, for whatever reason.

        The monitor notices by itself when it is called late.  This tells it of stalls between its timeouts.
        """
        self._timers.on_tick(now, due)

    # --- which connections

    def add(self, now: float, connection: int) -> None:
        """Watch one, which is healthy at first and was heard just now.

        Raises UsageError for one that is watched, for what is no whole number, and for too many.
        """
        at = self._timers.clock(now)
        if type(connection) is not int:
            raise UsageError(f"a connection is a whole number, not {connection!r}")
        if connection in self._records:
            raise UsageError(f"connection {connection} is watched already")
        if len(self._records) >= self._settings.max_connections:
            raise UsageError("no more connections can be watched", hint="raise max_connections")
        # It is asked soon, for a first round-trip time; thousands added at once, all over an interval.
        wait = self._wait()
        first = at + wait * self._rng.random()
        sequence = self._added * _SEQUENCES
        self._added += 1
        self._records[connection] = Record(sequence, at, self._settings.interval, wait, first)
        self._timers.set(connection, first)

    def remove(self, connection: int) -> bool:
        """Watch it no more; False when it was not watched."""
        record = self._records.pop(connection, None)
        if record is None:
            return False
        self._timers.cancel(connection)
        self._budget.drop(connection)
        self._held -= record.down_at is not None
        self._counts.withdrawn += record.withdraw()
        return True

    def __len__(self) -> int:
        return len(self._records)

    # --- what is heard

    def _find(self, connection: int) -> Record | None:
        record = self._records.get(connection)
        if record is None:
            self._counts.strays += 1
        return record

    def on_heard(self, now: float, connection: int) -> None:
        """Something came that only this peer can have sent."""
        at = self._timers.clock(now)
        if (record := self._find(connection)) is not None:
            self._heard(at, connection, record)
            self._callbacks.deliver()

    def _heard(self, at: float, connection: int, record: Record) -> None:
        before = record.heard
        record.heard = at
        if at - record.sampled >= RESOLUTION:
            record.sample(at)
        if record.down_at is not None:
            self._heard_without_link(at, connection, record)
        if record.phase > Phase.ASKED:
            self._alive(at, connection, record, before)

    def _alive(self, at: float, connection: int, record: Record, before: float) -> None:
        """A suspect is heard, or a dead one."""
        if record.phase == Phase.GONE:
            self._become(at, connection, record, (Status.UNHEALTHY, Cause.ANSWERED, at - before))
        record.alive(self._loss)
        self._budget.drop(connection)
        self._rest(at, connection, record)

    def on_pong(self, now: float, connection: int, sequence: int, sent_at: float = math.nan) -> bool:
        """The answer to a ping; whether it is the first one to a question that was asked.

        ``sent_at``: when the ping was sent, as far as its answer says so.  It is used only for answers that
        are so late that nobody here remembers the time, and only if it is possible.
        """
        at = self._timers.clock(now)
        if (record := self._find(connection)) is None:
            return False
        asked = record.answer(sequence)
        late = asked is None
        if asked is not None:
            self._counts.answered += 1
        elif record.late(sequence):
            self._counts.failed -= 1
            self._counts.late += 1
            asked = sent_at - self.local.stalled
            if not record.patience(1.0) <= at - asked <= self._settings.dead_after:
                asked = -_NEVER
        else:
            self._counts.ignored += 1
            return False
        if asked > self.local.stalled_at:  # else it may have been there long before it was read
            record.latency.update(at, at - asked)
        wait = self._confirm if record.status == Status.HEALTHY else record.wait
        record.confirm(at, at + wait)
        phase = record.phase
        self._heard(at, connection, record)
        for loss in (record.loss, self._loss):
            if late:
                loss.lose(-1)
            else:
                loss.add(1, 0)
        if phase == Phase.ASKED:
            self._rest(at, connection, record)
        if phase != Phase.QUIET:
            self._judge(at, connection, record)
            self._callbacks.deliver()
        return True

    def on_host_reply(self, now: float, connection: int, sequence: int) -> bool:
        """The kernel program of its host has answered a probe; whether that was one of the last."""
        at = self._timers.clock(now)
        if (record := self._find(connection)) is None:
            return False
        if not record.recent(sequence):
            self._counts.ignored += 1
            return False
        record.host_heard = at
        if record.down_at is not None:
            self._heard_without_link(at, connection, record)
        record.unanswered = 0
        return True

    # --- what is not

    def on_error(self, now: float, connection: int, *, refused: bool) -> None:
        """The network says that nobody listens there (``refused``), or that there is no way."""
        at = self._timers.clock(now)
        record = self._find(connection)
        if record is None or record.down_at is not None or record.phase == Phase.GONE:
            return
        record.errors += 1
        record.refused = refused
        if record.phase != Phase.SUSPECT:
            self._suspect(at, connection, record)
        self._judge(at, connection, record)
        self._callbacks.deliver()

    def on_unsent(self, now: float, connection: int, sequence: int) -> None:
        """A question has not left: no room below, no descriptor.  It proves nothing."""
        self._timers.clock(now)
        record = self._find(connection)
        if record is not None and record.answer(sequence) is not None:
            self._counts.withdrawn += 1

    def on_sent(self, now: float, connection: int, packets: int) -> None:
        """So many packets of the caller's left for the peer; they count as arrived until :meth:`on_loss`."""
        self._traffic(now, connection, packets).add(packets, 0)

    def on_loss(self, now: float, connection: int, packets: int) -> None:
        """So many of those have not arrived."""
        self._traffic(now, connection, packets).lose(packets)

    def _traffic(self, now: float, connection: int, packets: int) -> LossRate:
        self._timers.clock(now)
        if type(packets) is not int or not 0 < packets <= _PACKETS_MOST:
            raise UsageError(f"packets are a whole number, 1 to {_PACKETS_MOST}, not {packets!r}")
        record = self._find(connection)
        return LossRate(1) if record is None else record.reported()

    def on_link(self, now: float, up: bool, connections: Iterable[int] | None = None) -> None:
        """The link that these connections use, or all, went down or came back.

        While it is down its connections are asked no more often than usual, and nobody is judged.
        """
        at = self._timers.clock(now)
        self._lifted = 0
        for connection in [*self._records] if connections is None else connections:
            if (record := self._find(connection)) is None:
                continue
            if up and record.down_at is not None:
                self._release(at, connection, record)
            elif not up and record.down_at is None:
                record.down_at = at
                self._held += 1

    def _release(self, at: float, connection: int, record: Record) -> None:
        self._held -= 1
        self._counts.withdrawn += record.forgive(at)
        if record.phase == Phase.SUSPECT:
            record.probe_at = at
            self._timers.set(connection, at)

    def _heard_without_link(self, at: float, connection: int, record: Record) -> None:
        """Then it uses another link, or its link is up; if that is so with many, it is so with all."""
        assert record.down_at is not None
        if at < record.down_at + LINK_DRAIN:
            return
        self._release(at, connection, record)
        self._lifted += 1
        if self._lifted >= LINK_HEARD * (self._held + self._lifted):
            for one, other in self._records.items():
                if other.down_at is not None:
                    self._release(at, one, other)

    # --- questions

    def _wait(self) -> float:
        """Seconds after a sign of life until the next question."""
        return self._settings.interval * (1.0 - self._settings.jitter * (0.5 + self._rng.random() / 2))

    def _rest(self, at: float, connection: int, record: Record) -> None:
        """It was heard: there is nothing to do but to ask again in time."""
        record.phase = Phase.QUIET
        record.wait = wait = self._wait()
        if record.confirmed < record.asked_at:  # heard, but not answered
            record.confirm_at = at + (wait * AGAIN if record.unconfirmed < UNANSWERED[1] else wait)
        self._timers.set(connection, record.ask_at(self._unusual))

    def _ask(self, at: float, connection: int, record: Record, *, kernel: bool) -> None:
        record.asked_at = at
        self._counts.asked += 1
        self._probes.append(Probe(connection, record.ask(at), kernel))

    def _fire(self, at: float, connection: int, record: Record) -> None:
        """The timer of a connection is due."""
        self._settle(at, record)
        phase = record.phase
        if phase == Phase.QUIET:
            if (due := record.ask_at(self._unusual)) > at:  # it was heard since
                self._timers.set(connection, due)
                if record.status != Status.HEALTHY:
                    self._judge(at, connection, record)
            else:
                record.phase = Phase.ASKED
                self._ask(at, connection, record, kernel=False)
                self._timers.set(connection, at + record.patience(self.local.stretch))
        elif phase == Phase.ASKED:
            if record.heard > record.asked_at:
                self._rest(at, connection, record)
            else:
                self._suspect(at, connection, record)
            self._judge(at, connection, record)
        elif phase == Phase.GONE or record.down_at is not None:
            self._ask(at, connection, record, kernel=False)
            self._timers.set(connection, at + self._wait())
        else:
            self._judge(at, connection, record)
            if record.phase == Phase.SUSPECT and at >= record.probe_at:
                self._budget.want(connection)  # and it is looked at while it stands in line
                self._timers.set(connection, self._look_at(at, record, at + IN_LINE))
            elif record.phase == Phase.SUSPECT:
                self._timers.set(connection, record.probe_at)

    def _suspect(self, at: float, connection: int, record: Record) -> None:
        record.phase = Phase.SUSPECT
        # Reports of errors are no reason to ask more often than that.
        record.probe_at = max(at, record.asked_at + self._pace)
        self._timers.set(connection, record.probe_at)

    def _look_at(self, at: float, record: Record, later: float) -> float:
        """When to look at a suspect: then, or when it may be dead if that is earlier."""
        verdict_at = record.heard + self._settings.dead_after
        return verdict_at if at < verdict_at < later else later

    def _probe(self, at: float, connection: int, record: Record) -> None:
        """It is the turn of a suspect."""
        self._settle(at, record)
        self._judge(at, connection, record)
        if record.phase == Phase.GONE:
            return
        self._counts.probes += 1
        self._ask(at, connection, record, kernel=True)
        pace = record.pace(at, self._pace)
        record.probe_at = max(record.probe_at + pace, at + pace - CATCH_UP)
        self._timers.set(connection, self._look_at(at, record, record.probe_at))

    def _settle(self, at: float, record: Record) -> None:
        """What has become of open questions?"""
        if record.down_at is None:
            self._counts.failed += record.settle(at, self.local.stretch, self._loss)
        else:
            self._counts.withdrawn += record.withdraw()

    # --- verdicts

    def _judge(self, at: float, connection: int, record: Record) -> None:
        """Change the status if it is to be another one."""
        if record.down_at is not None:
            return
        dead = record.death(at, self._settings, self._loss) if record.phase == Phase.SUSPECT else None
        if dead is not None:
            record.phase = Phase.GONE
            self._budget.drop(connection)
            self._timers.set(connection, at + self._wait())
        verdict = dead or record.change(at, self._settings.dwell, not self.local.score)
        if verdict is not None:
            self._become(at, connection, record, verdict)

    def _become(self, at: float, connection: int, record: Record, verdict: Verdict) -> None:
        change = record.become(at, self._timers.latest, verdict)
        made = f"{change.after.name.lower()}: {change.cause}"
        self._counts.changes[made] = self._counts.changes.get(made, 0) + 1
        self._callbacks.post(connection, change.before, change.after)

    # --- looking at it

    def subscribe(self, callback: Callable[[int, Status, Status], object]) -> None:
        """Call it with connection, old and new status after each change.

        It may call any method of the monitor.  What it raises is counted and told in :meth:`summary`.
        """
        self._callbacks.subscribe(callback)

    def status(self, connection: int) -> Status:
        """Of one connection.  Raises UsageError when it is not watched."""
        return self._known(connection).status

    def _known(self, connection: int) -> Record:
        record = self._records.get(connection)
        if record is None:
            raise UsageError(f"connection {connection!r} is not watched")
        return record

    def peak_latency(self, now: float, connection: int) -> float:
        """Its round-trip time, seconds: rises at once, falls slowly; 0.0 before the first answer."""
        return self._known(connection).latency.peak(self._timers.clock(now))

    def health(self, now: float, connection: int) -> ConnectionHealth:
        """All that is known of one connection.  Raises UsageError when it is not watched."""
        at = self._timers.clock(now)
        return self._known(connection).report(at, connection, self._loss)

    def summary(self) -> HealthSummary:
        """Counts.  Goes over all connections."""
        counts = msgspec.structs.replace(self._counts, changes=dict(self._counts.changes))
        by_status = dict.fromkeys(Status, 0)
        for record in self._records.values():
            by_status[record.status] += 1
            counts.suspects += record.phase == Phase.SUSPECT
            counts.open += record.open
        counts.connections = len(self._records)
        counts.healthy, counts.degraded, counts.unhealthy, counts.dead = by_status.values()
        counts.in_line = len(self._budget)
        counts.loss_rate = self._loss.rate()
        counts.held = self._held
        local, callbacks = self.local, self._callbacks
        counts.stalls, counts.stalled, counts.score = local.stalls, local.stalled, local.score
        counts.callback_errors, counts.last_callback_error = callbacks.errors, callbacks.last_error
        return counts

    def __repr__(self) -> str:
        counts = self.summary()
        return (
            f"<ConnectionHealthMonitor: {counts.connections} connections, {counts.healthy} healthy, "
            f"{counts.degraded} degraded, {counts.unhealthy} unhealthy, {counts.dead} dead>"
        )

# SPDX-License-Identifier: Apache-2.0
"""The health monitor beside a simple model: any calls in any order, at any pace of the loop.

The model knows of each connection when something that proves life came last, by a clock that only runs while
the loop does and the link is up, and which questions are open.  From that follows who may be dead, who must
be, and what each answer counts for.
"""

from __future__ import annotations

import math
import random

from hypothesis import HealthCheck, event, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from userspace.connection.grading import Status
from userspace.connection.health import ConnectionHealthMonitor
from userspace.connection.health_report import HealthSettings
from userspace.connection.questions import REMEMBERED
from userspace.connection.stalls import GRACE, THRESHOLD

SETTINGS = HealthSettings(max_connections=6)
CONNECTIONS = st.integers(0, 6)
#: What may go wrong by rounding in sums of a hundred times.
ROUNDING = 1e-6


class Model:
    """One connection."""

    def __init__(self) -> None:
        self.status = Status.HEALTHY
        #: Seconds of silence, of its host as well: at least so many, and at most, since parts of stalls count
        #: and a link may be taken for better than it is said to be.
        self.silent = self.silent_most = 0.0
        self.host_silent = math.inf
        #: Questions since it was heard, all of them, and by sequence what became of them.
        self.asked_since = 0
        self.open: dict[int, float] = {}
        self.sequences: list[int] = []
        self.held = False
        #: Perhaps it is not, since something was heard.
        self.released = False
        #: Something happened since it was heard that may put a verdict off.
        self.excused = False

    def heard(self) -> None:
        self.silent = self.silent_most = 0.0
        self.asked_since = 0
        self.excused = False


class Health(RuleBasedStateMachine):
    """See the module."""

    @initialize(seed=st.integers(0, 1 << 16), start=st.sampled_from([0.0, 1e-3, 54321.0, 1e9]))
    def begin(self, seed: int, start: float) -> None:
        self.now = start
        self.monitor = ConnectionHealthMonitor(start, random.Random(seed), SETTINGS)
        self.monitor.subscribe(self.changed)
        self.models: dict[int, Model] = {}
        self.changes = 0
        self.answers = 0
        self.stall_at_most = 0

    def changed(self, connection: int, old: Status, new: Status) -> None:
        note(f"{self.now}: {connection} {old.name} -> {new.name}")
        event(f"became {new.name}")
        self.changes += 1
        model = self.models[connection]
        assert old == model.status != new
        # Better by one step, but for the dead; dead only from something worse than healthy.
        assert new >= old - 1
        if new == Status.DEAD:
            assert old > Status.HEALTHY
            assert not model.held or model.released
            assert model.silent_most >= SETTINGS.dead_after - ROUNDING
            assert model.asked_since >= 14
            if model.host_silent < SETTINGS.dead_after - ROUNDING:
                assert model.silent_most >= SETTINGS.busy_after - ROUNDING
        model.status = new

    def send(self) -> None:
        for probe in self.monitor.take_probes(self.now):
            model = self.models[probe.connection]
            assert probe.sequence not in model.sequences
            model.sequences.append(probe.sequence)
            model.open[probe.sequence] = self.now
            model.asked_since += 1

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.5, 1.0, 4.0, 15.0, 50.0]))
    def run(self, seconds: float) -> None:
        """The loop does what it should."""
        end = self.now + seconds
        while True:
            at = min(max(self.now, self.monitor.next_timeout()), end)
            for model in self.models.values():
                model.silent += 0.0 if model.held else at - self.now
                model.silent_most += at - self.now
                model.host_silent += at - self.now
            self.now = at
            if self.monitor.next_timeout() > at:
                return
            self.send()

    @rule(seconds=st.sampled_from([0.1, 0.2, 0.3, 2.0, 100.0]))
    def stall(self, seconds: float) -> None:
        """It does not, and comes back with its timers."""
        self.now += seconds
        for model in self.models.values():
            # There was time up to the next timeout in which it had nothing to do, so that was no stall.
            model.silent_most += seconds
            model.host_silent += seconds
            model.excused = True
        self.send()

    @rule(back=st.sampled_from([0.001, 1.0, 1e6]))
    def go_back(self, back: float) -> None:
        self.monitor.on_timeout(self.now - back)

    @rule(connection=CONNECTIONS)
    def add(self, connection: int) -> None:
        if connection not in self.models and len(self.models) < 6:
            self.monitor.add(self.now, connection)
            self.models[connection] = Model()

    @rule(connection=CONNECTIONS)
    def remove(self, connection: int) -> None:
        assert self.monitor.remove(connection) == (self.models.pop(connection, None) is not None)

    @rule(connection=CONNECTIONS)
    def hear(self, connection: int) -> None:
        model = self.models.get(connection)
        if model is not None:
            model.heard()  # before: it tells of that
            self.release(model, connection)
        self.monitor.on_heard(self.now, connection)

    def release(self, model: Model, connection: int) -> None:
        """Hearing may show that a link is not down; how, the tests of links say."""
        for other in self.models.values():
            if other.held:
                other.excused = other.released = True

    @rule(connection=CONNECTIONS, back=st.integers(-1, 12), late=st.booleans())
    def answer(self, connection: int, back: int, late: bool) -> None:
        model = self.models.get(connection)
        sequences = model.sequences if model is not None else []
        sequence = sequences[-1 - back] if 0 <= back < len(sequences) else -5
        expected = model is not None and sequence in model.open
        took = self.monitor.on_pong(self.now, connection, sequence, self.now - 1.5 if late else math.nan)
        note(f"answer to {sequence} of {connection}: {took}")
        if took:
            assert expected
            assert model is not None
            self.answers += 1
            model.heard()
            self.release(model, connection)
            del model.open[sequence]
        elif expected and model is not None:
            # Only what was withdrawn is no question any more: of a link that was down, or not sent.
            assert model.held or model.excused
            del model.open[sequence]

    @rule(connection=CONNECTIONS, back=st.integers(-1, 80))
    def answer_of_host(self, connection: int, back: int) -> None:
        model = self.models.get(connection)
        sequences = model.sequences if model is not None else []
        sequence = sequences[-1 - back] if 0 <= back < len(sequences) else -100
        took = self.monitor.on_host_reply(self.now, connection, sequence)
        assert took == (0 <= back < min(len(sequences), REMEMBERED))
        if took and model is not None:
            model.host_silent = 0.0
            model.excused = True
            self.release(model, connection)

    @rule(connection=CONNECTIONS, refused=st.booleans())
    def error(self, connection: int, refused: bool) -> None:
        self.monitor.on_error(self.now, connection, refused=refused)

    @rule(connection=CONNECTIONS)
    def not_sent(self, connection: int) -> None:
        model = self.models.get(connection)
        if model is not None and model.sequences:
            sequence, before = model.sequences[-1], self.monitor.summary().withdrawn
            self.monitor.on_unsent(self.now, connection, sequence)
            if self.monitor.summary().withdrawn > before:  # else it has failed already
                del model.open[sequence]
            model.excused = True

    @rule(connection=CONNECTIONS, sent=st.integers(1, 1000), lost=st.integers(1, 1000))
    def traffic(self, connection: int, sent: int, lost: int) -> None:
        self.monitor.on_sent(self.now, connection, sent)
        self.monitor.on_loss(self.now, connection, lost)

    @rule(up=st.booleans(), connections=st.none() | st.lists(CONNECTIONS, max_size=4))
    def link(self, up: bool, connections: list[int] | None) -> None:
        self.monitor.on_link(self.now, up, connections)
        for connection, model in self.models.items():
            if connections is None or connection in connections:
                model.held = not up
                model.released = False
                model.excused = True

    @invariant()
    def counts_add_up(self) -> None:
        if not hasattr(self, "monitor"):
            return
        counts = self.monitor.summary()
        assert counts.asked == (
            counts.answered + counts.late + counts.failed + counts.withdrawn + counts.open
        )
        assert counts.answered + counts.late == self.answers
        assert counts.connections == len(self.models) == len(self.monitor)
        assert sum(counts.changes.values()) == self.changes
        assert counts.callback_errors == 0, counts.last_callback_error
        assert min(counts.failed, counts.late, counts.withdrawn, counts.open, counts.held) >= 0
        assert counts.in_line <= counts.suspects <= counts.connections

    @invariant()
    def who_must_be_dead_is(self) -> None:
        for connection, model in getattr(self, "models", {}).items():
            assert self.monitor.status(connection) == model.status
            told = self.monitor.health(self.now, connection)
            assert told.status == model.status.name.lower()
            for figure in (told.silent, told.phi, told.loss_rate, told.since, told.unconfirmed):
                assert 0.0 <= figure + ROUNDING < math.inf
            if not model.excused and not model.held:
                assert abs(told.silent - model.silent) < ROUNDING * 10 + THRESHOLD
                if model.silent > SETTINGS.dead_after + GRACE + 0.2:
                    assert model.status == Status.DEAD

    @invariant()
    def there_is_always_a_next_time(self) -> None:
        if getattr(self, "models", None):
            assert self.monitor.next_timeout() <= self.now + SETTINGS.interval + 100.0


Health.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestHealth = Health.TestCase

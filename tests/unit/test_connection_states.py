# SPDX-License-Identifier: Apache-2.0
"""States of a connection: the table from end to end, its drawing, and what is kept of what happened."""

from __future__ import annotations

import math
import tracemalloc

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.documents import ROOT, blocks
from userspace.connection.states import (
    BEGIN,
    HISTORY,
    HISTORY_MAXIMUM,
    TRANSITIONS,
    Cause,
    ConnectionState,
    Event,
    IllegalTransitionError,
    State,
    Transition,
    diagram,
)
from xdp.errors import UsageError

#: A way from the beginning to each state.
WAYS: dict[State, list[Event]] = {
    State.DISCONNECTED: [],
    State.CONNECTING: [Event.CONNECT],
    State.CONNECTED: [Event.CONNECT, Event.OPENED],
    State.FAILED: [Event.CONNECT, Event.GAVE_UP],
    State.DRAINING: [Event.CONNECT, Event.OPENED, Event.DRAIN],
    State.CLOSED: [Event.CLOSE],
}
LEGAL = sorted(TRANSITIONS)
ILLEGAL = [(state, event) for state in State for event in Event if (state, event) not in TRANSITIONS]


def brought_to(state: State) -> ConnectionState:
    found = ConnectionState(0.0)
    for event in WAYS[state]:
        found.apply(1.0, event, Cause.ASKED)
    assert found.state is state
    return found


# --- the table


@pytest.mark.parametrize(("before", "event"), LEGAL)
def test_what_is_legal(before: State, event: Event) -> None:
    state = brought_to(before)
    after = TRANSITIONS[before, event]
    assert state.apply(7.0, event, Cause.UNHEALTHY) is after
    assert (state.state, state.since, state.cause) == (after, 7.0, Cause.UNHEALTHY)
    assert state.history()[-1] == (7.0, before, after, Cause.UNHEALTHY)


@pytest.mark.parametrize(("before", "event"), ILLEGAL)
def test_what_is_not_raises_and_changes_nothing(before: State, event: Event) -> None:
    state = brought_to(before)
    was = (state.state, state.since, state.cause, state.transitions, state.history())
    with pytest.raises(IllegalTransitionError, match=f"that is {before}: {event} .cause: lost. cannot"):
        state.apply(7.0, event, Cause.LOST)
    assert (state.state, state.since, state.cause, state.transitions, state.history()) == was


def test_what_the_table_has_to_say() -> None:
    """Spelled out once more, since all else follows the table whatever it says."""
    assert {(before.name, event.name, after.name) for (before, event), after in TRANSITIONS.items()} == {
        ("DISCONNECTED", "CONNECT", "CONNECTING"),
        ("DISCONNECTED", "GAVE_UP", "FAILED"),
        ("CONNECTING", "OPENED", "CONNECTED"),
        ("CONNECTING", "ATTEMPT_FAILED", "DISCONNECTED"),
        ("CONNECTING", "GAVE_UP", "FAILED"),
        ("CONNECTED", "LOST", "DISCONNECTED"),
        ("CONNECTED", "DRAIN", "DRAINING"),
        ("DRAINING", "LOST", "CLOSED"),
        ("FAILED", "CONNECT", "CONNECTING"),
        *((state, "CLOSE", "CLOSED") for state in State.__members__ if state != "CLOSED"),
    }


def test_every_state_can_be_reached_and_left_but_the_last() -> None:
    reached = {BEGIN}
    while more := {after for (before, _), after in TRANSITIONS.items() if before in reached} - reached:
        reached |= more
    assert reached == {*State}
    assert {before for before, _ in TRANSITIONS} == {*State} - {State.CLOSED}
    assert {event for _, event in TRANSITIONS} == {*Event}


def test_the_drawing_says_what_the_table_says() -> None:
    lines = [line.strip() for line in diagram().splitlines()]
    assert lines[0] == "stateDiagram-v2"
    assert lines[1] == "[*] --> DISCONNECTED"
    assert lines[-1] == "CLOSED --> [*]"
    drawn = {}
    for line in lines[2:-1]:
        arrow, _, events = line.partition(": ")
        before, after = arrow.split(" --> ")
        for event in events.split(", "):
            drawn[State[before], Event(event)] = State[after]
    assert drawn == dict(TRANSITIONS)


def test_the_documents_show_the_drawing() -> None:
    shown = [block.text for block in blocks(ROOT / "docs" / "connections.md") if block.language == "mermaid"]
    assert shown == [diagram()]


def test_the_documents_name_every_state_event_and_cause() -> None:
    text = (ROOT / "docs" / "connections.md").read_text(encoding="utf-8")
    for word in [*(state.name for state in State), *Event, *Cause]:
        assert f"`{word}`" in text


# --- what is kept


def test_a_connection_that_is_new() -> None:
    state = ConnectionState(3.0)
    assert (state.state, state.since, state.cause) == (State.DISCONNECTED, 3.0, None)
    assert (state.transitions, state.history()) == (0, [])
    assert repr(state) == "<ConnectionState disconnected since 3.000, 0 transitions>"


@pytest.mark.parametrize("limit", [1, 2, 3, HISTORY])
def test_the_last_transitions_are_kept(limit: int) -> None:
    state = ConnectionState(0.0, history=limit)
    for turn in range(20):
        state.apply(turn, Event.CONNECT, Cause.RETRY)
        state.apply(turn + 0.5, Event.ATTEMPT_FAILED, Cause.TIMED_OUT)
        kept = state.history()
        assert len(kept) == min(limit, 2 * turn + 2)
        assert kept[-1] == Transition(turn + 0.5, State.CONNECTING, State.DISCONNECTED, Cause.TIMED_OUT)
        assert [entry.time for entry in kept] == [turn + 0.5 - 0.5 * back for back in range(len(kept))][::-1]
    assert state.transitions == 40
    assert repr(state) == "<ConnectionState disconnected since 19.500 (timed_out), 40 transitions>"


def test_every_cause_is_kept_as_it_is() -> None:
    state = ConnectionState(0.0, history=2 * len(Cause))
    for cause in Cause:
        state.apply(1.0, Event.CONNECT, cause)
        state.apply(1.0, Event.ATTEMPT_FAILED, cause)
    assert [entry.cause for entry in state.history()[::2]] == [*Cause]


def test_a_history_is_json() -> None:
    state = ConnectionState(0.0)
    state.apply(2.5, Event.CONNECT, Cause.ASKED)
    assert msgspec.json.encode(state.history()) == b'[[2.5,"disconnected","connecting","asked"]]'


def test_an_earlier_time_is_taken_as_that_of_the_last_transition() -> None:
    state = ConnectionState(5.0)
    state.apply(4.0, Event.CONNECT, Cause.ASKED)
    state.apply(6.0, Event.OPENED, Cause.OPENED)
    state.apply(-1.0, Event.LOST, Cause.LOST)
    assert [entry.time for entry in state.history()] == [5.0, 6.0, 6.0]
    assert state.since == 6.0


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf, 1e300])
def test_what_is_no_time_is_refused(now: float) -> None:
    with pytest.raises(UsageError, match="now is seconds"):
        ConnectionState(now)
    state = ConnectionState(0.0)
    with pytest.raises(UsageError, match="now is seconds"):
        state.apply(now, Event.CONNECT, Cause.ASKED)
    assert (state.state, state.transitions) == (State.DISCONNECTED, 0)


@pytest.mark.parametrize("history", [0, -1, HISTORY_MAXIMUM + 1, 16.0, True, "16"])
def test_a_history_has_a_length(history: int) -> None:
    with pytest.raises(UsageError, match="history is a whole number from 1 to"):
        ConnectionState(0.0, history=history)


def test_ten_thousand_are_cheap() -> None:
    """Bytes each, with all transitions that are kept: what is said in docs/connections.md."""
    tracemalloc.start()
    try:
        states = [ConnectionState(0.5) for _ in range(1000)]
        new = tracemalloc.get_traced_memory()[0] / len(states)
        for turn in range(3 * HISTORY):
            for state in states:
                event = Event.ATTEMPT_FAILED if turn % 2 else Event.CONNECT
                state.apply(turn + 0.5, event, Cause.RETRY)
        full = tracemalloc.get_traced_memory()[0] / len(states)
    finally:
        tracemalloc.stop()
    assert new <= 200
    assert full <= 450


# --- any sequence of events


class StatesBesideAList(RuleBasedStateMachine):
    """The state is what the last legal event led to; the history is the end of the list of all of them."""

    @initialize(limit=st.integers(1, 6))
    def begin(self, limit: int) -> None:
        self.state = ConnectionState(0.0, history=limit)
        self.limit = limit
        self.now = 0.0
        self.all: list[tuple[float, State, State, Cause]] = []

    def expected(self) -> State:
        return self.all[-1][2] if self.all else State.DISCONNECTED

    def apply(self, event: Event, cause: Cause) -> None:
        before = self.expected()
        after = TRANSITIONS.get((before, event))
        if after is None:
            with pytest.raises(IllegalTransitionError):
                self.state.apply(self.now, event, cause)
        else:
            assert self.state.apply(self.now, event, cause) is after
            self.now = max([self.now, *(entry[0] for entry in self.all[-1:])])
            self.all.append((self.now, before, after, cause))

    @rule(step=st.sampled_from([0.0, 0.5, 3.0, -1.0]))
    def time(self, step: float) -> None:
        self.now = max(0.0, self.now + step)

    @rule(event=st.sampled_from(Event), cause=st.sampled_from(Cause))
    def anything(self, event: Event, cause: Cause) -> None:
        self.apply(event, cause)

    @precondition(lambda self: self.expected() is not State.CLOSED)
    @rule(data=st.data(), cause=st.sampled_from(Cause))
    def something_legal(self, data: st.DataObject, cause: Cause) -> None:
        """So that long lives are met: anything soon closes it."""
        events = [event for before, event in LEGAL if before is self.expected() and event is not Event.CLOSE]
        self.apply(data.draw(st.sampled_from(events)), cause)

    @invariant()
    def agrees(self) -> None:
        assert self.state.state is self.expected()
        assert self.state.transitions == len(self.all)
        assert self.state.history() == self.all[-self.limit :]
        assert self.state.cause == (self.all[-1][3] if self.all else None)
        assert self.state.since == (self.all[-1][0] if self.all else 0.0)


StatesBesideAList.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStatesBesideAList = StatesBesideAList.TestCase

# SPDX-License-Identifier: Apache-2.0
"""UDP connections: two ends in virtual time, and one end beside a model that anybody may send anything to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from errno import ECONNREFUSED, EHOSTUNREACH, EMSGSIZE, ENETDOWN

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from userspace.connection.heartbeat import MAGIC, PING, PONG, SIZE, HostReply, Pong, is_heartbeat
from userspace.connection.timers import LATEST
from userspace.connection.transport import (
    MESSAGES_WAITING,
    Closed,
    Ending,
    Event,
    Heard,
    Message,
    Opened,
    Phase,
    Restarted,
    Transport,
)
from userspace.connection.udp import LARGEST, SEQUENCE_LIMIT, UdpConnection, UdpSettings
from xdp.classify_heartbeat import is_probe, reply_payload
from xdp.errors import UsageError

SECRET = bytes(16)


def connection(boot: int = 1, **options: object) -> UdpConnection:
    return UdpConnection(secret=SECRET, boot=boot, settings=UdpSettings(**options))  # type: ignore[arg-type]


class Pair:
    """Two connections and a path with a delay; ``lose`` says what does not arrive."""

    def __init__(self, *, delay: float = 0.01, lose: Callable[[float], bool] = lambda _now: False) -> None:
        self.now, self.delay, self.lose = 50.0, delay, lose
        self.ends = [connection(1), connection(2)]
        self.wire: list[tuple[float, int, bytes]] = []
        self.events: tuple[list[Event], list[Event]] = ([], [])
        self.sent: list[tuple[float, int]] = []  # when, and whose

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            for me, one in enumerate(self.ends):
                for datagram in one.take_datagrams(self.now):
                    self.sent.append((self.now, me))
                    if not self.lose(self.now):
                        self.wire.append((self.now + self.delay, 1 - me, datagram))
                self.events[me].extend(one.take_events())
            at = min([one.next_timeout() for one in self.ends] + [arrival for arrival, _, _ in self.wire])
            if at > end:
                self.now = end
                return
            self.now = max(self.now, at)
            due = [one for one in self.wire if one[0] <= self.now]
            self.wire = [one for one in self.wire if one[0] > self.now]
            for _, to, datagram in due:
                self.ends[to].receive(self.now, datagram)
            for one in self.ends:
                one.on_timeout(self.now)


def opened() -> tuple[UdpConnection, UdpConnection]:
    """Both open, and nothing on its way."""
    pair = Pair()
    for one in pair.ends:
        one.connect(pair.now)
    pair.run(1.0)
    assert [one.phase for one in pair.ends] == [Phase.OPEN, Phase.OPEN]
    return pair.ends[0], pair.ends[1]


# --- opening


def test_it_opens_when_its_ping_is_answered() -> None:
    pair = Pair()
    for one in pair.ends:
        one.connect(pair.now)
    pair.run(0.5)
    for me in (0, 1):
        assert pair.events[me][0] == Heard(50.01)  # the other's ping
        assert Opened() in pair.events[me]
        assert not any(isinstance(event, Pong) for event in pair.events[me])
        assert pair.ends[me].next_timeout() == math.inf
        assert pair.ends[me].heartbeats.peer_boot == 2 - me
    assert len(pair.sent) == 4


def test_a_peer_that_only_pings_does_not_open_it() -> None:
    one, other = connection(), connection(2)
    one.connect(0.0)
    other.connect(0.0)
    for ping in other.take_datagrams(0.0):
        one.receive(0.1, ping)
    assert one.phase is Phase.OPENING
    assert one.take_events() == [Heard(0.1)]


def test_it_asks_again_and_gives_up() -> None:
    pair = Pair(lose=lambda _now: True)
    pair.ends[0].connect(pair.now)
    pair.run(10.0)
    assert [round(at - 50.0, 3) for at, _ in pair.sent] == [0.0, 0.2, 0.6, 1.4]
    assert pair.events[0] == [Closed(Ending.TIMED_OUT)]
    assert pair.ends[0].next_timeout() == math.inf


def test_the_last_of_the_pings_opens_it() -> None:
    pair = Pair(lose=lambda now: now < 51.3)
    pair.ends[0].connect(pair.now)
    pair.ends[1].connect(pair.now)
    pair.run(3.0)
    assert [one.phase for one in pair.ends] == [Phase.OPEN, Phase.OPEN]


def test_another_path_is_tried_at_once() -> None:
    one = connection()
    one.connect(0.0)
    one.take_datagrams(0.0)
    one.on_path_change(0.05)
    assert one.next_timeout() == 0.05
    one.on_timeout(0.05)
    assert len(one.take_datagrams(0.05)) == 1
    assert one.next_timeout() == pytest.approx(0.25)
    open_one, _ = opened()
    open_one.on_path_change(100.0)
    assert open_one.next_timeout() == math.inf


def test_nothing_is_sent_before_it_is_open() -> None:
    one = connection()
    assert not one.send(0.0, b"x")
    assert not one.ping(0.0, 1)
    assert not one.probe(0.0, 1)
    one.connect(0.0)
    assert not one.send(0.0, b"x")
    assert not one.ping(0.0, 1)
    assert one.probe(0.0, 1)  # whether there is a host at all
    assert one.snapshot().refused == 2


# --- open


def test_messages_go_as_they_are() -> None:
    one, other = opened()
    payloads = [b"a", bytes(1232), bytes(SIZE), MAGIC, MAGIC + bytes(40), bytes(LARGEST)]
    assert all(one.send(100.0, payload) for payload in payloads)
    taken = one.take_datagrams(100.0)
    assert list(taken) == payloads
    for datagram in taken:
        other.receive(100.1, datagram)
    assert other.take_events() == [Heard(100.1), *map(Message, payloads)]
    assert one.take_datagrams(100.2) == ()


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_messages_of_other_kinds_of_bytes(kind: Callable[[bytes], bytes]) -> None:
    one, _ = opened()
    assert one.send(100.0, kind(b"abc"))
    assert one.take_datagrams(100.0) == [b"abc"]


@pytest.mark.parametrize(
    "payload", [b"", bytes(LARGEST + 1), "text", None, 7, MAGIC + bytes(SIZE - len(MAGIC))]
)
def test_what_is_no_message(payload: bytes) -> None:
    one, _ = opened()
    with pytest.raises(UsageError):
        one.send(100.0, payload)
    assert one.take_datagrams(100.0) == ()


def test_a_ping_is_answered_before_anything_else() -> None:
    one, other = opened()
    assert one.ping(100.0, 7)
    other.receive(100.1, one.take_datagrams(100.0)[0])
    other.send(100.2, b"later")
    pong, message = other.take_datagrams(100.2)
    assert message == b"later"
    one.receive(100.3, pong)
    _, heard = one.take_events()
    assert isinstance(heard, Pong)
    assert heard[:3] == (7, 100.0, 100.3)
    assert heard.held == pytest.approx(0.1, abs=2e-6)


def test_a_host_may_live_without_its_application() -> None:
    one, _ = opened()
    assert one.probe(100.0, 9)
    (probe,) = one.take_datagrams(100.0)
    assert is_probe(probe)
    one.receive(100.2, reply_payload(probe))
    assert one.take_events() == [HostReply(9, 100.0, 100.2)]
    assert one.heard_at < 100.0


def test_a_restarted_peer_is_noticed() -> None:
    one, other = opened()
    assert one.ping(100.0, 1)
    other = connection(77)
    other.connect(100.0)
    other.receive(100.0, one.take_datagrams(100.0)[0])
    for datagram in other.take_datagrams(100.0):
        one.receive(100.1, datagram)
    heard, restarted, pong = one.take_events()
    assert (heard, restarted) == (Heard(100.1), Restarted(77))
    assert isinstance(pong, Pong)
    assert one.phase is Phase.OPEN
    assert one.snapshot().restarts == 1
    for number in (2, 3):  # the same one: nothing new
        one.ping(101.0, number)
        for datagram in one.take_datagrams(101.0):
            other.receive(101.0, datagram)
        for datagram in other.take_datagrams(101.0):
            one.receive(101.0, datagram)
    assert one.heartbeats.outstanding == 0
    assert one.snapshot().restarts == 1


@pytest.mark.parametrize("number", [-1, SEQUENCE_LIMIT, 1.5])
def test_numbers_of_pings(number: int) -> None:
    one, _ = opened()
    for ask in (one.ping, one.probe):
        with pytest.raises(UsageError, match="sequence"):
            ask(100.0, number)


def test_what_waits_is_bounded() -> None:
    one = UdpConnection(secret=SECRET, settings=UdpSettings(queue=3))
    one.connect(0.0)
    other = connection(2)
    other.connect(0.0)
    other.receive(0.0, one.take_datagrams(0.0)[0])
    for datagram in other.take_datagrams(0.0):
        one.receive(0.0, datagram)
    assert one.phase is Phase.OPEN
    one.take_datagrams(0.0)
    assert [one.send(1.0, b"x") for _ in range(5)] == [True] * 3 + [False] * 2
    assert not one.ping(1.0, 1)
    assert not one.probe(1.0, 1)
    assert len(one.take_datagrams(1.0)) == 3
    for _ in range(MESSAGES_WAITING + 2):
        one.receive(2.0, b"x")
    assert len(one.take_events()) == MESSAGES_WAITING + 2  # Opened, Heard
    assert one.messages_lost == 2


# --- the end


@pytest.mark.parametrize(
    ("errno", "ending"),
    [
        (ECONNREFUSED, Ending.REFUSED),
        (EHOSTUNREACH, Ending.UNREACHABLE),
        (ENETDOWN, Ending.UNREACHABLE),
        (EMSGSIZE, None),
        (-7, None),
    ],
)
@pytest.mark.parametrize("is_open", [False, True])
def test_what_icmp_says(errno: int, ending: Ending | None, is_open: bool) -> None:
    one = opened()[0] if is_open else connection()
    if not is_open:
        one.connect(0.0)
    one.on_error(100.0, errno)
    closed = [event for event in one.take_events() if isinstance(event, Closed)]
    assert closed == ([] if ending is None else [Closed(ending, errno)])
    assert (one.phase is Phase.CLOSED) == (ending is not None)


def test_closing_is_silent_and_for_good() -> None:
    one, _ = opened()
    one.send(100.0, b"x")
    one.close(100.0, 3, "enough\x1b[2J\n" + "x" * 300)
    (closed,) = one.take_events()
    assert isinstance(closed, Closed)
    assert (closed.ending, closed.code) == (Ending.ASKED, 3)
    assert closed.reason.startswith("enough?[2J?xxx")
    assert len(closed.reason) == 200
    assert one.take_datagrams(100.0) == ()
    one.close(101.0)
    one.on_error(101.0, ECONNREFUSED)
    one.on_timeout(101.0)
    one.receive(101.0, b"x")
    assert not one.send(101.0, b"x")
    assert one.take_events() == []
    assert one.snapshot().ignored == 1
    with pytest.raises(UsageError, match="once"):
        one.connect(102.0)


def test_it_connects_once() -> None:
    one = connection()
    one.connect(0.0)
    with pytest.raises(UsageError, match="once") as caught:
        one.connect(1.0)
    assert caught.value.hint


# --- times, settings, words


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf, LATEST * 2, -LATEST * 2])
def test_what_is_no_time(now: float) -> None:
    one, _ = opened()
    for call in (
        lambda: one.receive(now, b""),
        lambda: one.send(now, b"x"),
        lambda: one.ping(now, 1),
        lambda: one.take_datagrams(now),
        lambda: one.on_timeout(now),
        lambda: one.on_error(now, 0),
        lambda: one.close(now),
        lambda: connection().connect(now),
    ):
        with pytest.raises(UsageError, match="monotonic"):
            call()
    assert one.phase is Phase.OPEN


def test_time_does_not_go_back() -> None:
    one, _ = opened()
    one.receive(200.0, b"x")
    one.receive(150.0, b"y")
    assert one.heard_at == 200.0


@pytest.mark.parametrize(
    "wrong", [{"connect_timeout": 0.0}, {"connect_timeout": math.nan}, {"queue": 0}, {"queue": 1 << 17}]
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        UdpSettings(**wrong)  # type: ignore[arg-type]


def test_what_people_see() -> None:
    one, other = opened()
    one.send(100.0, b"abc")
    for datagram in one.take_datagrams(100.0):
        other.receive(100.0, datagram)
    assert repr(other) == "<UdpConnection open, 1 messages received>"
    told = json.loads(msgspec.json.encode(other.snapshot()))
    assert (told["phase"], told["peer_boot"], told["heard_at"]) == ("open", 1, 100.0)
    assert json.loads(msgspec.json.encode(connection().snapshot()))["heard_at"] is None
    transport: Transport = one  # it has what all transports have
    assert transport.phase is Phase.OPEN


# --- anything at all


class Anything(RuleBasedStateMachine):
    """One end beside what it has to be, with a caller and a network that do anything."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = connection(), connection(2)
        self.now = 0.0
        self.number = 0
        self.seen: list[bytes] = []  # what it has sent
        self.given = self.taken = self.messages = 0
        self.closed = False
        self.phase = Phase.NEW

    @initialize()
    def begin(self) -> None:
        self.one.connect(self.now)
        self.other.connect(self.now)

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.2, 1.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.one.on_timeout(self.now)

    @rule()
    def carry(self) -> None:
        """To the peer, and back."""
        datagrams = self.one.take_datagrams(self.now)
        self.taken += len(datagrams)
        self.seen.extend(one for one in datagrams if is_heartbeat(one))
        for datagram in datagrams:
            self.other.receive(self.now, datagram)
        self.other.take_events()
        for datagram in self.other.take_datagrams(self.now):
            self.hand(datagram)

    def hand(self, datagram: bytes) -> None:
        self.given += 1
        self.one.receive(self.now, datagram)

    @rule(payload=st.binary(max_size=40))
    def hostile(self, payload: bytes) -> None:
        self.hand(payload)

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), kind=st.sampled_from([0, 1, 2, PING, PONG, 5, 255]))
    def forged(self, data: st.DataObject, kind: int) -> None:
        """What it has sent itself, a little changed."""
        seen = data.draw(st.sampled_from(self.seen))
        at = data.draw(st.integers(5, SIZE - 1))
        self.hand(seen[:4] + bytes([kind]) + seen[5:at] + bytes([seen[at] ^ 1]) + seen[at + 1 :])

    @rule(payload=st.binary(min_size=1, max_size=40))
    def say(self, payload: bytes) -> None:
        self.one.send(self.now, payload)

    @rule(kernel=st.booleans())
    def ask(self, kernel: bool) -> None:
        self.number += 1
        (self.one.probe if kernel else self.one.ping)(self.now, self.number)

    @rule()
    def moved(self) -> None:
        self.one.on_path_change(self.now)

    @rule()
    def restarted(self) -> None:
        self.number += 1
        self.other = connection(2 + self.number)
        self.other.connect(self.now)

    @rule(how=st.integers(0, 9))
    def end(self, how: int) -> None:
        if how == 0:
            self.one.close(self.now)
        elif how == 1:
            self.one.on_error(self.now, ECONNREFUSED)

    @rule()
    def look(self) -> None:
        for event in self.one.take_events():
            assert not self.closed, "nothing comes after the end"
            self.closed = isinstance(event, Closed)
            self.messages += isinstance(event, Message)

    @invariant()
    def sums(self) -> None:
        told, heartbeats = self.one.snapshot(), self.one.heartbeats
        assert self.one.phase >= self.phase
        self.phase = self.one.phase
        assert (
            told.datagrams_received
            == self.given
            == (
                told.messages_received
                + told.messages_lost
                + told.ignored
                + told.pongs_received
                + told.replies_received
                + told.pings_received
                + told.pings_dropped
                + told.unknown
            )
        )
        assert told.datagrams_sent == self.taken
        assert told.pings_sent + told.probes_sent == (
            told.pongs_received + told.replies_received + heartbeats.forgotten + heartbeats.outstanding
        )
        assert self.messages <= told.messages_received
        assert self.one.next_timeout() > self.now - 1e-9 or self.one.phase is Phase.OPENING
        assert self.one.heard_at <= self.now


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

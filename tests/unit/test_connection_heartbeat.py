# SPDX-License-Identifier: Apache-2.0
"""Heartbeats: two ends beside a model, over a network that loses, repeats, holds back and forges."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from userspace.connection.heartbeat import (
    ANSWER_MAXIMUM,
    MAGIC,
    NUMBER_MAXIMUM,
    OUTSTANDING,
    PING,
    PONG,
    PONGS_WAITING,
    PROBE,
    REPLY,
    SIZE,
    Heartbeats,
    HostReply,
    Pong,
    is_heartbeat,
)
from xdp._libbpf import ffi, lib
from xdp.classify_heartbeat import is_probe, reply_payload
from xdp.errors import UsageError

SECRET, OTHER = b"a secret of mine", b"a secret of yours"
NUMBERS = st.integers(0, NUMBER_MAXIMUM)


def pair() -> tuple[Heartbeats, Heartbeats]:
    return Heartbeats(secret=SECRET, boot=1), Heartbeats(secret=OTHER, boot=2)


def answered(asker: Heartbeats, other: Heartbeats, now: float, ping: bytes) -> Pong | HostReply | None:
    other.receive(now, ping)
    (pong,) = other.take_pongs(now)
    return asker.receive(now, pong)


# --- the wire


def test_the_layout_is_that_of_the_header() -> None:
    """Both structs have what all heartbeats share in the same place."""
    assert ffi.sizeof("struct sluice_ping") == ffi.sizeof("struct sluice_heartbeat") == SIZE == 32
    for field in ("magic", "type", "sequence", "cookie"):
        assert ffi.offsetof("struct sluice_ping", field) == ffi.offsetof("struct sluice_heartbeat", field)
    ping = Heartbeats(secret=SECRET).ping(1.0, 0x0102030405060708)
    found = ffi.new("struct sluice_ping *")
    ffi.memmove(found, ping, SIZE)
    assert bytes(ffi.buffer(found))[:4] == MAGIC == b"SLHB"
    assert (found.type, list(found.held_us), found.boot) == (lib.SLUICE_HEARTBEAT_PING, [0, 0, 0], 0)
    assert struct.pack("=Q", found.sequence) == bytes(range(1, 9))
    assert found.cookie != 0


def test_the_types_are_four() -> None:
    assert sorted([PROBE, REPLY, PING, PONG]) == [1, 2, 3, 4]


def test_the_kernel_answers_probes_and_nothing_else() -> None:
    asker, other = pair()
    probe, ping = asker.probe(1.0, 7), asker.ping(1.0, 7)
    other.receive(1.0, ping)
    (pong,) = other.take_pongs(1.0)
    assert is_probe(probe)
    assert not any(map(is_probe, (ping, pong, reply_payload(probe))))
    assert asker.receive(1.5, reply_payload(probe)) == HostReply(7, 1.0, 1.5)


def test_a_heartbeat_is_told_by_length_and_magic() -> None:
    ping = Heartbeats(secret=SECRET).ping(0.0, 0)
    assert is_heartbeat(ping)
    for other in (b"", MAGIC, ping[:-1], ping + b"\0", b"SLHC" + ping[4:], bytes(SIZE)):
        assert not is_heartbeat(other)


# --- pings


def test_a_pong_tells_when_how_long_and_who() -> None:
    asker, other = pair()
    other.receive(10.5, asker.ping(10.0, 3))
    (pong,) = other.take_pongs(10.75)
    heard = asker.receive(11.0, pong)
    assert heard == Pong(3, 10.0, 11.0, 0.25)
    assert isinstance(heard, Pong)
    assert heard.round_trip == pytest.approx(0.75)
    assert asker.peer_boot == 2
    assert other.peer_boot is None


@pytest.mark.parametrize(("held", "told"), [(0.0, 0.0), (1e-6, 1e-6), (16.0, 16.0), (60.0, 16.777215)])
def test_how_long_it_was_held_has_an_end(held: float, told: float) -> None:
    asker, other = pair()
    other.receive(0.0, asker.ping(0.0, 1))
    (pong,) = other.take_pongs(held)
    heard = asker.receive(100.0, pong)
    assert isinstance(heard, Pong)
    assert heard.held == pytest.approx(told)


def test_a_peer_that_claims_too_much_is_cut_to_the_time_that_passed() -> None:
    asker, other = pair()
    other.receive(0.0, asker.ping(0.0, 1))
    (pong,) = other.take_pongs(5.0)
    heard = asker.receive(0.1, pong)
    assert isinstance(heard, Pong)
    assert (heard.held, heard.round_trip) == (0.1, 0.0)


def test_an_answer_counts_once() -> None:
    asker, other = pair()
    other.receive(0.0, asker.ping(0.0, 1))
    (pong,) = other.take_pongs(0.0)
    assert asker.receive(0.1, pong) is not None
    assert asker.receive(0.2, pong) is None
    assert (asker.pongs_received, asker.unknown, asker.outstanding) == (1, 1, 0)


def test_a_restart_is_another_number() -> None:
    asker, other = pair()
    assert answered(asker, other, 1.0, asker.ping(1.0, 1)) is not None
    again = Heartbeats(secret=OTHER, boot=99)
    assert answered(asker, again, 2.0, asker.ping(2.0, 2)) is not None
    assert asker.peer_boot == 99


@given(st.integers(0, SIZE * 8 - 1))
@settings(max_examples=100)
def test_a_changed_answer_is_refused_where_it_matters(bit: int) -> None:
    """Every bit but those that the peer may choose: how long it took, and its number."""
    asker, other = pair()
    for kind in (PING, PROBE):
        if kind == PING:
            other.receive(0.0, asker.ping(0.0, 5))
            (answer,) = other.take_pongs(0.0)
            free = range(5, 8), range(16, 24)
        else:
            answer = reply_payload(asker.probe(0.0, 5))
            free = range(5, 8), range(16, 24)
        changed = bytearray(answer)
        changed[bit // 8] ^= 1 << bit % 8
        payload = bytes(changed)
        if not is_heartbeat(payload):
            continue
        heard = asker.receive(1.0, payload)
        assert (heard is not None) == any(bit // 8 in part for part in free)


def test_answers_of_one_kind_are_not_answers_of_the_other() -> None:
    asker, _ = pair()
    probe, ping = asker.probe(0.0, 1), asker.ping(0.0, 1)
    for asked, kind in ((probe, PONG), (ping, REPLY)):
        forged = bytearray(asked)
        forged[4] = kind
        assert asker.receive(0.0, bytes(forged)) is None
    assert asker.unknown == 2


def test_cookies_are_of_a_secret() -> None:
    """Whoever knows everything but the secret cannot answer."""
    mine, copy = Heartbeats(secret=SECRET), Heartbeats(secret=SECRET[:-1] + b"?")
    assert mine.ping(0.0, 1)[-8:] != copy.ping(0.0, 1)[-8:]
    assert mine.ping(0.0, 2)[-8:] != mine.ping(0.0, 3)[-8:]
    assert mine.probe(0.0, 2)[-8:] != mine.ping(0.0, 4)[-8:]


# --- bounds, and what is refused


def test_an_answer_is_no_longer_and_nothing_else_is_answered() -> None:
    """Neither reflector nor loop: one answer to a ping, as long as it, and none to anything else."""
    asker, other = pair()
    ping = asker.ping(0.0, 1)
    for kind in range(256):
        changed = ping[:4] + bytes([kind]) + ping[5:]
        other.receive(0.0, changed)
        answers = other.take_pongs(0.0)
        assert [len(one) for one in answers] == ([SIZE] if kind == PING else [])
        for answer in answers:
            asker.receive(0.0, answer)
            assert asker.take_pongs(0.0) == []


def test_a_flood_of_pings_is_answered_in_part() -> None:
    asker, other = pair()
    pings = [asker.ping(0.0, number) for number in range(PONGS_WAITING + 5)]
    for ping in pings:
        other.receive(0.0, ping)
    assert len(other.take_pongs(0.0)) == PONGS_WAITING
    assert (other.pings_received, other.pings_dropped, other.pongs_sent) == (PONGS_WAITING, 5, PONGS_WAITING)
    other.receive(0.0, pings[0])
    assert len(other.take_pongs(0.0)) == 1


def test_the_oldest_ping_is_forgotten_first() -> None:
    asker, other = pair()
    pings = [asker.ping(number / 10, number) for number in range(OUTSTANDING + 1)]
    assert (asker.outstanding, asker.forgotten) == (OUTSTANDING, 1)
    assert answered(asker, other, 9.0, pings[0]) is None
    assert answered(asker, other, 9.0, pings[1]) is not None


def test_what_an_outage_left_without_an_answer_is_forgotten() -> None:
    asker, other = pair()
    pings = [asker.ping(number / 10, number) for number in range(OUTSTANDING)]
    last = asker.ping(6.4 + ANSWER_MAXIMUM, OUTSTANDING)
    assert (asker.outstanding, asker.forgotten) == (1, OUTSTANDING)
    assert answered(asker, other, 17.0, pings[-1]) is None
    assert answered(asker, other, 17.0, last) is not None


@pytest.mark.parametrize("secret", [b"short", bytes(65), "text" * 8, None])
def test_secrets_that_are_none(secret: object) -> None:
    with pytest.raises(UsageError, match="secret"):
        Heartbeats(secret=secret)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [-1, NUMBER_MAXIMUM + 1, 1.0, True, None, "1"])
def test_numbers_that_are_none(number: int) -> None:
    heartbeats = Heartbeats(secret=SECRET)
    with pytest.raises(UsageError, match="sequence"):
        heartbeats.ping(0.0, number)
    with pytest.raises(UsageError, match="boot"):
        Heartbeats(secret=SECRET, boot=number)


def test_a_number_is_on_its_way_once() -> None:
    asker, other = pair()
    ping = asker.ping(0.0, 1)
    asker.probe(0.0, 1)  # another kind
    with pytest.raises(UsageError, match="on its way") as caught:
        asker.ping(1.0, 1)
    assert caught.value.hint
    assert answered(asker, other, 1.0, ping) is not None
    asker.ping(2.0, 1)


# --- a model


class Network(RuleBasedStateMachine):
    """One asks, the other and a kernel answer, and the network does what it likes with all of it."""

    wire = Bundle("wire")

    def __init__(self) -> None:
        super().__init__()
        self.asker, self.other = pair()
        self.now = 0.0
        self.next = 0
        self.waiting: dict[tuple[int, int], float] = {}  # (type, number), in the order in which they left
        self.pongs = self.replies = self.came = 0

    @rule(seconds=st.floats(0.0, 100.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=wire, kernel=st.booleans())
    def ask(self, kernel: bool) -> bytes:
        self.next += 1
        if len(self.waiting) == OUTSTANDING:
            del self.waiting[next(iter(self.waiting))]
        self.waiting = {
            key: sent_at for key, sent_at in self.waiting.items() if sent_at >= self.now - ANSWER_MAXIMUM
        }
        self.waiting[REPLY if kernel else PONG, self.next] = self.now
        return (self.asker.probe if kernel else self.asker.ping)(self.now, self.next)

    @rule(target=wire, asked=wire)
    def answer(self, asked: bytes) -> bytes:
        if is_probe(asked):
            return reply_payload(asked)
        self.other.receive(self.now, asked)
        pongs = self.other.take_pongs(self.now)
        assert len(pongs) == (asked[4] == PING)
        return pongs[0] if pongs else asked

    @rule(target=wire, some=wire, at=st.integers(4, SIZE - 1), value=st.integers(0, 255))
    def damage(self, some: bytes, at: int, value: int) -> bytes:
        return some[:at] + bytes([value]) + some[at + 1 :]

    @rule(some=wire)
    def hear(self, some: bytes) -> None:
        heard = self.asker.receive(self.now, some)
        self.came += 1
        if heard is None:
            return
        kind = PONG if isinstance(heard, Pong) else REPLY
        sent_at = self.waiting.pop((kind, heard.sequence))  # KeyError: never asked, or answered before
        assert heard.sent_at == sent_at <= heard.received_at == self.now
        if isinstance(heard, Pong):
            self.pongs += 1
            assert 0.0 <= heard.held <= self.now - sent_at
        else:
            self.replies += 1

    @invariant()
    def sums(self) -> None:
        asker = self.asker
        assert asker.outstanding == len(self.waiting)
        assert (asker.pongs_received, asker.replies_received) == (self.pongs, self.replies)
        assert asker.pings_sent + asker.probes_sent == self.pongs + self.replies + asker.forgotten + len(
            self.waiting
        )
        assert self.came == (
            self.pongs + self.replies + asker.pings_received + asker.pings_dropped + asker.unknown
        )
        assert len(asker.take_pongs(self.now)) <= PONGS_WAITING
        assert repr(asker).startswith("<Heartbeats")


TestNetwork = Network.TestCase
TestNetwork.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

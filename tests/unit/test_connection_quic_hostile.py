# SPDX-License-Identifier: Apache-2.0
"""What anybody may send to a QUIC connection: nothing of it raises, ends an open one, or grows."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.connection_quic_peer import SETTINGS, World, connected, the_end
from userspace.connection.heartbeat import MAGIC, SIZE
from userspace.connection.transport import MESSAGES_WAITING, Closed, Ending, Phase


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The library logs what it is sent."""
    logging.getLogger("quic").disabled = True
    yield
    logging.getLogger("quic").disabled = False


def damaged(rng: random.Random, datagram: bytes) -> bytes:
    """A datagram with some of it changed, cut off, repeated, or something put before it."""
    whole = bytearray(datagram)
    shape = rng.randrange(6)
    if shape == 0:
        for _ in range(rng.randrange(1, 4)):
            whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    elif shape == 1:
        del whole[rng.randrange(len(whole)) :]
    elif shape == 2:
        whole = bytearray(rng.randbytes(rng.randrange(1, 40))) + whole
    elif shape == 3:
        whole[0] = rng.randrange(256)
    elif shape == 4:
        at = rng.randrange(min(30, len(whole)))
        whole[at : at + 4] = rng.randbytes(4)
    else:
        whole += whole[: rng.randrange(len(whole))]
    return bytes(whole)


class Attacked(World):
    """Whoever is on the path sends what they like between the datagrams of the peer; they are not lost."""

    attack: Callable[[bytes], list[bytes]] = staticmethod(lambda _datagram: [])
    forged = 0

    def _put(self, at: float, up: bool, datagram: bytes) -> None:
        super()._put(at, up, datagram)
        if not up:
            for forged in self.attack(datagram):
                self.forged += 1
                super()._put(at, False, forged)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_damaged_datagrams_beside_the_right_ones(seed: int) -> None:
    """From the first datagram on: it opens, and what is sent arrives once."""
    rng = random.Random(seed)
    world = Attacked()
    world.attack = lambda datagram: [damaged(rng, datagram) for _ in range(3)]
    world.connect()
    assert world.opened, world.events
    messages = [rng.randbytes(200) for _ in range(10)]
    assert all(world.client.send(world.now, message) for message in messages)
    world.server.say(b"and back")
    world.run(1.0)
    assert world.opened
    assert sorted(world.server.messages) == sorted(messages)
    assert world.messages == [b"and back"]
    told = world.client.snapshot()
    assert world.forged > 10
    assert world.forged / 2 < told.ignored <= world.forged
    assert world.server.handshakes == 1


@given(st.lists(st.binary(max_size=100), max_size=20), st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_garbage(datagrams: list[bytes], is_open: bool) -> None:
    world = connected() if is_open else World()
    if not is_open:
        world.client.connect(world.now)
    before = world.client.snapshot()
    for datagram in datagrams:
        world.client.receive(world.now, datagram)
        world.client.take_datagrams(world.now)
    told = world.client.snapshot()
    assert told.datagrams_received - before.datagrams_received == len(datagrams)
    assert told.ignored - before.ignored == len(datagrams)
    assert world.client.take_events() == []
    world.run(1.0)
    assert world.opened


@given(st.integers(0, 255), st.binary(max_size=60), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_first_bytes_that_look_right(first: int, rest: bytes, version: int) -> None:
    """Long headers with the connection's own IDs, of any type and version, and short ones."""
    world = World()
    world.client.connect(world.now)
    (initial,) = world.client.take_datagrams(world.now)
    destination, source = initial[6:14], initial[15:23]
    for number in (version, 1):
        ids = bytes([len(source)]) + source + bytes([len(destination)]) + destination
        forged = bytes([first | 0x80]) + number.to_bytes(4, "big") + ids + rest
        world.client.receive(world.now, forged)
    world.client.receive(world.now, bytes([first & 0x7F]) + source + rest)
    world.client.take_datagrams(world.now)
    # A stranger who does not see the IDs cannot do this; whoever does may choose another version.
    if world.client.phase is Phase.CLOSED:
        (closed,) = [one for one in world.client.take_events() if isinstance(one, Closed)]
        assert closed.ending is Ending.PROTOCOL
        assert version == 0
        return
    world.run(3.0)
    assert world.opened


def test_heartbeats_that_nobody_asked_for() -> None:
    world = connected()
    for kind in range(256):
        world.client.receive(world.now, MAGIC + bytes([kind]) + bytes(SIZE - 5))
    assert world.client.take_events() == []
    assert world.client.take_datagrams(world.now) == []
    assert world.client.snapshot().ignored == 256


def broken(*_arguments: object, **_options: object) -> None:
    raise KeyError("gone\n")


def test_words_of_the_library_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that it should not raise ends the connection, is told, and reaches nobody."""
    for call in ("receive_datagram", "datagrams_to_send", "handle_timer"):
        world = connected()
        assert world.client._engine is not None
        monkeypatch.setattr(world.client._engine.library, call, broken)
        if call == "receive_datagram":
            world.client.receive(world.now, b"x")
        elif call == "handle_timer":
            world.client.on_timeout(world.now + 100.0)
        world.client.take_datagrams(world.now + 100.0)
        world.run(1.0)
        closed = the_end(world)
        assert closed.ending is Ending.LOCAL_ERROR
        assert closed.reason == "KeyError: 'gone\\n'"


def test_a_peer_that_sends_more_than_is_taken() -> None:
    world = connected()
    for _ in range(MESSAGES_WAITING + 10):
        world.client._give(b"x")
    assert len(world.client.take_events()) == MESSAGES_WAITING
    assert world.client.messages_lost == 10


def test_many_beginnings_of_streams() -> None:
    """The peer opens as many streams as it may and ends none: what is held is bounded."""
    world = connected()
    library = world.server.library
    assert library is not None
    for number in range(200):
        library.send_stream_data(3 + 4 * number, bytes(1000))
    world.run(2.0)
    assert world.opened
    assert len(world.client._incoming) == 128
    held = sum(len(one) for one in world.client._incoming._partial.values())
    assert held <= 128 * SETTINGS.largest


def test_early_keys_are_not_needed_to_close() -> None:
    """Closing before the server has said anything: what is sent is small and can be read by it."""
    world = World()
    world.client.connect(world.now)
    world.client.take_datagrams(world.now)
    world.client.close(world.now, 1, "changed my mind")
    (last,) = world.client.take_datagrams(world.now)
    assert len(last) <= 1200
    assert world.client.take_datagrams(world.now) == []

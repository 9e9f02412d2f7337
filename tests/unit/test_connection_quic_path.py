# SPDX-License-Identifier: Apache-2.0
"""QUIC connections over paths that lose, wait, move and end; and FlowController's word over what leaves."""

from __future__ import annotations

import math
import random
from functools import partial

import msgspec
import pytest
from aioquic.quic.connection import Limit
from aioquic.tls import Epoch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.unit.connection_quic_peer import SETTINGS, Server, World, connected, the_end
from userspace.connection.quic_session import QuicSettings
from userspace.connection.transport import Ending, Heard, Phase
from userspace.flow.congestion import initial_window
from userspace.flow.registry import CONTROLLERS

MTU = SETTINGS.mtu


def changed(**options: object) -> QuicSettings:
    return msgspec.structs.replace(SETTINGS, **options)


def numbered(count: int, size: int = 1000) -> list[bytes]:
    return [number.to_bytes(4, "big") + bytes(size - 4) for number in range(count)]


def between(begin: float, end: float, now: float, up: bool, *, only: bool | None = None) -> bool:
    """Everything is lost for a time, or what goes one way."""
    return begin <= now < end and only in {None, up}


def sometimes(rng: random.Random, part: float, _now: float, _up: bool) -> bool:
    """Some of it is lost."""
    return rng.random() < part


class Feeder:
    """Sends messages as fast as they are taken, or so many a second; gives as many as there are."""

    def __init__(self, world: World, messages: list[bytes], *, rate: float = math.inf) -> None:
        self.world, self.messages, self.rate = world, messages, rate
        self.began = world.now
        self.given = 0
        self.done_at = math.inf

    def __call__(self, now: float) -> float:
        due = min(len(self.messages), (now - self.began) * self.rate + 1e-6)
        while self.given < due and self.world.client.send(now, self.messages[self.given]):
            self.given += 1
        if len(self.world.server.messages) == len(self.messages):
            self.done_at = min(self.done_at, now)
        rest = self.given < len(self.messages) and self.rate < math.inf
        return max(now + 1e-3, self.began + (self.given + 1) / self.rate) if rest else math.inf


def check_sums(world: World) -> None:
    """What the library counts as on its way is what FlowController does, but for what timeouts gave up."""
    client = world.client
    told = client.snapshot()
    assert told.accepted == told.queued + told.messages_sent + told.abandoned
    assert told.datagrams_sent == len(world.sent)
    assert told.bytes_sent == sum(size for _, size in world.sent)
    assert told.streams_open <= world.settings.streams
    engine = client._engine
    if engine is None:
        return
    flow = client.flow.snapshot()
    assert flow.sent_bytes == flow.delivered_bytes + flow.in_flight + client.flow._recovery.lost_bytes
    space = engine.library._spaces.get(Epoch.ONE_RTT)
    if space is not None:
        here = {number for number, one in space.sent_packets.items() if one.in_flight}
        assert set(engine.congestion._numbers) <= here
        assert flow.packets_in_flight >= 0
        handshake = engine.congestion._handshake
        assert handshake >= 0
        assert engine.congestion.bytes_in_flight <= flow.in_flight + handshake + 100 * MTU


# --- outages


@pytest.mark.parametrize(
    ("rate", "delay", "congestion"),
    [(0.0, 0.0005, "cubic"), (0.0, 0.1, "cubic"), (20.0, 0.0005, "cubic"), (20.0, 0.1, "bbr")],
)
def test_ten_seconds_without_a_path(rate: float, delay: float, congestion: str) -> None:
    """No other handshake, nothing lost, and used again at most a second and two round trips after it."""
    world = World(
        delay=delay,
        settings=changed(congestion=congestion),
        lose=partial(between, 102.0, 112.0),
    )
    world.connect()
    messages = numbered(int(14 * rate))
    world.run(16.0, every=Feeder(world, messages, rate=rate))
    world.run(5.0)
    assert world.opened
    assert world.server.handshakes == 1
    assert sorted(world.server.messages) == messages
    heard = [event.at for event in world.of(Heard) if isinstance(event, Heard)]
    assert min(at for at in heard if at > 112.0) <= 113.0 + 4 * delay
    assert not [at for at in heard if 102.0 + 2 * delay < at < 112.0]
    # One question a second, and what timeouts send again: silence is not answered by noise.
    assert len([at for at, _ in world.sent if 103.0 <= at < 112.0]) <= 40
    check_sums(world)


def test_an_outage_in_one_direction() -> None:
    for up in (False, True):
        world = World(lose=partial(between, 102.0, 112.0, only=up))
        world.connect()
        messages = numbered(200)
        world.run(14.0, every=Feeder(world, messages, rate=20.0))
        world.run(5.0)
        assert world.opened
        assert sorted(world.server.messages) == messages
        assert world.server.handshakes == 1


def test_the_longest_outage_and_one_that_is_too_long() -> None:
    for length, open_again in ((28.0, True), (31.0, False)):
        world = World(lose=partial(between, 102.0, 102.0 + length))
        world.connect()
        world.run(40.0)
        assert world.opened is open_again
        if not open_again:
            assert the_end(world).ending is Ending.LOST


def test_without_keep_alive_it_sleeps_and_ends() -> None:
    world = World(settings=changed(keep_alive=None))
    world.connect()
    sent = len(world.sent)
    world.run(28.0)
    assert (len(world.sent), world.client.snapshot().keep_alives) == (sent, 0)
    world.run(10.0)
    assert the_end(world).ending is Ending.LOST


def test_keep_alive_is_quiet_while_there_is_traffic() -> None:
    world = connected()
    world.run(10.0, every=Feeder(world, numbered(100), rate=10.0))
    assert world.client.snapshot().keep_alives == 0
    world.run(10.0)
    assert world.client.snapshot().keep_alives in {9, 10}
    assert world.opened


def test_a_peer_that_wants_less_silence_has_it() -> None:
    """The shorter of both idle timeouts counts (RFC 9000, 10.1)."""
    world = connected(server=Server(idle_timeout=3.0))
    world.server.alive = False
    world.run(10.0)
    assert the_end(world).ending is Ending.LOST
    assert world.events[-1][0] < 106.0


# --- another path


def test_moving_is_told_by_the_next_datagram() -> None:
    world = connected()
    world.run(1.0, every=Feeder(world, numbered(50)))
    engine = world.client._engine
    assert engine is not None
    before, cid = world.client.flow, engine.library._peer_cid.cid
    world.address = "elsewhere"
    world.client.on_path_change(world.now)
    world.run(0.1)
    assert world.server.library is not None
    assert world.server.library.get_peer_address() == "elsewhere"
    assert engine.library._peer_cid.cid != cid
    assert world.client.flow is not before
    assert world.client.flow.snapshot().acknowledged_packets > 0
    world.run(2.0, every=Feeder(world, numbered(100)))
    assert len(world.server.messages) == 150
    assert world.server.handshakes == 1
    assert world.client.snapshot().path_changes == 1
    check_sums(world)


def test_moving_with_much_on_its_way() -> None:
    world = connected(delay=0.1)
    messages = numbered(300)
    feeder = Feeder(world, messages)
    world.run(0.25, every=feeder)
    assert world.client.flow.in_flight > 0
    world.address = "elsewhere"  # what the server sends to the old one is lost
    world.client.on_path_change(world.now)
    assert world.client.flow.in_flight == 0
    world.run(20.0, every=feeder)
    assert sorted(world.server.messages) == messages
    check_sums(world)


def test_a_translator_that_forgets_is_survived() -> None:
    """The address changes without anybody telling (RFC 9000, 9: the peer sees it and asks)."""
    world = connected()
    world.address = "elsewhere"
    world.run(3.0, every=Feeder(world, numbered(20), rate=10.0))
    assert len(world.server.messages) == 20
    assert world.opened


# --- window and pacing are FlowController's


def test_a_burst_is_the_initial_window_and_the_rest_is_paced() -> None:
    world = connected(delay=0.05)
    began = world.now
    world.run(0.3, every=Feeder(world, numbered(100)))
    at_once = sum(size for at, size in world.sent if began <= at < began + 0.001)
    assert MTU < at_once <= initial_window(MTU)
    assert len({at for at, _ in world.sent if at > began}) > 10


def test_the_rate_can_be_bounded() -> None:
    world = connected(settings=changed(max_rate=20_000.0))
    began = world.now
    world.run(5.0, every=Feeder(world, numbered(200)))
    sent = sum(size for at, size in world.sent if at >= began)
    assert 5 * 20_000 <= sent <= 5 * 20_000 + initial_window(MTU) + MTU
    world.client.flow.set_max_rate(world.now, None)
    world.run(1.0)
    assert len(world.server.messages) == 200


def test_a_controller_of_losses_slows_down_and_one_of_rates_does_not() -> None:
    taken = {}
    for name in ("newreno", "bbr"):
        rng = random.Random(1)
        world = World(
            delay=0.02,
            settings=changed(congestion=name),
            lose=partial(sometimes, rng, 0.02),
        )
        world.connect()
        feeder = Feeder(world, numbered(300))
        world.run(60.0, every=feeder)
        taken[name] = feeder.done_at - feeder.began
        assert world.client.flow.snapshot().lost_packets > 3
    assert taken["bbr"] < taken["newreno"] / 3


@pytest.mark.parametrize("congestion", sorted(CONTROLLERS))
def test_a_bottleneck_is_used(congestion: str) -> None:
    """4 Mb/s: 400 messages of 1,000 bytes take 0.8 s at least."""
    world = World(delay=0.02, rate=5e5, settings=changed(congestion=congestion))
    world.connect()
    feeder = Feeder(world, numbered(400))
    world.run(3.0, every=feeder)
    assert sorted(world.server.messages) == numbered(400)
    assert 0.8 < feeder.done_at - feeder.began < 1.2


def test_the_round_trip_time_is_that_of_the_path() -> None:
    world = World(delay=0.03)
    world.connect()
    assert world.client.flow.smoothed_rtt == pytest.approx(0.06, rel=0.05)  # by the handshake
    world.run(2.0, every=Feeder(world, numbered(100), rate=100.0))
    flow = world.client.flow
    assert flow.smoothed_rtt == pytest.approx(0.06, rel=0.05)
    assert flow.min_rtt == pytest.approx(0.06, rel=0.01)


def test_a_connection_without_data_is_limited_by_that() -> None:
    world = connected()
    window = world.client.flow.window
    world.run(20.0, every=Feeder(world, numbered(200, 100), rate=10.0))
    assert world.client.flow.window <= 2 * window
    assert world.client.flow._ack.app_limited
    world.run(0.1, every=Feeder(world, numbered(900)))
    assert len(world.client._outgoing) > 0
    assert not world.client.flow._ack.app_limited


# --- what the peer allows


class Stingy(Limit):
    """Allows no more than it did at first, until it is told to."""

    opened = False

    @property
    def value(self) -> int:
        return 1 << 20 if self.opened else 128

    @value.setter
    def value(self, _value: int) -> None:
        pass


def test_streams_wait_for_the_peer() -> None:
    world = connected()
    library = world.server.library
    assert library is not None
    stingy = Stingy(library._local_max_streams_uni.frame_type, "", 0)
    stingy.sent = 128
    library._local_max_streams_uni = stingy
    messages = numbered(200, 100)
    world.run(2.0, every=Feeder(world, messages))
    assert len(world.server.messages) == 128
    assert world.client.snapshot().queued == 72
    assert world.client.next_timeout() > world.now
    stingy.opened = True
    library.send_ping(1)
    world.run(2.0)
    assert sorted(world.server.messages) == messages


def test_bytes_wait_for_the_peer() -> None:
    server = Server()
    server.configuration.max_data = 20_000
    world = connected(server=server)
    assert server.library is not None
    server.library._local_max_data.used = -(1 << 30)  # so that it never allows more
    world.run(2.0, every=Feeder(world, numbered(100)))
    assert len(server.messages) == 20
    assert world.client.snapshot().queued == 80
    server.library._local_max_data.value = 1 << 20
    server.library.send_ping(1)
    world.run(2.0)
    assert len(server.messages) == 100


def test_the_library_is_given_no_more_than_may_leave() -> None:
    world = connected(delay=0.1, settings=changed(streams=20))
    most = 0

    def every(now: float) -> float:
        nonlocal most
        most = max(most, world.client.snapshot().streams_open)
        return feeder(now)

    feeder = Feeder(world, numbered(400, 100))
    world.run(10.0, every=every)
    assert len(world.server.messages) == 400
    assert most == 20


def test_a_queue_that_is_full_says_so() -> None:
    world = connected(settings=changed(queue=5))
    assert [world.client.send(world.now, b"x") for _ in range(7)] == [True] * 5 + [False] * 2
    assert world.client.snapshot().refused == 2
    world.run(0.5)
    assert len(world.server.messages) == 5


# --- any path


@given(
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.01, 0.1, 0.3]),
    jitter=st.sampled_from([0.0, 0.002, 0.03]),
    delay=st.sampled_from([0.0, 0.0001, 0.01, 0.15]),
    rate=st.sampled_from([math.inf, 1e6, 1e5]),
    congestion=st.sampled_from(sorted(CONTROLLERS)),
    size=st.sampled_from([1, 100, 1232]),
)
@settings(max_examples=20, deadline=None)
def test_every_message_arrives_once_over_any_path(
    seed: int, loss: float, jitter: float, delay: float, rate: float, congestion: str, size: int
) -> None:
    rng = random.Random(seed)
    world = World(
        delay=delay,
        rate=rate,
        jitter=lambda: rng.uniform(0.0, jitter),
        lose=partial(sometimes, rng, loss),
        settings=changed(congestion=congestion, connect_timeout=60.0),
    )
    world.connect(60.0)
    note(repr(world.client.flow))
    assert world.opened
    messages = [rng.randbytes(size) for _ in range(40)]
    feeder = Feeder(world, messages)

    def every(now: float) -> float:
        if not world.steps % 8:
            check_sums(world)
        return feeder(now)

    while feeder.done_at == math.inf and world.now < feeder.began + 120.0:
        world.run(1.0, every=every)
    assert world.client.phase is Phase.OPEN
    assert sorted(world.server.messages) == sorted(messages)
    world.lose = lambda _now, _up: False
    world.run(2.0)
    left = []

    def look(_now: float) -> float:
        left.append(world.client.flow.in_flight)
        return math.inf

    world.run(2.0, every=look)
    assert world.client.snapshot().streams_open == 0
    assert min(left) == 0  # but for a question a second

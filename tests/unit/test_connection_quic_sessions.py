# SPDX-License-Identifier: Apache-2.0
"""QUIC sessions: what is resumed, what is sent early, and for whom; and the settings of connections."""

from __future__ import annotations

import datetime as dt
import math

import msgspec
import pytest

from tests.unit.connection_quic_peer import (
    ALPN,
    CLIENT,
    SERVER,
    SETTINGS,
    Server,
    World,
    connected,
    in_the_web,
    the_end,
)
from userspace.connection.quic_session import QuicSession, QuicSettings
from userspace.connection.transport import (
    Ending,
    Opened,
)
from xdp.errors import UsageError

EARLY = msgspec.structs.replace(SETTINGS, early_data=True)


def again(world: World, settings: QuicSettings, session: QuicSession | None, **options: object) -> None:
    world.settings = settings
    world.events.clear()
    world.new_client(session=session, **options)
    world.client.connect(world.now)


def test_a_session_is_resumed_without_certificates() -> None:
    world = connected()
    session = world.client.session
    assert session is not None
    assert session.rtt == pytest.approx(0.02, rel=0.1)
    assert "secret" not in repr(session)
    assert SERVER.public_key.hex() in repr(session)
    again(world, SETTINGS, session)
    assert not world.client.send(world.now, b"too early")
    world.run(1.0)
    assert world.of(Opened) == [Opened(resumed=True, early=False)]
    assert world.client.peer_key == SERVER.public_key
    assert world.client.session is not None
    assert world.client.session.ticket.ticket != session.ticket.ticket


def test_a_session_knows_how_long_the_path_is() -> None:
    """RFC 9002, 6.2.2: the first datagram is sent again after two round trips of the last connection."""
    world = connected(delay=0.02)
    session = world.client.session
    world.server.alive = False
    again(world, SETTINGS, session)
    began, before = world.now, len(world.sent)
    world.run(1.0)
    assert world.sent[before][0] == began
    assert world.sent[before + 1][0] - began == pytest.approx(0.08, rel=0.1)


def test_early_data_takes_half_a_round_trip() -> None:
    world = connected(settings=EARLY)
    again(world, EARLY, world.client.session)
    messages = [bytes([number]) * 1000 for number in range(5)]
    assert all(world.client.send(world.now, message) for message in messages)
    world.run(0.0101)
    assert sorted(world.server.messages) == messages
    assert not world.opened
    world.run(1.0)
    assert world.of(Opened) == [Opened(resumed=True, early=True)]
    assert world.client.snapshot().messages_sent == 5


def test_early_data_that_is_not_taken_comes_later() -> None:
    """The server has forgotten the session: it was restarted."""
    world = connected(settings=EARLY)
    session = world.client.session
    world.server = Server()
    again(world, EARLY, session)
    messages = [bytes([number]) * 1000 for number in range(5)]
    assert all(world.client.send(world.now, message) for message in messages)
    world.run(3.0)
    assert world.of(Opened) == [Opened(resumed=False, early=False)]
    assert sorted(world.server.messages) == messages
    assert world.client.peer_key == SERVER.public_key


def test_early_data_before_the_server_asks_for_the_address() -> None:
    """It is thrown away (RFC 9000, 8.1.2): so it is sent again, and nothing of it counts any more."""
    world = connected(settings=EARLY)
    session = world.client.session
    world.server.retry, world.server.library = True, None
    again(world, EARLY, session)
    messages = [bytes([number]) * 1000 for number in range(5)]
    assert all(world.client.send(world.now, message) for message in messages)
    world.run(3.0)
    assert world.of(Opened) == [Opened(resumed=True, early=True)]
    assert sorted(world.server.messages) == messages
    assert world.client.snapshot().streams_open == 0
    assert world.client._engine is not None
    assert world.client._engine.congestion.bytes_in_flight == 0


def test_early_data_is_bounded_as_well() -> None:
    settings = msgspec.structs.replace(EARLY, queue=2)
    world = connected(settings=settings)
    again(world, settings, world.client.session)
    assert [world.client.send(world.now, b"x") for _ in range(3)] == [True, True, False]


def test_a_session_is_not_used_for_another_key() -> None:
    """Nothing is sent early to whom it is not for."""
    world = connected(settings=EARLY)
    again(world, EARLY, world.client.session, peer_key=CLIENT.public_key)
    assert not world.client.send(world.now, b"for somebody else")
    world.run(1.0)
    assert the_end(world).ending is Ending.IDENTITY
    assert world.server.messages == []


def test_a_session_proves_no_more_than_it_was_asked_for() -> None:
    """One that nobody has vouched for is not used where authorities have to."""
    server, authority = in_the_web()
    unverified = QuicSettings(alpn=(ALPN,), unverified=True, server_name="localhost")
    world = connected(server=server, settings=unverified)
    session = world.client.session
    assert session is not None
    assert not session.verified
    checked = QuicSettings(alpn=(ALPN,), authorities=authority, server_name="localhost")
    for resumed in (False, True):
        again(world, checked, session)
        world.run(1.0)
        assert world.of(Opened) == [Opened(resumed=resumed, early=False)]
        session = world.client.session
        assert session is not None
        assert session.verified


def test_a_ticket_that_is_too_old_is_not_used() -> None:
    world = connected()
    session = world.client.session
    assert session is not None
    session.ticket.not_valid_after = session.ticket.not_valid_before - dt.timedelta(1)
    again(world, SETTINGS, session)
    world.run(1.0)
    assert world.of(Opened) == [Opened(resumed=False, early=False)]


# --- settings, words


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpn": ()}, {"alpn": ("",)}, {"alpn": ("ü",)}, {"alpn": ("x",) * 9}, {"alpn": ("x" * 256,)},
        {"server_name": ""}, {"server_name": "ü"}, {"authorities": "text"},
        {"idle_timeout": 0.0}, {"idle_timeout": math.nan}, {"keep_alive": 0.0}, {"keep_alive": 31.0},
        {"connect_timeout": -1.0}, {"mtu": 1199}, {"mtu": 70_000}, {"largest": 0}, {"largest": 1 << 21},
        {"queue": 0}, {"streams": 0}, {"streams": 1 << 13}, {"congestion": "best"}, {"max_rate": 0.0},
        {"max_rate": math.nan},
    ],
)  # fmt: skip
def test_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        QuicSettings(**{"alpn": (ALPN,), "unverified": True, **wrong})  # type: ignore[arg-type]


def test_settings_are_for_files() -> None:
    assert msgspec.json.decode(msgspec.json.encode(SETTINGS), type=QuicSettings) == SETTINGS

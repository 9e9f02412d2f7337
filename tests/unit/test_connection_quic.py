# SPDX-License-Identifier: Apache-2.0
"""QUIC connections: who answers, what is said, how it ends; against aioquic's server in virtual time."""

from __future__ import annotations

import json
from errno import ECONNREFUSED, EHOSTUNREACH

import msgspec
import pytest

from tests.unit.connection_quic_peer import (
    ALPN,
    CLIENT,
    SECRET,
    SERVER,
    SETTINGS,
    Server,
    World,
    connected,
    in_the_web,
    the_end,
)
from userspace.connection.heartbeat import HostReply, Pong
from userspace.connection.identity import Identity
from userspace.connection.quic import PINGS, QuicConnection
from userspace.connection.quic_library import QuicErrorCode, QuicProtocolVersion, events
from userspace.connection.quic_session import Engine, QuicSettings
from userspace.connection.transport import (
    Closed,
    Ending,
    Message,
    Opened,
    Phase,
    Transport,
)
from xdp.classify_heartbeat import is_probe, reply_payload
from xdp.errors import SluiceError, UnsupportedError, UsageError

# --- opening


def test_both_know_who_the_other_is() -> None:
    world = connected()
    assert world.of(Opened) == [Opened(resumed=False, early=False)]
    assert [at for at, event in world.events if isinstance(event, Opened)] == [pytest.approx(100.02)]
    assert world.client.peer_key == SERVER.public_key
    assert world.server.library is not None
    shown = world.server.library.tls._peer_certificate
    assert shown == CLIENT.certificate
    assert world.server.handshakes == 1


def test_without_an_identity_nothing_is_shown() -> None:
    world = connected(identity=None)
    assert world.server.library is not None
    assert world.server.library.tls._peer_certificate is None


def test_the_right_key() -> None:
    settings = msgspec.structs.replace(SETTINGS, unverified=False)
    assert connected(settings=settings, peer_key=SERVER.public_key).client.peer_key == SERVER.public_key


def test_a_peer_with_another_key_is_refused() -> None:
    """It restarted with a new one, or it is somebody else."""
    world = World(Server(Identity(b"\x09" * 32)), peer_key=SERVER.public_key)
    world.connect()
    assert the_end(world).ending is Ending.IDENTITY
    assert not world.of(Opened)
    world.run(1.0)
    assert isinstance(world.server.events[-1], events.ConnectionTerminated)
    assert world.server.events[-1].error_code == 0x12A  # bad_certificate


def test_a_key_of_another_kind_is_none() -> None:
    server, _ = in_the_web()
    assert connected(server=server).client.peer_key is None
    world = World(in_the_web()[0], peer_key=SERVER.public_key)
    world.connect()
    assert the_end(world).ending is Ending.IDENTITY


@pytest.mark.parametrize(("name", "good"), [("localhost", True), ("elsewhere", False)])
def test_authorities(name: str, good: bool) -> None:
    server, authority = in_the_web()
    settings = QuicSettings(alpn=(ALPN,), authorities=authority, server_name=name)
    world = World(server, settings=settings)
    world.connect()
    if good:
        assert world.opened
    else:
        closed = the_end(world)
        assert closed.ending is Ending.PROTOCOL
        assert closed.code == 0x12A
        assert "elsewhere" in closed.reason


def test_nobody_is_trusted_by_mistake() -> None:
    with pytest.raises(UsageError, match="who the peer") as caught:
        QuicConnection(QuicSettings(alpn=(ALPN,)), secret=SECRET)
    assert caught.value.hint
    for key in (b"short", "x" * 32, bytearray(32)):
        with pytest.raises(UsageError, match="key"):
            QuicConnection(SETTINGS, secret=SECRET, peer_key=key)  # type: ignore[arg-type]


def test_another_protocol() -> None:
    world = World(Server(alpn="h3"))
    world.connect()
    closed = the_end(world)
    assert (closed.ending, closed.code) == (Ending.PEER_CLOSED, 0x178)  # no_application_protocol


def test_a_server_that_chooses_no_protocol() -> None:
    server = Server()
    server.configuration.alpn_protocols = None
    world = World(server)
    world.connect()
    closed = the_end(world)
    assert (closed.ending, closed.code) == (Ending.PROTOCOL, 0x178)


def test_another_version_of_quic() -> None:
    server = Server()
    world = World(server)
    world.client.connect(world.now)
    (initial,) = world.client.take_datagrams(world.now)
    destination, source = initial[6:14], initial[15:23]
    # RFC 9000, 17.2.1: what it speaks is version 2 (RFC 9369)
    answer = b"\x80" + bytes(4) + b"\x08" + source + b"\x08" + destination
    answer += int(QuicProtocolVersion.VERSION_2).to_bytes(4, "big")
    world.client.receive(world.now, answer)
    (closed,) = [one for one in world.client.take_events() if isinstance(one, Closed)]
    assert closed.ending is Ending.PROTOCOL
    assert "version" in closed.reason


def test_nobody_there() -> None:
    world = World()
    world.server.alive = False
    world.client.connect(world.now)
    world.run(10.0)
    assert the_end(world) == Closed(Ending.TIMED_OUT)
    assert world.events[-1][0] == 105.0
    # RFC 9002, 6.2: twice the guess of the round-trip time, then doubled
    assert [round(at - 100.0, 3) for at, _ in world.sent] == [0.0, 0.666, 1.998, 4.662]


def test_refused_while_opening() -> None:
    world = World()
    world.server.alive = False
    world.client.connect(world.now)
    world.client.on_error(world.now, ECONNREFUSED)
    world.run(0.1)
    assert the_end(world) == Closed(Ending.REFUSED, ECONNREFUSED)


# --- open


def test_pings_come_back() -> None:
    world = connected()
    assert world.client.ping(world.now, 5)
    with pytest.raises(UsageError, match="on its way"):
        world.client.ping(world.now, 5)
    world.run(0.5)
    (pong,) = world.of(Pong)
    assert isinstance(pong, Pong)
    assert (pong.sequence, pong.sent_at) == (5, 101.0)
    assert pong.round_trip == pytest.approx(0.021, abs=1e-4)  # with the delay of the acknowledgement
    assert world.client.ping(world.now, 5)
    for number in (-1, 1 << 64, 1.0):
        with pytest.raises(UsageError, match="sequence"):
            world.client.ping(world.now, number)  # type: ignore[arg-type]


def test_pings_that_wait_are_bounded() -> None:
    world = connected()
    world.server.alive = False
    for number in range(3 * PINGS):
        world.client.ping(world.now, number)
    assert len(world.client._pings) == PINGS
    world.server.alive = True
    world.run(2.0)
    assert [one.sequence for one in world.of(Pong) if isinstance(one, Pong)] == list(
        range(2 * PINGS, 3 * PINGS)
    )


def test_probes_ask_the_host() -> None:
    world = connected()
    assert world.client.probe(world.now, 3)
    (probe,) = [one for one in world.client.take_datagrams(world.now) if is_probe(one)]
    world.client.receive(101.5, reply_payload(probe))
    world.client.receive(101.5, reply_payload(probe))  # again: nothing
    assert world.client.take_events() == [HostReply(3, 101.0, 101.5)]
    assert world.client.snapshot().ignored == 1


def test_messages_of_the_peer() -> None:
    world = connected()
    for payload in (b"hello", bytes(1232)):
        world.server.say(payload)
    world.run(1.0)
    assert world.messages == [b"hello", bytes(1232)]
    for _ in range(300):  # more streams than may be open at once
        world.server.say(b"x")
    world.run(1.0)
    assert len(world.messages) == 302


def test_a_stream_that_is_given_up_is_forgotten() -> None:
    world = connected()
    assert world.server.library is not None
    world.server.library.send_stream_data(3, b"a beginning")
    world.run(0.1)
    assert len(world.client._incoming) == 1
    world.server.library.reset_stream(3, 0)
    world.run(0.1)
    assert len(world.client._incoming) == 0
    assert world.messages == []


def test_a_message_that_is_too_long_ends_it() -> None:
    world = connected()
    world.server.say(bytes(1233))
    world.run(1.0)
    closed = the_end(world)
    assert closed.ending is Ending.PROTOCOL
    assert "1232" in closed.reason
    assert isinstance(world.server.events[-1], events.ConnectionTerminated)


def test_streams_that_want_an_answer_are_not_allowed() -> None:
    world = connected()
    assert world.server.library is not None
    world.server.library._remote_max_streams_bidi = 8  # it does not care
    world.server.library.send_stream_data(1, b"well?", end_stream=True)
    world.run(1.0)
    closed = the_end(world)
    assert (closed.ending, closed.code) == (Ending.PROTOCOL, QuicErrorCode.STREAM_LIMIT_ERROR)


# --- the end


def test_closing_tells_the_peer() -> None:
    world = connected()
    world.client.close(world.now, 7, "enough")
    world.run(1.0)
    assert the_end(world) == Closed(Ending.ASKED, 7, "enough")
    assert world.server.events[-1] == events.ConnectionTerminated(7, None, "enough")
    assert not world.client.send(world.now, b"x")
    assert not world.client.ping(world.now, 1)
    assert not world.client.probe(world.now, 1)
    world.client.close(world.now)
    world.client.on_path_change(world.now)
    world.client.on_timeout(world.now)
    world.client.receive(world.now, b"x")
    assert world.client.take_datagrams(world.now) == []
    assert world.client.take_events() == []


@pytest.mark.parametrize("connecting", [False, True])
def test_closing_before_it_is_open(connecting: bool) -> None:
    world = World()
    if connecting:
        world.client.connect(world.now)
        world.client.take_datagrams(world.now)
    world.client.close(world.now)
    world.run(0.1)
    assert the_end(world) == Closed(Ending.ASKED)


def test_the_peer_closes() -> None:
    world = connected()
    assert world.server.library is not None
    world.server.library.close(error_code=4, reason_phrase="too\x1b[31m many\n")
    world.run(0.0101)
    assert the_end(world) == Closed(Ending.PEER_CLOSED, 4, "too?[31m many?")


def test_the_peer_will_not_have_us() -> None:
    world = connected()
    assert world.server.library is not None
    world.server.library.close(error_code=QuicErrorCode.CONNECTION_REFUSED, frame_type=0)
    world.run(0.1)
    assert the_end(world).ending is Ending.REFUSED


def test_the_peer_dies() -> None:
    world = connected()
    world.server.alive = False
    world.run(60.0)
    assert the_end(world) == Closed(Ending.LOST)
    # 30 s after the first question that nobody answered, which was asked 1 s after the last answer
    assert world.events[-1][0] == pytest.approx(100.04 + 1 + 30, abs=0.01)


def test_the_peer_has_forgotten_us() -> None:
    """A stateless reset (RFC 9000, 10.3), and what only looks like one."""
    world = connected()
    assert world.server.library is not None
    token = world.server.library._host_cids[0].stateless_reset_token
    for forged in (b"\x40" + bytes(40), b"\xc0" + bytes(30) + token, b"\x40" + token, bytes(16)):
        world.client.receive(world.now, forged)
        assert world.opened
    world.client.receive(world.now, b"\x40" + bytes(20) + token)
    world.run(0.1)
    assert the_end(world) == Closed(Ending.PEER_RESET)


def test_what_icmp_says_of_a_live_peer_is_not_believed() -> None:
    world = connected()
    world.client.on_error(world.now, ECONNREFUSED)
    world.client.on_error(world.now, EHOSTUNREACH)
    world.run(0.5)
    assert world.opened
    assert world.client.keep_alives == 1


def test_what_icmp_says_of_a_dead_peer_is_believed_soon() -> None:
    world = connected()
    world.server.alive = False
    world.client.on_error(world.now, EHOSTUNREACH)
    world.run(0.4)
    assert world.opened  # a way may come back
    world.client.on_error(world.now, ECONNREFUSED)
    world.client.on_error(world.now + 0.05, ECONNREFUSED)  # says nothing new
    world.run(0.25)
    assert the_end(world) == Closed(Ending.REFUSED, ECONNREFUSED)
    assert world.events[-1][0] == pytest.approx(101.5)


# --- words


@pytest.mark.parametrize("payload", [b"", bytes(1233), "text", None])
def test_what_is_no_message(payload: bytes) -> None:
    with pytest.raises(UsageError, match="message"):
        connected().client.send(101.0, payload)


def test_codes_of_the_end() -> None:
    world = connected()
    with pytest.raises(UsageError, match="code"):
        world.client.close(world.now, 1 << 62)
    assert world.opened


def test_it_connects_once() -> None:
    world = connected()
    with pytest.raises(UsageError, match="once"):
        world.client.connect(world.now)


def test_another_aioquic_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_READ", ("_loss", "_gone"))
    with pytest.raises(UnsupportedError, match="_gone") as caught:
        World().client.connect(0.0)
    assert caught.value.hint


def test_what_people_see() -> None:
    world = World()
    with pytest.raises(SluiceError, match="begun"):
        _ = world.client.flow
    assert world.client.session is None
    assert json.loads(msgspec.json.encode(world.client.snapshot()))["heard_at"] is None
    world.connect()
    world.server.say(b"x")
    world.run(0.1)
    assert repr(world.client) == "<QuicConnection open, 1 messages received>"
    told = json.loads(msgspec.json.encode(world.client.snapshot()))
    assert (told["phase"], told["peer_key"]) == ("open", SERVER.public_key.hex())
    assert told["datagrams_sent"] == len(world.sent)
    assert world.of(Message) == [Message(b"x")]
    transport: Transport = world.client  # it has what all transports have
    assert transport.phase is Phase.OPEN

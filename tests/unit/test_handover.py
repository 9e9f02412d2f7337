# SPDX-License-Identifier: Apache-2.0
"""What owner and application say to each other, when one of them is hostile or broken."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userspace.datagram import messages
from userspace.datagram.handover import OwnerConnection
from userspace.datagram.messages import ProtocolError
from userspace.datagram.policy_document import decode_policy, encode_policy, with_ids
from xdp.errors import (
    BusyError,
    NotLoadedError,
    OwnerGoneError,
    PermissionsError,
    UnsupportedError,
    UsageError,
)
from xdp.policy import Policy

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "docs" / "examples").glob("*.toml"))

POLICY = """
version = 1
[[lane]]
name = "votes"
rate = 1000
[[lane]]
name = "bulk"
end = "kernel"
[[class]]
name = "staked"
prefixes = ["10.0.0.0/8", "2001:db8::/32"]
peers = ["192.0.2.7", { address = "2001:db9::8", name = "bob" }]
[[service]]
name = "turbine"
ports = [8001]
  [[service.kind]]
  name = "data"
  match = [{ offset = 64, mask = "f0", value = "90" }]
  [[service.rule]]
  class = "staked"
  action = "lane"
  lane = "votes"
[owner]
users = ["nobody", 1000]
"""

HELLO = {"type": "hello", "version": messages.VERSION, "pid": 1, "interface": "eth1", "mode": "native-copy"}


def descriptors() -> int:
    """How many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def ends(work: Callable[[], None], kind: type[Exception]) -> bool:
    """Whether doing it again and again ends in that exception."""
    for _ in range(100_000):
        try:
            work()
        except kind:
            return True
    return False


def assert_no_more_than(limit: int) -> None:
    """Once the thread at the other end has closed its own."""
    deadline = time.monotonic() + 10
    while descriptors() > limit:
        assert time.monotonic() < deadline, f"{descriptors()} descriptors, not {limit}"
        time.sleep(0.001)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        one.setblocking(False)
        other.setblocking(False)
        yield one, other


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Callable[[socket.socket], None]], Path]]:
    """Run a function as the owner at the other end of one connection; its errors fail the test."""
    threads: list[threading.Thread] = []
    errors: list[BaseException] = []
    listeners: list[socket.socket] = []

    def start(behave: Callable[[socket.socket], None]) -> Path:
        path = tmp_path / f"{len(listeners)}.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(10)
        listeners.append(listener)

        def run() -> None:
            try:
                sock, _ = listener.accept()
                with sock:
                    sock.settimeout(10)
                    behave(sock)
            except BaseException as error:  # noqa: BLE001 - told by the fixture
                errors.append(error)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return path

    yield start
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    for listener in listeners:
        listener.close()
    assert errors == []


def say(sock: socket.socket, content: Any, fds: list[int] | None = None) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    messages.send(sock, raw, fds or [])


class TestPolicyDocuments:
    @pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
    def test_examples_come_back_equal(self, path: Path) -> None:
        policy = Policy.load(path)
        assert decode_policy(encode_policy(policy)) == policy

    def test_all_sorts_of_fields_come_back_equal(self) -> None:
        policy = Policy.parse(POLICY)
        assert decode_policy(encode_policy(policy)) == policy

    def test_the_kernels_numbers_of_peers(self) -> None:
        policy = Policy.parse(POLICY)
        numbered = with_ids(policy, {peer.address: peer.id + 40 for peer in policy.peers})
        assert [peer.id for peer in decode_policy(encode_policy(numbered)).peers] == [41, 42]

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"[]", b"null", b"{}", b'{"lane": 5}', b'{"more": 1}', b"[" * 100_000,
         b'{"lane": [], "class": [{"name": "a", "prefixes": ["x"]}], "service": []}'],
    )  # fmt: skip
    def test_what_is_none(self, content: bytes) -> None:
        with pytest.raises(UsageError, match="not understood"):
            decode_policy(content)

    @settings(max_examples=100)
    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                            st.sampled_from(["lane", "class", "service", "name", "x"]), inner, max_size=3),
                        max_leaves=8))  # fmt: skip
    def test_any_json(self, value: object) -> None:
        with pytest.raises(UsageError):
            decode_policy(msgspec.json.encode(value))


class TestMessages:
    @pytest.mark.parametrize("raw", [b"", b"{", b"{}", b'{"type":"?"}', b'{"type":"attach","x":1}',
                                     b'{"type":"attach","queues":5}', b'{"type":"attach","companions":"x"}',
                                     b"\xff\xfe", b"[" * 4000])  # fmt: skip
    def test_requests_that_are_none(self, raw: bytes) -> None:
        with pytest.raises(ProtocolError):
            messages.decode_request(raw)

    @settings(max_examples=300)
    @given(st.binary(max_size=200))
    def test_any_bytes(self, raw: bytes) -> None:
        for decode in (messages.decode_request, messages.decode_reply):
            with pytest.raises(ProtocolError):
                decode(raw)

    def test_a_request_comes_back(self) -> None:
        request = messages.Attach(queues=(0, 3), companions="free")
        assert messages.decode_request(messages.encode(request)) == request

    def test_too_long(self, pair: tuple[socket.socket, socket.socket]) -> None:
        pair[0].send(b"x" * (messages.MAX_REQUEST + 1))
        with pytest.raises(ProtocolError):
            messages.receive(pair[1], messages.MAX_REQUEST, 0)

    def test_descriptors_that_nobody_asked_for_are_not_taken(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        before = descriptors()
        messages.send(pair[0], b"{}", [0] * 200)
        with pytest.raises(ProtocolError):
            messages.receive(pair[1], messages.MAX_REQUEST, 0)
        assert descriptors() == before

    def test_more_descriptors_than_allowed(self, pair: tuple[socket.socket, socket.socket]) -> None:
        before = descriptors()
        messages.send(pair[0], b"{}", [0] * 200)
        with pytest.raises(ProtocolError):
            messages.receive(pair[1], 100, messages.MAX_DESCRIPTORS)
        assert descriptors() == before

    def test_descriptors_arrive_closed_on_exec(self, pair: tuple[socket.socket, socket.socket]) -> None:
        messages.send(pair[0], b"{}", [0, 1])
        received = messages.receive(pair[1], 100, 8)
        assert received is not None
        raw, taken = received
        assert raw == b"{}"
        assert [os.get_inheritable(fd) for fd in taken] == [False, False]
        for fd in taken:
            os.close(fd)

    def test_the_end(self, pair: tuple[socket.socket, socket.socket]) -> None:
        pair[0].close()
        assert messages.receive(pair[1], 100, 8) is None

    def test_nothing_there(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with pytest.raises(BlockingIOError):
            messages.receive(pair[1], 100, 8)

    def test_more_on_the_way_than_allowed_is_no_room(self, pair: tuple[socket.socket, socket.socket]) -> None:
        """The receiver does not read: the sender is told to wait, however it is that the kernel says so."""
        assert ends(lambda: messages.send(pair[0], b"{}", [0] * 8), BlockingIOError)

    def test_documents(self) -> None:
        content = os.urandom(3 << 20)
        fd = messages.make_document(content)
        with pytest.raises(OSError, match="not permitted"):
            os.write(fd, b"x")
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(fd, 0)
        before = descriptors()
        assert messages.read_document(os.dup(fd)) == content
        assert messages.read_document(fd) == content
        assert descriptors() == before - 1

    def test_a_document_that_could_change_is_refused(self, tmp_path: Path) -> None:
        for fd in (
            os.memfd_create("x", os.MFD_ALLOW_SEALING),
            os.open(tmp_path / "f", os.O_CREAT | os.O_RDWR),
        ):
            before = descriptors()
            with pytest.raises(ProtocolError):
                messages.read_document(fd)
            assert descriptors() == before - 1


class TestConnectingToAnOwner:
    def test_nobody(self, tmp_path: Path) -> None:
        with pytest.raises(NotLoadedError, match="no owner serves"):
            OwnerConnection(tmp_path / "none")
        with pytest.raises(NotLoadedError, match="no owner serves"):
            OwnerConnection(tmp_path / ("x" * 200))

    def test_a_socket_that_nobody_listens_at(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.bind(str(tmp_path / "s"))
        with pytest.raises(NotLoadedError, match="refused"):
            OwnerConnection(tmp_path / "s")

    @pytest.mark.parametrize(
        "first",
        [b"", b"\0" * 100, b"{}", {"type": "part"}, {**HELLO, "version": 99}, {**HELLO, "more": 1},
         b"[" * 10_000, b"x" * (messages.MAX_MESSAGE + 10)],
        ids=range(8),
    )  # fmt: skip
    def test_something_else_serves(self, serve: Any, first: object) -> None:
        path = serve(lambda sock: say(sock, first))
        before = descriptors()
        with pytest.raises((ProtocolError, OwnerGoneError)):
            OwnerConnection(path)
        assert_no_more_than(before)

    def test_one_that_says_nothing(self, serve: Any) -> None:
        done = threading.Event()
        path = serve(lambda _sock: done.wait(10) and None)
        with pytest.raises(OwnerGoneError, match="no answer"):
            OwnerConnection(path, timeout=0.2)
        done.set()

    def test_refused(self, serve: Any) -> None:
        refusal = {"type": "refused", "error": "PermissionsError", "message": "user 7 may not", "hint": "ask"}
        path = serve(lambda sock: say(sock, refusal))
        with pytest.raises(PermissionsError, match="user 7 may not") as caught:
            OwnerConnection(path)
        assert caught.value.hint == "ask"

    @pytest.mark.parametrize("name", ["SluiceError", "os", "annotations", "__doc__", "KeyboardInterrupt", ""])
    def test_only_our_errors_are_raised(self, serve: Any, name: str) -> None:
        path = serve(lambda sock: say(sock, {"type": "refused", "error": name, "message": "m"}))
        with pytest.raises(Exception, match=r"^m$") as caught:
            OwnerConnection(path)
        assert type(caught.value).__name__ == "SluiceError"


class TestAttaching:
    def talk(self, serve: Any, behave: Callable[[socket.socket], None]) -> OwnerConnection:
        def owner(sock: socket.socket) -> None:
            say(sock, HELLO)
            messages.decode_request(sock.recv(messages.MAX_REQUEST))
            behave(sock)

        return OwnerConnection(serve(owner))

    def test_busy(self, serve: Any) -> None:
        refusal = {"type": "refused", "error": "BusyError", "message": "in use by process 5", "hint": ""}
        with (
            self.talk(serve, lambda sock: say(sock, refusal)) as owner,
            pytest.raises(BusyError, match="process 5"),
        ):
            owner.attach()

    @pytest.mark.parametrize("count", [0, -1, messages.MAX_LENT + 1])
    def test_impossible_counts(self, serve: Any, count: int) -> None:
        def behave(sock: socket.socket) -> None:
            document = messages.make_document(b"{}")
            say(sock, {"type": "lanes", "count": count}, [document])
            os.close(document)

        before = descriptors()
        with self.talk(serve, behave) as owner, pytest.raises(ProtocolError):
            owner.attach()
        assert_no_more_than(before + 1)  # the listener

    @pytest.mark.parametrize("description", [b"", b"{}", b"[]", b'{"version": 1}', b"[" * 100_000])
    def test_descriptions_that_are_none(self, serve: Any, description: bytes) -> None:
        def behave(sock: socket.socket) -> None:
            document = messages.make_document(description)
            say(sock, {"type": "lanes", "count": 2}, [document])
            os.close(document)
            with contextlib.suppress(BrokenPipeError):  # the application may have had enough
                say(sock, {"type": "part"}, [0, 1])

        before = descriptors()
        with self.talk(serve, behave) as owner, pytest.raises((ProtocolError, UsageError, OwnerGoneError)):
            owner.attach()
        assert_no_more_than(before + 1)

    def test_the_owner_ends_half_way(self, serve: Any) -> None:
        def behave(sock: socket.socket) -> None:
            document = messages.make_document(b"{}")
            say(sock, {"type": "lanes", "count": 5}, [document])
            os.close(document)
            say(sock, {"type": "part"}, [0, 1])

        before = descriptors()
        with self.talk(serve, behave) as owner, pytest.raises(OwnerGoneError, match="eth1 is gone"):
            owner.attach()
        assert_no_more_than(before + 1)

    def test_descriptors_where_none_belong(self, serve: Any) -> None:
        event = {"type": "interface", "state": "gone", "interface": "eth1", "ifindex": 2}
        before = descriptors()
        with self.talk(serve, lambda sock: say(sock, event, [0])) as owner, pytest.raises(ProtocolError):
            owner.attach()
        assert_no_more_than(before + 1)

    def test_queues_that_are_none(self, serve: Any) -> None:
        with OwnerConnection(serve(lambda sock: say(sock, HELLO))) as owner:
            for queues in ([], [-1], [64], [0] * 65):
                with pytest.raises(UsageError, match="queues"):
                    owner.attach(queues=queues)

    def test_events_and_the_end(self, serve: Any) -> None:
        go = threading.Event()

        def behave(sock: socket.socket) -> None:
            say(sock, HELLO)
            say(sock, {"type": "interface", "state": "gone", "interface": "eth1", "ifindex": 2})
            go.wait(10)
            document = messages.make_document(encode_policy(Policy.parse(POLICY)))
            say(sock, {"type": "policy", "generation": 4}, [document])
            os.close(document)
            say(sock, {"type": "interface", "state": "back", "interface": "eth1", "ifindex": 3})
            say(sock, {"type": "ending"})

        with OwnerConnection(serve(behave)) as owner:
            assert owner.wait(10) == [messages.InterfaceChanged(state="gone", interface="eth1", ifindex=2)]
            assert not owner.present
            go.set()
            assert owner.wait_for_interface(10)
            assert owner.ifindex == 3
            told: list[object] = []
            assert ends(lambda: told.extend(owner.wait(10)), OwnerGoneError)
            assert owner.policy == Policy.parse(POLICY)
            assert owner.generation == 4


def test_descriptors_beyond_this_process_limit(pair: tuple[socket.socket, socket.socket]) -> None:
    """What can't be taken over is said so, and what was taken is closed."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    messages.send(pair[0], b"{}", [0] * 100)
    before = descriptors()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        with pytest.raises(UnsupportedError, match="open as many files"):
            messages.receive(pair[1], 100, messages.MAX_DESCRIPTORS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert descriptors() == before

# SPDX-License-Identifier: Apache-2.0
"""The application's side: lanes from the owner of an interface (``sluice up``), without privileges.

    with OwnerConnection("/run/sluice/4026531840-eth1.sock") as owner:
        lanes = attach_lanes(owner.attach(), owner.policy)
        ...
        for event in owner.poll(): ...

The descriptors stay the application's until it closes them or ends. What happens at the owner
meanwhile (another policy, an interface that goes and comes back, its end) comes over the
connection. :func:`userspace.datagram.owned_lanes.open_owned` does all of that for lanes.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

import xdp.errors
from userspace.datagram import messages
from userspace.datagram.descriptors import LaneDescriptors
from userspace.datagram.lease import Companions
from userspace.datagram.policy_document import decode_policy
from xdp.errors import (
    InterfaceGoneError,
    NotLoadedError,
    OwnerGoneError,
    PermissionsError,
    SluiceError,
    UsageError,
)
from xdp.policy import Policy

Event = messages.InterfaceChanged | messages.PolicyChanged

#: Seconds that an owner may take to open everything: it zeroes hundreds of megabytes, retries
#: busy queues for 2 s each, and may be compiling a program just then.
ATTACH_SECONDS = 60.0


class OwnerConnection:
    """A connection to an owner; one application, one thread.

    ``interface``, ``ifindex`` and ``present`` follow what the owner tells; ``policy`` (with the peers'
    numbers that the kernel has) and ``generation`` are those in force, None and 0 before ``attach``.
    """

    def __init__(self, path: str | Path, *, timeout: float = 10.0) -> None:
        """Connect.

        Raises NotLoadedError (nobody serves there), PermissionsError (not allowed, or the one who
        serves is neither root nor this user), BusyError, OwnerGoneError.
        """
        self.path = Path(path)
        self.present = True
        self.policy: Policy | None = None
        self.generation = 0
        self.ifindex = 0
        self._events: deque[Event] = deque()
        self._gone: OwnerGoneError | None = None
        self._sock = _connect(self.path)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._sock.close)
            hello = _checked_hello(self._await(time.monotonic() + timeout, []), self.path)
            cleanup.pop_all()
        self.owner_pid = hello.pid
        self.interface = hello.interface

    def attach(
        self,
        *,
        queues: Sequence[int] | None = None,
        companions: Companions = "all",
        timeout: float = ATTACH_SECONDS,
    ) -> LaneDescriptors:
        """Ask for the lanes of all queues (or these); lanes had before are given back.

        Raises BusyError (naming the process that has them), InterfaceGoneError, UsageError,
        UnsupportedError (this process may not open so many files), OwnerGoneError.
        """
        messages.check_queues(queues)
        deadline = time.monotonic() + timeout
        request = messages.Attach(queues=None if queues is None else tuple(queues), companions=companions)
        self._send(request)
        taken: list[int] = []
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(_close_all, taken)
            description, count = self._description(deadline, taken)
            while len(taken) < count:
                self._check_answer(self._await(deadline, taken))
            cleanup.pop_all()
        descriptors = LaneDescriptors.from_message(description, taken)
        self.ifindex = descriptors.ifindex
        return descriptors

    def _description(self, deadline: float, taken: list[int]) -> tuple[object, int]:
        """What the lanes are, and how many descriptors follow."""
        while True:
            reply = self._await(deadline, taken)
            self._check_answer(reply)
            if isinstance(reply, messages.LanesFollow):
                break
        if not 1 <= reply.count <= messages.MAX_LENT or len(taken) != 1:
            raise messages.ProtocolError("the owner announced lanes in a way that is none")
        try:
            return msgspec.json.decode(messages.read_document(taken.pop())), reply.count
        except (msgspec.MsgspecError, RecursionError) as error:
            raise messages.ProtocolError(f"the owner's description is not understood: {error}") from error

    def _check_answer(self, reply: messages.Reply) -> None:
        if isinstance(reply, messages.Refused):
            raise _error(reply)
        if isinstance(reply, messages.InterfaceChanged) and reply.state == "gone":
            raise InterfaceGoneError(
                f"{self.interface} is gone", hint="wait until the owner has it again, then attach again"
            )

    def detach(self) -> None:
        """Give the lanes back, but stay connected; the sockets have to be closed as well."""
        self._send(messages.Detach())

    def fileno(self) -> int:
        """Readable when :meth:`poll` has something to say."""
        return self._sock.fileno()

    def poll(self) -> list[Event]:
        """What the owner has told since the last call; never waits. Raises OwnerGoneError at its end."""
        with contextlib.suppress(BlockingIOError):
            while self._gone is None:
                self._next(None, None)
        if self._gone is not None and not self._events:
            raise self._gone
        events = list(self._events)
        self._events.clear()
        return events

    def wait(self, timeout: float | None = None) -> list[Event]:
        """Like :meth:`poll`, after waiting for something to be told; [] after ``timeout`` seconds."""
        if not self._events and self._gone is None:
            waiter = select.poll()
            waiter.register(self._sock, select.POLLIN)
            waiter.poll(None if timeout is None else max(0.0, timeout) * 1000)
        return self.poll()

    def wait_for_interface(self, timeout: float) -> bool:
        """Wait until the owner has the interface again and lanes can be asked for."""
        deadline = time.monotonic() + timeout
        self.poll()
        while not self.present:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.wait(left)
        return True

    def close(self) -> None:
        """Close the connection: the owner takes the lanes back. Idempotent."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, request: messages.Request) -> None:
        try:
            messages.send(self._sock, messages.encode(request))
        except OSError as error:
            raise self._owner_gone() from error

    def _await(self, deadline: float, taken: list[int]) -> messages.Reply:
        """The next message, waited for; ``taken`` gets the descriptors of lanes."""
        try:
            reply = self._next(max(deadline - time.monotonic(), 0.001), taken)
        except TimeoutError as error:
            raise OwnerGoneError(
                f"{self.path}: no answer from the owner",
                hint="does it hang? `sluice status` names its process",
            ) from error
        if reply is None:
            raise self._owner_gone()
        return reply

    def _next(self, timeout: float | None, taken: list[int] | None) -> messages.Reply | None:
        """One message, and what it means for this object; None when the owner has gone.

        Without ``timeout`` BlockingIOError when there is none.
        """
        self._sock.settimeout(timeout or 0.0)
        try:
            received = messages.receive(self._sock, messages.MAX_MESSAGE, messages.MAX_DESCRIPTORS)
        except ConnectionError:
            received = None
        if received is None:
            self._owner_gone()
            return None
        raw, descriptors = received
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(_close_all, descriptors)
            reply = messages.decode_reply(raw)
            if isinstance(reply, messages.LanesFollow | messages.Part) and taken is not None:
                taken += descriptors
                descriptors.clear()
            else:
                self._learn(reply, descriptors)
        return reply

    def _learn(self, reply: messages.Reply, descriptors: list[int]) -> None:
        expected = int(isinstance(reply, messages.PolicyChanged))
        if len(descriptors) != expected:
            raise messages.ProtocolError(
                f"{len(descriptors)} descriptors came with a message that has {expected}"
            )
        if isinstance(reply, messages.PolicyChanged):
            self.policy = decode_policy(messages.read_document(descriptors.pop()))
            self.generation = reply.generation
            self._events.append(reply)
        elif isinstance(reply, messages.InterfaceChanged):
            self.present = reply.state != "gone"
            self.interface, self.ifindex = reply.interface, reply.ifindex
            self._events.append(reply)

    def _owner_gone(self) -> OwnerGoneError:
        if self._gone is None:
            self._gone = OwnerGoneError(
                f"the owner of {getattr(self, 'interface', self.path)} is gone",
                hint="start it again (`sluice up`), then open the lanes again",
            )
        return self._gone


def _checked_hello(hello: messages.Reply, path: Path) -> messages.Hello:
    if isinstance(hello, messages.Refused):
        raise _error(hello)
    if not isinstance(hello, messages.Hello) or hello.version != messages.VERSION:
        raise messages.ProtocolError(
            f"{path}: another version of Sluice serves there",
            hint="owner and application must be the same version of Sluice",
        )
    return hello


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(sock.close)
        try:
            sock.connect(os.fspath(path))
        except PermissionError as error:
            raise PermissionsError(
                f"{path}: not permitted", hint="name this user or a group of it under [owner] in the policy"
            ) from error
        except OSError as error:
            raise NotLoadedError(
                f"no owner serves at {path}: {error.strerror or error}",
                hint="start one: sluice up INTERFACE POLICY; `sluice status` shows its socket",
            ) from error
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in {0, os.geteuid()}:
            raise PermissionsError(
                f"{path} is served by user {uid}, who is neither root nor this user",
                hint="give the socket of a `sluice up` that root runs",
            )
        cleanup.pop_all()
    return sock


def _error(refused: messages.Refused) -> SluiceError:
    """The error that the owner speaks of, as one of ours."""
    kind = getattr(xdp.errors, refused.error, None)
    if not (isinstance(kind, type) and issubclass(kind, SluiceError)):
        kind = SluiceError
    return kind(refused.message, hint=refused.hint)


def default_path(interface: str) -> Path:
    """Where ``sluice up INTERFACE`` serves, in this network namespace. Raises UsageError."""
    from xdp.state import socket_path

    if not interface or "/" in interface:
        raise UsageError(f"{interface!r} is no name for an interface")
    return socket_path(interface)

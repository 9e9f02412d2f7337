# SPDX-License-Identifier: Apache-2.0
"""Serves an owner's lanes to other processes: what ``sluice up`` runs.

One thread, one selector. Nothing that a client does or leaves undone keeps the others waiting:
sockets don't block, every connection has deadlines and bounded queues, and a client that says
something wrong is told so and dropped. Who may connect is decided by the file's mode and by the
kernel's word on who is at the other end (SO_PEERCRED, SO_PEERGROUPS; unix(7)).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import grp
import os
import pwd
import selectors
import socket
import stat
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from userspace.datagram import messages
from userspace.datagram.broker_client import Client
from userspace.datagram.owner import Owner
from userspace.datagram.policy_document import encode_policy
from xdp.errors import BusyError, PermissionsError, SluiceError, UsageError
from xdp.watch import Change

#: Connections at once, of all users and of one user other than root.
MAX_CLIENTS, MAX_CLIENTS_OF_USER = 64, 16
#: Seconds between looks at deadlines and at the link.
TICK = 1.0
#: A path has to fit into sun_path (unix(7)).
_MAX_PATH = 107
_SO_PEERGROUPS = 59  # asm-generic/socket.h


class Broker:
    """Listens at ``path`` and serves until :meth:`stop`; belongs to the thread of its owner."""

    def __init__(self, owner: Owner, path: Path) -> None:
        """Start to listen.

        Raises BusyError when somebody serves there, UsageError for a path that can't be used,
        PermissionsError.
        """
        self.owner = owner
        self.path = path
        self._clients: dict[int, Client] = {}
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._listener = _listen(path)
        try:
            self.apply_access()
            self._listener.listen(MAX_CLIENTS)
            self._inode = path.stat().st_ino
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._selector.register(owner.watch, selectors.EVENT_READ, self._poll_owner)
            owner.serve_at(path)
        except BaseException:
            self._listener.close()
            path.unlink(missing_ok=True)
            raise

    def apply_access(self) -> None:
        """Set the file's mode and group by the policy: root alone, one group, or whoever then proves himself.

        A file has one group; where the policy names users or several groups it is open to all,
        and credentials decide alone. Names without an account are told through ``notify``.
        """
        self._users, self._groups = set[int](), set[int]()
        for kind, names, numbers in (
            ("user", self.owner.policy.owner.users, self._users),
            ("group", self.owner.policy.owner.groups, self._groups),
        ):
            for name in names:
                try:
                    numbers.add(_number(kind, name))
                except KeyError:
                    self.owner.notify(f"the policy's [owner] names {kind} {name!r}, which does not exist")
        one_group = len(self._groups) == 1 and not self._users
        mode = 0o660 if one_group else 0o666 if self._users or self._groups else 0o600
        os.chown(self.path, -1, next(iter(self._groups)) if one_group else os.getegid())
        self.path.chmod(mode)

    def watch(self, descriptor: int, ready: Callable[[], None]) -> None:
        """Call ``ready`` whenever ``descriptor`` is readable (signals, say)."""
        self._selector.register(descriptor, selectors.EVENT_READ, ready)

    def serve(self, seconds: float | None = None) -> None:
        """Serve until :meth:`stop`, or for some seconds."""
        end = None if seconds is None else time.monotonic() + seconds
        next_tick = time.monotonic() + TICK
        while not self._stopping:
            now = time.monotonic()
            if end is not None and now >= end:
                return
            wait = min(next_tick, end if end is not None else next_tick) - now
            for key, events in self._selector.select(max(0.0, wait)):
                # What came first may have closed what came with it.
                if key.fd in self._selector.get_map():
                    if isinstance(key.data, Client):
                        self._serve_client(key.data, events)
                    else:
                        key.data()
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + TICK
                self._tick()

    def stop(self) -> None:
        """Let :meth:`serve` return."""
        self._stopping = True

    def policy_changed(self) -> None:
        """Tell all who have lanes; after ``owner.reload``."""
        self.apply_access()
        for client in list(self._clients.values()):
            if client.lease is not None:
                self._attempt(client, partial(self._send_policy, client))

    def close(self) -> None:
        """Tell everybody, take all lanes back, remove the socket; idempotent."""
        for client in list(self._clients.values()):
            with contextlib.suppress(OSError):
                client.queue(messages.Ending())
                client.flush()
            self._drop(client)
        self._selector.close()
        self._listener.close()
        # Not one that somebody else has put there since.
        with contextlib.suppress(FileNotFoundError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()

    # Clients

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            # Out of descriptors: whoever waits is served when others have gone. Aborted: gone already.
            if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}:
                self.owner.notify(f"a connection was not taken: {error.strerror}")
                self._pause_listening()
                return
            if error.errno in {errno.EAGAIN, errno.ECONNABORTED, errno.EINTR}:
                return
            raise
        sock.setblocking(False)
        pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        client = Client(sock, pid, uid)
        refusal = self._refusal(sock, uid, gid)
        if refusal is not None:
            with contextlib.suppress(OSError):
                client.queue(messages.Refused(error=refusal[0], message=refusal[1], hint=refusal[2]))
                client.flush()
            client.close()
            return
        self._clients[sock.fileno()] = client
        self._selector.register(sock, selectors.EVENT_READ, client)
        hello = messages.Hello(pid=os.getpid(), interface=self.owner.interface, mode=self.owner.mode)
        self._attempt(client, lambda: client.queue(hello))

    def _refusal(self, sock: socket.socket, uid: int, gid: int) -> tuple[str, str, str] | None:
        if uid not in {0, os.geteuid(), *self._users} and not self._groups & {gid, *_groups_of(sock)}:
            return (
                "PermissionsError",
                f"user {uid} may not have the lanes of {self.owner.interface}",
                "name the user or a group under [owner] in the policy",
            )
        of_user = sum(client.uid == uid for client in self._clients.values())
        if len(self._clients) >= MAX_CLIENTS or (uid != 0 and of_user >= MAX_CLIENTS_OF_USER):
            return ("BusyError", f"the owner has {len(self._clients)} connections already", "close some")
        return None

    def _pause_listening(self) -> None:
        """Until the next tick: the selector would report the waiting connection again at once."""
        self._selector.unregister(self._listener)

    def _serve_client(self, client: Client, events: int) -> None:
        if events & selectors.EVENT_READ:
            self._attempt(client, lambda: self._read(client))
        if events & selectors.EVENT_WRITE and client.open:
            self._attempt(client, lambda: None)

    def _attempt(self, client: Client, work: Callable[[], None]) -> None:
        """Do something for one client; whatever goes wrong ends that client alone."""
        try:
            work()
            client.flush()
        except BlockingIOError:
            pass
        except messages.ProtocolError as error:
            self.owner.notify(f"process {client.pid} (user {client.uid}) was dropped: {error}")
            with contextlib.suppress(OSError):
                client.queue(messages.Refused(error="UsageError", message=str(error)))
                client.flush()
            self._drop(client)
            return
        except OSError:  # reset, broken pipe: it is gone
            self._drop(client)
            return
        except SluiceError as error:  # its sockets can't be steered to: deleted interface, say
            self.owner.notify(f"process {client.pid} was dropped: {error}")
            self._drop(client)
            return
        if not client.open:
            self._drop(client)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.waiting else 0)
        self._selector.modify(client.sock, wanted, client)

    def _read(self, client: Client) -> None:
        received = messages.receive(client.sock, messages.MAX_REQUEST, 0)
        if received is None:
            raise ConnectionResetError
        request = messages.decode_request(received[0])
        client.asked()
        if isinstance(request, messages.Detach):
            self._take_back(client)
            return
        try:
            self._attach(client, request)
        except SluiceError as error:
            client.queue(messages.Refused(error=type(error).__name__, message=str(error), hint=error.hint))

    def _attach(self, client: Client, request: messages.Attach) -> None:
        if request.version != messages.VERSION:
            raise UsageError(
                f"the application speaks version {request.version}, the owner {messages.VERSION}",
                hint="owner and application must be the same version of Sluice",
            )
        messages.check_queues(request.queues)
        self._take_back(client)
        lease = self.owner.lend(queues=request.queues, companions=request.companions, pid=client.pid)
        client.lease = lease
        description, descriptors = lease.descriptors.to_message()
        if len(descriptors) > messages.MAX_LENT:
            self._take_back(client)
            raise UsageError(
                f"{len(descriptors)} descriptors are more than {messages.MAX_LENT}",
                hint="use fewer ports with companion sockets, or [companion] enabled = false",
            )
        self._send_policy(client)
        client.send_lanes(description, descriptors, lease)

    def _send_policy(self, client: Client) -> None:
        document = messages.make_document(encode_policy(self.owner.policy))
        client.queue(messages.PolicyChanged(generation=self.owner.generation), [document])

    def _take_back(self, client: Client) -> None:
        if client.lease is not None:
            self.owner.take_back(client.lease)
            client.lease = None
            client.discard_lanes()

    def _drop(self, client: Client) -> None:
        self._take_back(client)
        if self._clients.pop(client.number, None) is not None:
            self._selector.unregister(client.sock)
        client.close()

    # The interface, and time

    def _poll_owner(self) -> None:
        for change in self.owner.poll():
            self._tell(change)

    def _tell(self, change: Change) -> None:
        self.owner.notify(f"{change.interface} is {change.state}")
        message = messages.InterfaceChanged(
            state=change.state, interface=change.interface, ifindex=change.ifindex
        )
        for client in list(self._clients.values()):
            if change.state == "gone":
                client.lease = None  # the owner has taken it back
                client.discard_lanes()
            self._attempt(client, partial(client.queue, message))

    def _tick(self) -> None:
        if self._listener.fileno() not in self._selector.get_map():
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        now = time.monotonic()
        for client in list(self._clients.values()):
            why = client.overdue(now)
            if why:
                self.owner.notify(f"process {client.pid} (user {client.uid}) was dropped: {why}")
                self._drop(client)
        self._poll_owner()


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > _MAX_PATH:
        raise UsageError(f"{path} is longer than {_MAX_PATH} bytes", hint="choose a shorter --socket PATH")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        _remove_stale(path)
        # Nobody may connect before the mode is what it should be: not listening, they are refused.
        sock.bind(os.fspath(path))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(f"{path} exists", hint="another owner? choose another --socket PATH") from error
        kind = PermissionsError if error.errno in {errno.EACCES, errno.EPERM} else UsageError
        raise kind(f"{path}: {error.strerror}", hint="choose another --socket PATH") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens at any more. Raises BusyError when it is anything else."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise BusyError(f"{path} exists and is no socket", hint="choose another --socket PATH")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except BlockingIOError as error:
            raise BusyError(f"somebody serves at {path}", hint="choose another --socket PATH") from error
        else:
            raise BusyError(f"somebody serves at {path}", hint="choose another --socket PATH")


def _number(kind: str, name: str | int) -> int:
    if isinstance(name, int):
        return name
    return pwd.getpwnam(name).pw_uid if kind == "user" else grp.getgrnam(name).gr_gid


def _groups_of(sock: socket.socket) -> list[int]:
    """The supplementary groups that the peer had when it connected; Linux 4.13."""
    # Python's getsockopt stops at 1,024 bytes, 256 groups; NGROUPS_MAX is 65,536 (linux/limits.h).
    room = (ctypes.c_uint32 * 65536)()
    length = ctypes.c_uint32(ctypes.sizeof(room))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, room, ctypes.byref(length)) != 0:
        return []
    return list(room[: length.value // 4])

# SPDX-License-Identifier: Apache-2.0
"""What owner and application say to each other, and how descriptors travel with it.

A Unix SOCK_SEQPACKET socket: one JSON object a packet, descriptors beside it (SCM_RIGHTS,
unix(7)). Both sides read the other's messages as an enemy's: sizes and numbers are bounded, and
what is not understood ends the connection.

    application                         owner
                                        hello {version, pid, interface, mode}
    attach {version, queues, ...}
                                        policy {generation} + a memfd with the policy
                                        lanes {count} + a memfd that describes the descriptors
                                        part + the descriptors of one queue, and so on
                                   or   refused {error, message, hint}
                                        interface {state, ...}, policy ... as it happens
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
from collections.abc import Sequence
from typing import Literal

import msgspec

from userspace.datagram.lease import Companions
from userspace.datagram.policy_document import MAX_DOCUMENT
from xdp.errors import SluiceError, UnsupportedError, UsageError
from xdp.watch import State

VERSION = 1

#: Bytes of a message. What may be longer (a policy, hundreds of descriptors) goes into a memfd.
MAX_REQUEST = 4096
MAX_MESSAGE = 16384
#: Descriptors beside a message; the kernel allows 253 (SCM_MAX_FD, net/scm.h).
MAX_DESCRIPTORS = 128
#: Descriptors of one application: 64 queues of 8 lanes, and 4,096 companion sockets.
MAX_LENT = 64 * 9 + 1 + 4096

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class ProtocolError(SluiceError):
    """The other side said what it may not say."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", kw_only=True):
    pass


class Attach(_Message, frozen=True, tag="attach", kw_only=True):
    """Asks for lanes: of all queues, or of these."""

    version: int = VERSION
    queues: tuple[int, ...] | None = None
    companions: Companions = "all"


class Detach(_Message, frozen=True, tag="detach", kw_only=True):
    """Gives the lanes back, but stays connected."""


class Hello(_Message, frozen=True, tag="hello", kw_only=True):
    """The first message: who serves what."""

    version: int = VERSION
    pid: int
    interface: str
    mode: str


class Refused(_Message, frozen=True, tag="refused", kw_only=True):
    """The answer to a request that is not granted; ``error`` is the name of a class in xdp.errors."""

    error: str
    message: str
    hint: str = ""


class LanesFollow(_Message, frozen=True, tag="lanes", kw_only=True):
    """``count`` descriptors follow in parts; the memfd holds ``LaneDescriptors.to_message``."""

    count: int


class Part(_Message, frozen=True, tag="part", kw_only=True):
    """Some of the descriptors, in order."""


class PolicyChanged(_Message, frozen=True, tag="policy", kw_only=True):
    """A policy is in force; the memfd holds it (:mod:`userspace.datagram.policy_document`)."""

    generation: int


class InterfaceChanged(_Message, frozen=True, tag="interface", kw_only=True):
    """What happened to the interface (:mod:`xdp.watch`); "gone" took the lanes back."""

    state: State
    interface: str
    ifindex: int


class Ending(_Message, frozen=True, tag="ending", kw_only=True):
    """The owner ends on purpose, and the connection with it."""

    reason: Literal["stopped"] = "stopped"


Request = Attach | Detach
Reply = Hello | Refused | LanesFollow | Part | PolicyChanged | InterfaceChanged | Ending

_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def decode_request(raw: bytes) -> Request:
    """Raises ProtocolError."""
    try:
        return _requests.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a request that is not understood: {error}") from error


def decode_reply(raw: bytes) -> Reply:
    """Raises ProtocolError."""
    try:
        return _replies.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(
            f"the owner said what is not understood: {error}",
            hint="owner and application must be the same version of Sluice",
        ) from error


def encode(message: _Message) -> bytes:
    """The packet's content."""
    return msgspec.json.encode(message)


def make_document(content: bytes) -> int:
    """A sealed memfd with ``content``: nobody can change or shorten it while it is read."""
    descriptor = os.memfd_create("sluice", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_document(descriptor: int) -> bytes:
    """The content of a memfd that came with a message; closes it. Raises ProtocolError."""
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ProtocolError("a descriptor is not the memfd that it should be") from error
        size = os.fstat(descriptor).st_size
        if seals & _SEALS != _SEALS or size > MAX_DOCUMENT:
            raise ProtocolError(f"a document of {size} bytes with seals {seals:#x} was sent")
        content = bytearray()
        while len(content) < size:
            # At an offset: the file position is shared with all who have the descriptor.
            piece = os.pread(file.fileno(), size - len(content), len(content))
            if not piece:
                break
            content += piece
    return bytes(content)


def send(sock: socket.socket, raw: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send one packet. Raises OSError: BlockingIOError when there is no room."""
    ancillary = []
    if descriptors:
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors)))
    try:
        sock.sendmsg([raw], ancillary, socket.MSG_NOSIGNAL)
    except OSError as error:
        # Too many descriptors are on their way (unix(7)); they are fewer once others have read.
        if error.errno == errno.ETOOMANYREFS:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        raise


def receive(sock: socket.socket, size: int, descriptors: int) -> tuple[bytes, list[int]] | None:
    """One packet of at most ``size`` bytes with at most ``descriptors`` beside it; None at the end.

    Raises BlockingIOError or TimeoutError when there is none, ProtocolError when it is larger,
    UnsupportedError when this process may not open that many files. No descriptor is left open then.
    """
    room = socket.CMSG_SPACE(descriptors * 4) if descriptors else 0
    raw, ancillary, flags, _ = sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    taken: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) // 4 * 4])
            taken += numbers
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for descriptor in taken:
            os.close(descriptor)
        if flags & socket.MSG_CTRUNC and descriptors and len(taken) < descriptors:
            raise UnsupportedError(
                "this process may not open as many files as the owner hands over",
                hint="raise its limit: ulimit -n 65536, or LimitNOFILE= in its systemd unit",
            )
        raise ProtocolError(f"a message of more than {size} bytes or {descriptors} descriptors")
    if not raw and not taken:
        return None
    return raw, taken


def check_queues(queues: Sequence[int] | None) -> None:
    """Raises UsageError for what can't be queue numbers."""
    if queues is not None and (not queues or len(queues) > 64 or min(queues) < 0 or max(queues) > 63):
        raise UsageError(f"queues {list(queues)[:8]}; allowed: 1 to 64 numbers from 0 to 63")

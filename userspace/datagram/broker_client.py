# SPDX-License-Identifier: Apache-2.0
"""One connection to a broker: what is still to be sent, and until when."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from userspace.datagram import messages
from userspace.datagram.lease import Lease

#: Seconds from connecting to the first request.
REQUEST_SECONDS = 10.0
#: Seconds in which a client has to take a message that waits for it.
TAKE_SECONDS = 10.0
#: Messages that may wait: all parts of the largest application, and events as long as it reads nothing.
MAX_WAITING = 256
#: Requests of one connection in a second; each may open hundreds of megabytes.
_REQUESTS, _REQUESTS_SECONDS = 20, 10.0


class _Waiting(NamedTuple):
    raw: bytes
    descriptors: tuple[int, ...]
    close: tuple[int, ...]  # ours alone, to be closed once sent
    sent: Callable[[], None] | None
    lanes: bool


class Client:
    """The broker's side of a connection."""

    def __init__(self, sock: socket.socket, pid: int, uid: int) -> None:
        self.sock = sock
        self.number = sock.fileno()
        self.pid = pid
        self.uid = uid
        self.lease: Lease | None = None
        self.open = True
        self._queue: deque[_Waiting] = deque()
        self._since = time.monotonic()
        self._silent = True
        self._requests: deque[float] = deque(maxlen=_REQUESTS)

    @property
    def waiting(self) -> bool:
        """Whether something could not be sent yet."""
        return bool(self._queue)

    def asked(self) -> None:
        """Count a request. Raises ProtocolError when there are too many of them."""
        now = time.monotonic()
        self._silent = False
        if len(self._requests) == _REQUESTS and now - self._requests[0] < _REQUESTS_SECONDS:
            raise messages.ProtocolError(f"more than {_REQUESTS} requests in {_REQUESTS_SECONDS:g} s")
        self._requests.append(now)

    def queue(
        self,
        message: Any,
        close: Sequence[int] = (),
        *,
        descriptors: Sequence[int] = (),
        sent: Callable[[], None] | None = None,
        lanes: bool = False,
    ) -> None:
        """Send later, in order; descriptors in ``close`` go with the message and are closed here then.

        Raises ProtocolError when the client has not read for too long.
        """
        if len(self._queue) >= MAX_WAITING:
            for descriptor in close:
                os.close(descriptor)
            raise messages.ProtocolError(f"{MAX_WAITING} messages wait to be read")
        if not self._queue:
            self._since = time.monotonic()
        raw = messages.encode(message)
        self._queue.append(_Waiting(raw, (*close, *descriptors), tuple(close), sent, lanes))

    def send_lanes(self, description: dict[str, Any], descriptors: Sequence[int], lease: Lease) -> None:
        """Queue what a lease holds; when the last of it is sent, the program begins to steer."""
        document = messages.make_document(msgspec.json.encode(description))
        self.queue(messages.LanesFollow(count=len(descriptors)), [document], lanes=True)
        parts = list(_parts(lease, len(descriptors)))

        def all_sent() -> None:
            # The program first: our copies of the sockets are needed to name them to it.
            lease.start()
            lease.handed_over()

        for first, last in parts:
            is_last = last == len(descriptors)
            self.queue(
                messages.Part(),
                descriptors=descriptors[first:last],
                sent=all_sent if is_last else None,
                lanes=True,
            )

    def discard_lanes(self) -> None:
        """Forget parts of a lease that was taken back: their descriptors are closed.

        A client that has got some of them already is dropped: it can't know what it has.
        """
        if any(waiting.lanes for waiting in self._queue):
            self.open = False

    def flush(self) -> None:
        """Send what can be sent. Raises OSError when the client is gone, BlockingIOError when it is slow."""
        while self._queue and self.open:
            head = self._queue[0]
            messages.send(self.sock, head.raw, head.descriptors)
            self._queue.popleft()
            self._since = time.monotonic()
            for descriptor in head.close:
                os.close(descriptor)
            if head.sent is not None:
                head.sent()

    def overdue(self, now: float) -> str:
        """Why this connection should end, or ""."""
        if self._queue and now - self._since > TAKE_SECONDS:
            return f"it has not read for {TAKE_SECONDS:g} s"
        if self._silent and now - self._since > REQUEST_SECONDS:
            return f"it has asked for nothing within {REQUEST_SECONDS:g} s"
        return ""

    def close(self) -> None:
        """Close the connection and what was not sent; idempotent."""
        self.open = False
        for waiting in self._queue:
            for descriptor in waiting.close:
                os.close(descriptor)
        self._queue.clear()
        self.sock.close()


def _parts(lease: Lease, count: int) -> list[tuple[int, int]]:
    """Ranges of descriptors: one for each queue, then the rest in bounded pieces."""
    per_queue = 1 + len(lease.descriptors.lanes)
    borders = [index * per_queue for index in range(len(lease.descriptors.queues) + 1)]
    while borders[-1] < count:
        borders.append(min(borders[-1] + messages.MAX_DESCRIPTORS, count))
    return list(itertools.pairwise(borders))

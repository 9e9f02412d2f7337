# SPDX-License-Identifier: Apache-2.0
"""Lanes in asyncio: batches in an ``async for``, sending that waits for room.

    async for batch in AsyncLanes(lanes):
        for lane, payload in zip(batch.lanes, batch):
            ...

A batch is given back when the next one is asked for and when the loop is left, by whatever way.  Its
columns and views raise ValueError from then on: copy with ``bytes()`` what must outlive it.

All of this belongs to the thread of the event loop.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from typing_extensions import Buffer

from userspace.datagram.aio_send import Attempt, Outcome, outlet_of, persist
from userspace.datagram.batch import Batch
from userspace.datagram.destination import Destination, Endpoint
from userspace.datagram.fanout import Fanout
from userspace.datagram.lanes import Lanes
from userspace.datagram.socket_statistics import SendFailure
from xdp.errors import UsageError

__all__ = ["AsyncLanes", "Batches"]

#: Seconds between two looks at lanes that are silent.  Descriptors do not tell that an interface is gone
#: from another network namespace, that a socket was closed elsewhere, or that the lanes were.
LOOK = 0.1

#: Seconds for which a task may go on taking batches before others get their turn.  A turn of the event
#: loop takes some 10 µs, so it costs a hundredth.
TURN = 0.001

# Who watches which lanes, by their id: one at a time.  The loop keeps who watches, and that keeps the lanes.
_watched: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()


class Watch:
    """Calls ``ready`` in each turn of the event loop in which lanes may have something; the only one to.

    Also ``look``, now and then.  Raises UsageError when somebody watches these lanes already, ValueError
    when they are closed.
    """

    def __init__(self, lanes: Lanes, ready: Callable[[], None], look: Callable[[], None]) -> None:
        self._fd = -1
        other = _watched.get(id(lanes))
        if other is not None and not other.loop.is_closed():
            raise UsageError(
                "somebody receives through these lanes already",
                hint="iterate in one task and hand on what it gets; close endpoints first",
            )
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.reading = False
        self._lanes, self._ready, self._look = lanes, ready, look
        # A number of our own: when the lanes are closed, theirs may come to be another file's.
        self._fd = os.dup(lanes.fileno())
        self.resume()
        self._timer = self.loop.call_later(LOOK, self._look_and_go_on)
        _watched[id(lanes)] = self

    def _look_and_go_on(self) -> None:
        self._timer = self.loop.call_later(LOOK, self._look_and_go_on)
        self._look()

    def resume(self) -> None:
        """Call again after a pause."""
        self.loop.add_reader(self._fd, self._ready)
        self.reading = True

    def pause(self) -> None:
        """Do not call until `resume`: lanes that stay readable would keep the event loop busy."""
        self.loop.remove_reader(self._fd)
        self.reading = False

    def close(self) -> None:
        """Stop calling; somebody else may watch the lanes then."""
        if _watched.get(id(self._lanes)) is self:
            del _watched[id(self._lanes)]
        self._timer.cancel()
        if self.reading and not self.loop.is_closed():
            self.pause()
        self._close_descriptor()

    def _close_descriptor(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self._close_descriptor()  # of a loop that has ended with everything open


class _Reading:
    """Taking batches from lanes one after the other, for one task at a time."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._batch: Batch | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._turning = False
        # Whether what the loop says next may be from before we last looked.
        self._stale = False
        self._watch = Watch(lanes, self._ready, self._wake)
        self.loop = self._watch.loop
        self.thread = threading.get_ident()
        self.asked = False
        self._resumed = self.loop.time()

    async def next(self, maximum: int) -> Batch:
        """The next one that is not empty; the last one is given back first."""
        self.asked = True
        try:
            self.release()
            if self.loop.time() - self._resumed >= TURN:
                await self._turn()
            while not (batch := self._lanes.try_receive(maximum)):
                await self._readable()
            self._batch = batch
            return batch
        finally:
            self.asked = False

    async def _turn(self) -> None:
        self._turning = True
        try:
            await asyncio.sleep(0)
        finally:
            self._turning = False
        self._went_on()

    async def _readable(self) -> None:
        if not self._watch.reading:
            self._watch.resume()
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        self._went_on()

    def _went_on(self) -> None:
        self._resumed = self.loop.time()
        self._stale = True

    def _ready(self) -> None:
        if self._stale:
            # Said again in the next turn, if it is still so.
            self._stale = False
        elif self._waiter is not None:
            self._wake()
        elif not self._turning:
            # The task does something else.
            self._watch.pause()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def release(self) -> None:
        """Give the last batch back, if that was not done; raises BufferError as Batch.release does."""
        batch, self._batch = self._batch, None
        if batch is not None and not batch.released:
            batch.release()

    def stop(self) -> None:
        """Give back the last batch and stop watching.

        A batch with a slice that still exists stays with whoever has that; it comes back when it is gone.
        """
        self._watch.close()
        with suppress(BufferError):
            self.release()


class Batches:
    """What an ``async for`` over :class:`AsyncLanes` goes through: at most one batch at a time.

    Cancelled or failed, it has nothing left registered and holds nothing; the next use starts anew.
    """

    __slots__ = ("_lanes", "_maximum", "_reading")

    def __init__(self, lanes: Lanes, maximum: int) -> None:
        self._lanes, self._maximum = lanes, maximum
        self._reading: _Reading | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        """Wait for a batch; the last one is given back.

        Raises what ``Lanes.try_receive`` raises (ValueError: the lanes were closed, InterfaceGoneError,
        OwnerGoneError), within :data:`LOOK` seconds of when that would; UsageError when another task receives
        through these lanes; BufferError when a slice of a view of the last batch still exists.
        """
        self._not_asked()
        if self._reading is None:
            self._reading = _Reading(self._lanes)
        try:
            return await self._reading.next(self._maximum)
        except BaseException:
            self._stop()
            raise

    def _not_asked(self) -> None:
        if self._reading is not None and self._reading.asked:
            raise UsageError("another task waits for the next batch of this iteration")

    async def aclose(self) -> None:
        """End it, for ``contextlib.aclosing``; raises BufferError as Batch.release does."""
        self._not_asked()
        if self._reading is not None:
            try:
                self._reading.release()
            finally:
                self._stop()

    def _stop(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.stop()

    def __del__(self) -> None:
        reading = getattr(self, "_reading", None)
        if reading is None:
            return
        if reading.thread == threading.get_ident() or reading.loop.is_closed():
            reading.stop()
        else:  # the garbage collector's thread
            reading.loop.call_soon_threadsafe(reading.stop)


class AsyncLanes:
    """The asyncio face of lanes, which stay yours to close.

    ``async for`` over it gives batches of at most ``maximum`` packets, never an empty one.  Other tasks get
    a turn at least every :data:`TURN` seconds, however many packets come, as long as the time for one
    batch allows.
    """

    def __init__(self, lanes: Lanes, *, maximum: int = 256) -> None:
        self.lanes = lanes
        self.maximum = maximum
        #: of the last send, send_many or send_back that ended: those not accepted, by index, and why
        self.failures: tuple[SendFailure, ...] = ()
        self._outlet = outlet_of(lanes)

    def __aiter__(self) -> Batches:
        return Batches(self.lanes, self.maximum)

    async def send(
        self,
        destination: Destination | Endpoint,
        payloads: Sequence[Buffer] | Batch,
        *,
        port: int | None = None,
    ) -> int:
        """As ``Lanes.send``, waiting for room until all were accepted or have failed; how many were accepted.

        Cancelled, what was accepted is on its way, and the rest is in ``failures`` with ECANCELED.
        Raises what ``Lanes.send`` raises.
        """

        def attempt(left: Sequence[int] | None) -> Attempt:
            rest = payloads if left is None else [payloads[index] for index in left]
            return _told(self._outlet.send(destination, rest, port), left)

        to = [] if isinstance(destination, Destination) else [destination]
        return await self._persist(attempt, len(payloads), port, to)

    async def send_many(
        self, fanout: Fanout, payloads: Buffer | Sequence[Buffer], *, port: int | None = None
    ) -> int:
        """As ``Lanes.send_many``; otherwise as :meth:`send`."""
        one = isinstance(payloads, (bytes, bytearray, memoryview))

        def attempt(left: Sequence[int] | None) -> Attempt:
            if left is None:
                return self._outlet.send_many(fanout, payloads, port)
            to = Fanout(fanout.endpoints[index] for index in left)
            rest = payloads if one else [payloads[index] for index in left]  # type: ignore[index]
            return _told(self._outlet.send_many(to, rest, port), left)

        return await self._persist(attempt, len(fanout), port, fanout.endpoints)

    async def _persist(
        self,
        attempt: Callable[[Sequence[int] | None], Attempt],
        count: int,
        port: int | None,
        to: Sequence[Endpoint],
    ) -> int:
        outcome = Outcome()
        try:
            await persist(self._outlet, attempt, outcome, count, port_of=lambda _: port, to=to)
        finally:
            self.failures = outcome.failures
        return outcome.sent

    async def send_back(self, batch: Batch) -> int:
        """As ``Lanes.send_back``, waiting for room; how many were accepted.

        Over AF_XDP the room is waited for first.  Cancelled, the batch is used up or still held, so what is
        not sent comes back when the iteration (or the batch's ``with``) goes on.
        """
        outcome = Outcome()
        try:
            await self._outlet.send_back(batch, outcome)
        finally:
            self.failures = outcome.failures
        return outcome.sent


def _told(attempt: Attempt, left: Sequence[int] | None) -> Attempt:
    """With indices of the whole call."""
    sent, failures = attempt
    if left is None:
        return attempt
    return sent, [SendFailure(left[one.index], one.errno) for one in failures]

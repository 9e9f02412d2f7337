# SPDX-License-Identifier: Apache-2.0
"""AsyncConnections: a pool of connections in asyncio, with real datagrams.

    def transport(now, connection, endpoint, address):
        return UdpConnection(secret=secret, boot=boot)

    async with AsyncConnections(transport, interface="eth1") as connections:
        connections.add_endpoint("a", addresses=[("192.0.2.7", 8009)])
        connections.warm_pool()
        async with connections.acquire(endpoint="a", timeout=2.0) as connection:
            connection.send(b"...")
        for message in await connections.messages(): ...

It owns a :class:`~userspace.connection.conductor.Conductor`, carries its datagrams by sockets or lanes
(:mod:`~userspace.connection.aio_carrier`), runs its one timer, and tells it when the carrier, the address or
the way out of ``interface`` changes.  All of it belongs to the thread of the event loop.

Whoever is cancelled while waiting for a connection, at whatever moment, holds none and waits for none.
A connection that is lost while it is lent says so (``connection.lost``); it is given back all the same.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Hashable, Iterable
from types import TracebackType
from typing import Final, Protocol, Self

from userspace.connection.aio_carrier import Carrier, OpenPort, sockets
from userspace.connection.aio_link import Change, LinkWatch
from userspace.connection.conductor import Conductor
from userspace.connection.conductor_links import Received, TransportFactory
from userspace.connection.conductor_settings import ConductorSettings
from userspace.connection.slots import Lease
from userspace.connection.states import Cause
from userspace.connection.transport import Transport
from userspace.connection.waiters import PoolClosedError, Ticket
from xdp.errors import SluiceError, UsageError

#: Seconds that borrowers have to give back what they hold when everything is closed.
GRACE: Final = 5.0
#: Seconds from one report of a new address or route to the next: DHCP and routing daemons tell a lot of them.
PATH_EVERY: Final = 1.0
#: Seconds: the longest time that event loops take for a timer.
_LONGEST: Final = 3600.0


class Timed(Protocol):
    """Something else with a time of its own, such as a ConnectionCache."""

    def next_timeout(self) -> float:
        """When to call on_timeout."""

    def on_timeout(self, now: float) -> None:
        """Do what is due."""


class Borrowed:
    """A connection that is lent: ``number``, and ``endpoint``, the key of its endpoint."""

    __slots__ = ("_connections", "endpoint", "failed", "lease", "number")

    def __init__(self, connections: AsyncConnections, lease: Lease) -> None:
        self._connections = connections
        self.lease = lease
        self.number = lease.connection
        self.endpoint = lease.endpoint
        #: Set it when the connection was of no use: its endpoint has done badly, and it is replaced.
        self.failed = False

    @property
    def lost(self) -> bool:
        """Whether the connection broke, or was taken away, meanwhile."""
        return self.lease.lost

    def send(self, payload: bytes) -> bool:
        """Send a message, soon; False when it was not taken: it is lost, or too many wait."""
        return not self.lease.lost and self._connections.send(self.number, payload)

    def __repr__(self) -> str:
        return f"<Borrowed {self.lease!r}>"


class _Acquisition:
    """What ``async with connections.acquire()`` goes through; each use borrows anew."""

    __slots__ = ("_borrowed", "_connections", "_what")

    def __init__(self, connections: AsyncConnections, what: Callable[[], Lease | Ticket]) -> None:
        self._connections = connections
        self._what = what
        self._borrowed: Borrowed | None = None

    async def __aenter__(self) -> Borrowed:
        if self._borrowed is not None:
            raise UsageError("it is in use", hint="call acquire() for each")
        self._borrowed = await self._connections.borrow(self._what)
        return self._borrowed

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        borrowed, self._borrowed = self._borrowed, None
        if borrowed is not None:
            self._connections.release(borrowed)


class AsyncConnections:
    """See the module.

    transport    makes the transport of a connection for each attempt
    ports        where datagrams leave: ``sockets()``, or ``lane_ports(lanes, ports)``
    interface    whose carrier, addresses and default routes are followed; None: nobody's
    rng          one that is seeded makes the same choices, else the system's entropy decides
    on_give_up   called with key and cause when all attempts at an endpoint were in vain

    Opened by ``async with`` or :meth:`open`.  Raises UsageError for values out of range and when it is used
    while it is not open.
    """

    def __init__(
        self,
        transport: TransportFactory,
        *,
        settings: ConductorSettings | None = None,
        ports: OpenPort | None = None,
        interface: str | None = None,
        rng: random.Random | None = None,
        on_give_up: Callable[[Hashable, Cause], object] | None = None,
    ) -> None:
        self._factory = transport
        self.carrier = Carrier(ports if ports is not None else sockets())
        self.conductor = Conductor(
            time.monotonic(),
            transport=self._transport,
            rng=rng if rng is not None else random.Random(random.SystemRandom().getrandbits(128)),  # noqa: S311
            settings=settings if settings is not None else ConductorSettings(),
            on_give_up=on_give_up,
            on_closed=self._on_closed,
        )
        self._interface = interface
        self._link: LinkWatch | None = None
        self._path_at = -_LONGEST
        self._timed: list[Timed] = [self.conductor]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}
        self._readers: set[asyncio.Future[None]] = set()
        self._gone: list[int] = []
        self._soon = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._ended: asyncio.Event | None = None
        #: Why the ports are of no use any more; None: they are.
        self.error: Exception | None = None

    # --- the beginning and the end

    async def open(self) -> Self:
        """Begin, in the loop that runs.

        Raises SluiceError and UsageError where ``interface`` can't be followed.
        """
        if self._loop is not None:
            raise UsageError("it was opened before", hint="make a new one")
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self.carrier.start(heard=self._heard, refused=self._refused, lost=self._lost)
        if self._interface is not None:
            self._link = LinkWatch(self._interface)
            self._loop.add_reader(self._link.fileno(), self._link_changed)
            if not self._link.up:
                self.conductor.on_link(time.monotonic(), up=False)
        self.wake()
        return self

    async def close(self, timeout: float = GRACE) -> None:  # noqa: ASYNC109 -- of those who hold something
        """Lend nothing any more, wait so many seconds for what is lent, tell the peers, and close everything.

        Who waits for a connection gets PoolClosedError.  Cancelled it does not wait, and closes all the same.
        May be called again.
        """
        if self._loop is None or self._ended is None:
            return
        now = time.monotonic()
        try:
            self.conductor.shutdown(now, now + max(0.0, timeout))
            self.wake()
            await self._ended.wait()
        finally:
            self._close()

    def _close(self) -> None:
        """At once."""
        now = self._now()
        self.conductor.shutdown(now, now)
        self._run()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._link is not None:
            assert self._loop is not None
            self._loop.remove_reader(self._link.fileno())
            self._link.close()
            self._link = None
        self.carrier.close()
        self._wake_readers()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(GRACE if kind is None else 0.0)

    def also(self, timed: Timed) -> None:
        """Run the timer of something else as well: a ConnectionCache on this conductor, say."""
        self._timed.append(timed)
        self.wake()

    # --- endpoints and connections

    @staticmethod
    def _now() -> float:
        return time.monotonic()

    def add_endpoint(self, key: Hashable, *, weight: int = 1, addresses: Iterable[Hashable] = ()) -> None:
        """Somebody to connect to, or what is known of him has changed; addresses are (host, port)."""
        self.conductor.add_endpoint(self._now(), key, weight=weight, addresses=addresses)
        self.wake()

    def remove_endpoint(self, key: Hashable) -> None:
        """Connect to it no more.  UsageError if it is not there."""
        self.conductor.remove_endpoint(self._now(), key)
        self.wake()

    def warm_pool(self) -> int:
        """Open what is missing to the minimum, from now on; how many are begun now."""
        count = self.conductor.warm_pool(self._now())
        self.wake()
        return count

    def acquire(
        self,
        *,
        endpoint: Hashable = None,
        sticky: Hashable = None,
        timeout: float | None = None,
        who: object = None,
    ) -> _Acquisition:
        """For ``async with``: borrow a connection, waiting up to ``timeout`` seconds in line for one.

        Entering raises PoolTimeoutError, PoolFullError, PoolClosedError and EndpointGoneError.
        """
        return _Acquisition(self, self._asking(endpoint, sticky, timeout, who))

    async def get(
        self,
        *,
        endpoint: Hashable = None,
        sticky: Hashable = None,
        timeout: float | None = None,  # noqa: ASYNC109 -- of a place in line, which others see
        who: object = None,
    ) -> Borrowed:
        """As ``acquire``, for who calls :meth:`release` himself."""
        return await self.borrow(self._asking(endpoint, sticky, timeout, who))

    def _asking(
        self, endpoint: Hashable, sticky: Hashable, timeout: float | None, who: object
    ) -> Callable[[], Lease | Ticket]:
        if timeout is not None and not timeout >= 0.0:
            raise UsageError(f"a timeout is seconds, 0 or more, or None, not {timeout!r}")

        def ask() -> Lease | Ticket:
            now = self._now()
            return self.conductor.acquire(
                now,
                endpoint=endpoint,
                sticky=sticky,
                deadline=now + (float("inf") if timeout is None else timeout),
                who=who,
            )

        return ask

    async def borrow(self, ask: Callable[[], Lease | Ticket]) -> Borrowed:
        """What ``acquire`` and ``get`` do."""
        if self._loop is None:
            raise UsageError("it is not open", hint="use it with `async with`")
        while True:
            got = ask()
            lease = got if isinstance(got, Lease) else await self._granted(got)
            if not lease.lost:
                return Borrowed(self, lease)
            self.conductor.release(self._now(), lease)  # it broke before it could be used

    async def _granted(self, ticket: Ticket) -> Lease:
        assert self._loop is not None
        future = self._waiting[ticket] = self._loop.create_future()
        self.wake()
        try:
            await future
        except BaseException:
            self._waiting.pop(ticket, None)
            self.conductor.cancel(self._now(), ticket)
            self.wake()
            raise
        return ticket.result()

    def release(self, borrowed: Borrowed) -> None:
        """Give a connection back.  UsageError when that was done before."""
        self.conductor.release(self._now(), borrowed.lease, broken=borrowed.failed)
        self.wake()

    def lookup(self, endpoint: Hashable) -> int | None:
        """A live connection to share, to be used at once; None: one is being opened."""
        found = self.conductor.lookup(self._now(), endpoint)
        if found is None:
            self.wake()
        return found

    def send(self, connection: int, payload: bytes) -> bool:
        """Send a message, soon; False when it was not taken."""
        taken = self.conductor.send(self._now(), connection, payload)
        if taken:
            self.wake()
        return taken

    async def messages(self) -> list[Received]:
        """What has come since the last call; waits until there is something.  PoolClosedError at the end."""
        if self._loop is None:
            raise UsageError("it is not open", hint="use it with `async with`")
        while not (messages := self.conductor.take_messages()):
            if self.conductor.closed:
                raise PoolClosedError("it is closed: nothing comes any more")
            reader: asyncio.Future[None] = self._loop.create_future()
            self._readers.add(reader)
            try:
                await reader
            finally:
                self._readers.discard(reader)
        return messages

    # --- what is heard

    def _transport(self, now: float, connection: int, endpoint: Hashable, address: Hashable) -> Transport:
        made = self._factory(now, connection, endpoint, address)
        self.carrier.attach(connection, address)
        return made

    def _on_closed(self, connection: int) -> None:
        self._gone.append(connection)

    def _heard(self, connection: int, data: bytes) -> None:
        self.conductor.receive(self._now(), connection, data)
        self.wake()

    def _refused(self, connection: int, errno: int) -> None:
        self.conductor.on_error(self._now(), connection, errno)
        self.wake()

    def _lost(self, error: Exception) -> None:
        """The lanes are gone, and with them every connection."""
        self.error = error
        now = self._now()
        self.conductor.shutdown(now, now)
        self.wake()

    def _link_changed(self) -> None:
        assert self._link is not None
        now = self._now()
        try:
            changes = self._link.poll()
        except SluiceError as error:
            assert self._loop is not None
            self._loop.remove_reader(self._link.fileno())
            self._loop.call_exception_handler(
                {"message": "a link is not followed any more", "exception": error}
            )
            return
        for change in changes:
            if change is Change.PATH:
                if now < self._path_at + PATH_EVERY:
                    continue
                self._path_at = now
            self.conductor.on_link(now, up=change is not Change.DOWN)
        self.wake()

    # --- running it

    def wake(self) -> None:
        """Do what is to be done, in the next turn of the loop."""
        if not self._soon and self._loop is not None:
            self._soon = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        """Send, tell, and set the timer."""
        self._soon = False
        conductor = self.conductor
        self.carrier.send(conductor.take_datagrams(self._now()))
        if self._gone:
            gone, self._gone = self._gone, []
            for connection in gone:
                self.carrier.detach(connection)
        for ticket in conductor.take_grants():
            waiting = self._waiting.pop(ticket, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
        if self._readers and (conductor.messages_waiting or conductor.closed):
            self._wake_readers()
        if conductor.closed:
            assert self._ended is not None
            self._ended.set()
        else:
            self._set_timer()

    def _wake_readers(self) -> None:
        """All of them: one that is cancelled at this moment would leave the others asleep."""
        for reader in self._readers:
            if not reader.done():
                reader.set_result(None)

    def _set_timer(self) -> None:
        assert self._loop is not None
        at = min(timed.next_timeout() for timed in self._timed)
        if self._timer is not None:
            if self._timer_at <= at:
                return  # it is set anew when it fires
            self._timer.cancel()
        self._timer_at = at
        delay = min(max(0.0, at - self._now()), _LONGEST)
        self._timer = self._loop.call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._now()
        self.conductor.on_tick(now, self._timer_at)
        for timed in self._timed:
            timed.on_timeout(now)
        self._run()

    def __repr__(self) -> str:
        state = "new" if self._loop is None else f"failed: {self.error}" if self.error is not None else "open"
        return f"<AsyncConnections {state}: {self.conductor!r}, {self.carrier!r}>"

# SPDX-License-Identifier: Apache-2.0
"""Those who use connections: they borrow, wait, lose patience, send, give back, and look up.

What they may rely on is checked at each step:

- what is lent is connected, to the endpoint that was asked for, and to nobody else at the same time;
- who waits is served or told otherwise when his deadline is over, and in any case after PATIENCE seconds in
  which there was somebody to be connected to;
- who asks for an endpoint is served in time when all is well, whatever has been before (``ask``);
- who waits for the same endpoint is served in the order of coming;
- an endpoint whose process was killed is not chosen any more soon after somebody has sent to it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import msgspec

from userspace.connection.slots import Lease
from userspace.connection.states import State
from userspace.connection.waiters import (
    EndpointGoneError,
    PoolClosedError,
    PoolFullError,
    PoolTimeoutError,
    Ticket,
    TicketState,
)
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.simulation.connection_world import World

#: Seconds after which an endpoint that was killed is not chosen any more, while traffic flows to it.
FAILOVER: Final = 0.25
#: Who asks for the simulation's sake.
ASKED: Final = -1
#: Seconds that the loop may take to tell of a deadline.
LATE: Final = 0.05

_NEVER: Final = math.inf


class Habits(msgspec.Struct, frozen=True, kw_only=True):
    """What users are like; times in seconds, means of exponential distributions."""

    count: int = 0
    think: float = 1.0
    hold: float = 0.5
    #: Half of the users wait for so long and no longer; the others wait, if it takes for ever.
    patience: float = 2.0
    #: The longest wait of those.
    longest: float = 60.0
    #: Parts of the users: who cancels while waiting, who gives back as broken, who asks for one endpoint, who
    #: asks for always the same one, who only looks up.
    cancel: float = 0.2
    broken: float = 0.02
    one: float = 0.3
    sticky: float = 0.2
    lookup: float = 0.1


class _Wait:
    """A ticket of somebody."""

    __slots__ = ("ticket", "user")

    def __init__(self, user: int, ticket: Ticket) -> None:
        self.user, self.ticket = user, ticket


class Users:
    """All of them; see the module."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._habits = world.scenario.users
        self._random = world.engine.random("users")
        self._leases: dict[int, Lease] = {}  # by user
        self._held: dict[int, int] = {}  # by connection: the user
        self._waits: dict[int, _Wait] = {}  # by user
        # Endpoints that are gone, and from when on they are not to be chosen for those who take any.
        self._gone: set[object] = set()
        self._avoid: dict[object, float] = {}
        # What became of it.
        self.lent = self.waited = self.late = self.full = self.cancelled = self.gone = self.lookups = 0
        self.sent = 0
        self.longest = 0.0
        for user in range(max(1, round(self._habits.count * world.scale)) if self._habits.count else 0):
            self._think(0.0, user)

    @property
    def holding(self) -> int:
        """Connections that somebody holds, and that were not lost."""
        return sum(not lease.lost for lease in self._leases.values())

    def distrust(self, _: float, endpoint: int) -> None:
        """It is gone: who is the first to send to it gets to know, and FAILOVER seconds later all do."""
        self._gone.add(endpoint)

    def trust(self, _: float, endpoint: int) -> None:
        """It may be chosen again."""
        self._gone.discard(endpoint)
        self._avoid.pop(endpoint, None)

    def _later(self, now: float, mean: float, call: Any, argument: Any) -> None:
        world = self._world
        world.engine.at(
            now + self._random.expovariate(1.0 / mean),
            lambda _, what: world.application(call, what),
            argument,
        )

    def _think(self, now: float, user: int) -> None:
        if not self._world.over:
            self._later(now, self._habits.think, self._want, user)

    def _want(self, now: float, user: int) -> None:
        world, habits, random = self._world, self._habits, self._random
        if world.over:
            return
        endpoint: int | None = None
        sticky: int | None = None
        draw = random.random()
        known = world.known
        if draw < habits.one + habits.lookup:
            endpoint = known[int(random.random() * len(known))] if known else None
        elif draw < habits.one + habits.lookup + habits.sticky:
            sticky = user
        if endpoint is not None and draw < habits.lookup:
            self._look_up(now, user, endpoint)
            return
        deadline = now + habits.patience * random.random() if random.random() < 0.5 else _NEVER
        try:
            got = world.conductor.acquire(now, endpoint=endpoint, sticky=sticky, deadline=deadline, who=user)
        except PoolFullError:
            self.full += 1
            self._think(now, user)
        except PoolTimeoutError:
            self.late += 1
            self._think(now, user)
        else:
            if isinstance(got, Lease):
                if endpoint is not None and got.endpoint != endpoint:
                    world.promises.fail(now, f"{got!r} is not to endpoint {endpoint}")
                self._lent(now, user, got, chosen=endpoint is None)
            else:
                self._wait(now, user, got)

    def _look_up(self, now: float, user: int, endpoint: int) -> None:
        world = self._world
        connection = world.conductor.lookup(now, endpoint)
        self.lookups += 1
        if connection is not None:
            self._check_live(now, connection, endpoint)
            self._say(now, connection, endpoint)
        self._think(now, user)

    def _check_live(self, now: float, connection: int, endpoint: object) -> None:
        world = self._world
        try:
            state = world.conductor.state(connection)
        except UsageError:
            world.promises.fail(now, f"connection {connection} was given out, and is not there")
            return
        # A callback may have removed the endpoint between the grant and now.
        drained = world.scenario.unruly and state.state is State.DRAINING
        if state.state is not State.CONNECTED and not drained:
            world.promises.fail(now, f"connection {connection} was given out, and is {state!r}")
        if world.peer_of[connection] // world.scenario.addresses != endpoint:
            world.promises.fail(now, f"connection {connection} is not to {endpoint}")

    # --- somebody who has to be served

    def ask(self, now: float, endpoint: int, deadline: float) -> None:
        """Somebody asks for an endpoint that can be reached, and gives back at once what he gets."""
        world = self._world
        try:
            got = world.conductor.acquire(now, endpoint=endpoint, deadline=deadline, who=ASKED)
        except PoolFullError:
            return  # it is told at once
        if isinstance(got, Lease):
            world.conductor.release(now, got)

    def _asked(self, now: float, ticket: Ticket) -> None:
        world = self._world
        try:
            world.conductor.release(now, ticket.result())
        except PoolTimeoutError:
            world.promises.fail(now, f"{ticket!r} for endpoint {ticket.endpoint} was not served since "
                                     f"{ticket.since:.3f} s, and all is well")  # fmt: skip
        except (PoolClosedError, EndpointGoneError):
            pass

    # --- waiting

    def _wait(self, now: float, user: int, ticket: Ticket) -> None:
        world, habits, random = self._world, self._habits, self._random
        self.waited += 1
        wait = self._waits[user] = _Wait(user, ticket)
        if ticket.deadline < _NEVER:
            world.engine.at(ticket.deadline + LATE + world.scenario.late, self._check_deadline, wait)
        if random.random() < habits.cancel:
            self._later(now, habits.patience, self._cancel, wait)

    def _check_deadline(self, now: float, wait: _Wait) -> None:
        """Nobody waits for longer than he wanted."""
        world = self._world
        if self._waits.get(wait.user) is not wait:
            return
        if now < world.stalled_until:
            world.engine.at(world.stalled_until + LATE, self._check_deadline, wait)
        else:
            world.promises.fail(now, f"{wait.ticket!r} waits, its deadline was {wait.ticket.deadline:.3f} s")
            world.promises.check()

    def _cancel(self, now: float, wait: _Wait) -> None:
        """Also after it was served: then what it was given goes back."""
        world = self._world
        if wait.ticket.state not in {TicketState.WAITING, TicketState.GRANTED}:
            return
        if self._leases.get(wait.user) is not None and wait.ticket.lease is self._leases[wait.user]:
            self._drop(wait.user)
            self._think(now, wait.user)
        elif self._waits.get(wait.user) is wait:
            del self._waits[wait.user]
            self._think(now, wait.user)
        else:
            return
        self.cancelled += 1
        world.conductor.cancel(now, wait.ticket)

    def granted(self, now: float, ticket: Ticket) -> None:
        """A ticket is served, or will not be."""
        world, user = self._world, ticket.who
        assert isinstance(user, int)
        if user == ASKED:
            self._asked(now, ticket)
            return
        wait = self._waits.get(user)
        if wait is None or wait.ticket is not ticket:
            world.promises.fail(now, f"{ticket!r} is told of, and nobody waits with it")
            return
        del self._waits[user]
        waited = now - ticket.since
        self.longest = max(self.longest, waited)
        try:
            lease = ticket.result()
        except PoolTimeoutError:
            self.late += 1
            if now < ticket.deadline:
                world.promises.fail(now, f"{ticket!r} is too late, its deadline is {ticket.deadline:.3f} s")
        except (PoolClosedError, EndpointGoneError):
            self.gone += 1
        else:
            self._check_order(now, ticket)
            if ticket.endpoint is not None and lease.endpoint != ticket.endpoint:
                world.promises.fail(now, f"{lease!r} is not to endpoint {ticket.endpoint}")
            self._lent(now, user, lease, chosen=False)
            return
        self._think(now, user)

    def _check_order(self, now: float, ticket: Ticket) -> None:
        """Nobody who came earlier waits for the same endpoint."""
        if ticket.endpoint is None:
            return
        for wait in self._waits.values():
            other = wait.ticket
            if other.number < ticket.number and other.endpoint == ticket.endpoint:
                if other.state is TicketState.WAITING:
                    self._world.promises.fail(now, f"{ticket!r} was served before {other!r}")
                return

    def look(self, now: float) -> None:
        """Nobody waits for ever while there is somebody to be connected to."""
        world = self._world
        for wait in self._waits.values():
            since = max(wait.ticket.since, world.served_since(wait.ticket.endpoint))
            if now - since > self._habits.longest:
                world.promises.fail(now, f"{wait.ticket!r} waits since {wait.ticket.since:.3f} s")

    # --- holding

    def _lent(self, now: float, user: int, lease: Lease, *, chosen: bool) -> None:
        world, habits, random = self._world, self._habits, self._random
        self.lent += 1
        connection = lease.connection
        other = self._held.get(connection)
        if other is not None and not self._leases[other].lost:
            world.promises.fail(now, f"connection {connection} is lent to {user}, and {other} has it")
        self._check_live(now, connection, lease.endpoint)
        if chosen and now > self._avoid.get(lease.endpoint, _NEVER):
            world.promises.fail(
                now, f"connection {connection} was chosen, and endpoint {lease.endpoint} is gone"
            )
        self._leases[user] = lease
        self._held[connection] = user
        self._say(now, connection, lease.endpoint)
        self._later(now, habits.hold, self._give_back, (user, lease, random.random() < habits.broken))

    def _say(self, now: float, connection: int, endpoint: object) -> None:
        if endpoint in self._gone:
            self._avoid.setdefault(endpoint, now + FAILOVER)
        self.sent += self._world.conductor.send(now, connection, f"{connection} {endpoint}".encode())

    def _give_back(self, now: float, what: tuple[int, Lease, bool]) -> None:
        user, lease, broken = what
        if self._leases.get(user) is not lease:
            return  # cancelled
        self._drop(user)
        self._world.conductor.release(now, lease, broken=broken and not lease.lost)
        self._think(now, user)

    def _drop(self, user: int) -> None:
        lease = self._leases.pop(user)
        if self._held.get(lease.connection) == user:
            del self._held[lease.connection]

    def give_back(self, now: float) -> None:
        """All that is held, at the end: also what was taken away."""
        for user, lease in list(self._leases.items()):
            self._drop(user)
            self._world.conductor.release(now, lease)

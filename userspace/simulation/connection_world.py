# SPDX-License-Identifier: Apache-2.0
"""One application with its connections, its loop, its sockets and its peers, in virtual time.

    world = World(scenario, seed=7)
    world.run()                        # raises PromiseBrokenError when a promise is broken

The application is a :class:`~userspace.connection.conductor.Conductor` over real UdpConnections, in a loop
as asyncio's is: it wakes for the earliest timer, a little late, or for datagrams, reads some of them, does
what is due, sends, and sleeps.  It may stall: then datagrams wait in the socket's buffer, and what finds no
room there is lost.  What users do (:mod:`~userspace.simulation.connection_users`) happens in the same loop,
so it waits as well.

What is true is known here and nowhere else: which peers live, which can be reached and since when, how long
the loop stood still.  :mod:`~userspace.simulation.connection_promises` compares it with what the conductor
says, while it runs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from errno import EMFILE
from typing import Any, Final

from userspace.connection.conductor import Conductor
from userspace.connection.udp import UdpConnection
from userspace.simulation.connection_network import Network
from userspace.simulation.connection_peer import Life, Peer
from userspace.simulation.connection_promises import Promises
from userspace.simulation.connection_scenarios import Scenario
from userspace.simulation.connection_settings import sized
from userspace.simulation.connection_transport import SimulatedConnection
from userspace.simulation.connection_users import Users
from userspace.simulation.engine import Engine
from xdp.errors import UsageError

#: Datagrams that wait in the socket: net.core.rmem_default holds 277 short ones.
ROOM: Final = 277
#: Datagrams that the loop reads before it looks at its timers, and seconds that it needs for as many.
BATCH: Final = 64
BATCH_SECONDS: Final = 0.002
#: Seconds by which the time of some calls is earlier than that of the ones before.
BACKWARDS: Final = 0.001
#: Seconds of a stall that begins in the worst moment: when something was asked.
STALL_MOST: Final = 10.0
#: Turns without progress of time after which the loop counts as busy for ever.
TURNS_MOST: Final = 200
#: Seconds at the end in which everything that is left is closed.
END: Final = 2.0
#: Seconds between looks at all that adds up, at most; and how many there are at least.
LOOK: Final = 10.0
LOOKS: Final = 4
#: How a peer is that can be asked and heard: it runs, nothing is cut, our link is up.
_WELL: Final = (Life.RUNNING, False, False, True)
_WAYS: Final = {
    (False, False): "", (True, False): ", cut outward", (False, True): ", cut inward", (True, True): ", cut",
}  # fmt: skip
_NEVER: Final = math.inf


class World:
    """See the module.  ``scale`` times as many endpoints, for ``seconds`` instead of the scenario's."""

    def __init__(
        self, scenario: Scenario, *, seed: int, scale: float = 1.0, seconds: float | None = None,
        tell: Callable[[float, str], object] | None = None,
    ) -> None:  # fmt: skip
        self.scenario, self.scale = scenario, scale
        self._tell = tell
        self.seconds = scenario.seconds if seconds is None else seconds
        self.engine = engine = Engine(seed=seed)
        self.random = engine.random("scenario")
        self._late = engine.random("loop").random
        self.endpoints = count = max(1, round(scenario.endpoints * scale))
        self.peers = [Peer(number, 1, kernel=scenario.kernel) for number in range(count * scenario.addresses)]
        self.network = Network(engine, self.peers, self._deliver)
        #: Descriptors in use, and that may be.
        self.descriptors = 0
        self.descriptors_most = _NEVER
        #: By number of connection: the peer that it goes to, or went to last; and the other way round.
        self.peer_of: dict[int, int] = {}
        self.connections_of: dict[int, set[int]] = {}
        self.made = 0
        #: Transports that are open, by endpoint; endpoints that the application knows.
        self.open_to: dict[int, set[int]] = {}
        self.known: list[int] = []
        #: Since when a peer can be heard and asked, or cannot, by the clock without stalls; the same by the
        #: engine's.
        self.well_since = [0.0] * len(self.peers)
        self.ill_since = [_NEVER] * len(self.peers)
        self.well_at = [0.0] * len(self.peers)
        self.ill_at = [_NEVER] * len(self.peers)
        self._how = [self._state(peer) for peer in range(len(self.peers))]
        #: Netlink said that our link is up; when it did last, by the engine's clock.
        self.link_told = True
        self.link_up_at = -_NEVER
        # The loop.
        self._inbox: deque[tuple[int, bytes | int]] = deque()
        self._due = _NEVER  # what it was to wake for
        self._armed = _NEVER  # the earliest event that wakes it
        self._turn_at = -_NEVER  # a turn is in the engine for then
        self._turns = 0  # without progress
        self._waiting: list[tuple[Callable[[float, Any], None], Any]] = []  # of the application
        self.stalled_until = -_NEVER
        self._stall_began = _NEVER
        self.stalled = 0.0
        self.overflowed = 0
        self.over = False
        self._boots = 1
        #: Some loops look at their timers before they read.
        self._timers_first = self._late() < 0.3
        given = scenario.settings
        self.settings = sized(given(engine.random("settings")) if callable(given) else given, scale)
        self.promises = Promises(self)
        self.conductor = Conductor(
            0.0,
            transport=self._transport,
            rng=engine.random("conductor"),
            settings=self.settings,
            on_give_up=self.promises.on_give_up,
        )
        self.conductor.monitor.subscribe(self.promises.on_status)
        self.users = Users(self)
        for number in range(count):
            self.add_endpoint(0.0, number)
        self.conductor.warm_pool(0.0)
        scenario.plan(self)
        self.engine.at(0.0, self._turn)
        self._look_every = min(LOOK, self.seconds / LOOKS)
        self.engine.at(self._look_every, self._look)
        if scenario.talk:
            for peer in range(len(self.peers)):
                self.engine.at(scenario.talk * self.random.random(), self._talk, peer)

    # --- running it

    def run(self) -> None:
        """To the end.  Raises PromiseBrokenError."""
        self.engine.run(self.seconds)
        self.promises.before_end(self.engine.now)
        self._end(self.engine.now)

    def _end(self, now: float) -> None:
        """Close everything, with some connections still borrowed; then nothing may be left."""
        self.over = True
        self._stall_ends(now)
        self.conductor.shutdown(now, now + END / 2)
        self._turn(now)
        self.engine.run(now + END)
        self.users.give_back(self.engine.now)
        self._turn(self.engine.now)
        self.promises.at_end(self.engine.now)

    def _look(self, now: float, _: object = None) -> None:
        self.forget()
        self.promises.look(now)
        if not self.over:
            self.engine.at(now + self._look_every, self._look)

    def awake(self, now: float) -> float:
        """Seconds of a clock that stands still while the loop is stalled."""
        return now - self.stalled - max(0.0, now - self._stall_began)

    # --- endpoints and transports

    def addresses(self, endpoint: int) -> range:
        """The peers that an endpoint has."""
        count = self.scenario.addresses
        return range(endpoint * count, (endpoint + 1) * count)

    def add_endpoint(self, now: float, endpoint: int, addresses: Iterable[int] = ()) -> None:
        """The application learns of it, or of its addresses (all of them, unless told which)."""
        if endpoint not in self.known:
            self.known.append(endpoint)
        self.conductor.add_endpoint(now, endpoint, addresses=addresses or self.addresses(endpoint))

    def remove_endpoint(self, now: float, endpoint: int) -> None:
        """The application does not want it any more."""
        self.known.remove(endpoint)
        self.conductor.remove_endpoint(now, endpoint)

    def _transport(self, now: float, connection: int, endpoint: Hashable, address: Hashable) -> UdpConnection:
        assert isinstance(address, int)
        assert isinstance(endpoint, int)
        self.promises.on_attempt(now, connection, endpoint)
        before = self.peer_of.get(connection)
        if before is None:
            self.made += 1
        else:
            self.connections_of[before].discard(connection)
        self.peer_of[connection] = address
        self.connections_of.setdefault(address, set()).add(connection)
        if self.descriptors >= self.descriptors_most:
            self.promises.refused += 1
            raise OSError(EMFILE, "Too many open files")
        made = SimulatedConnection(self, connection, endpoint)
        self.call_back_in(now, endpoint)
        return made

    def call_back_in(self, now: float, endpoint: int) -> None:
        """What a callback of the caller's may do, if it is unruly: anything."""
        if self.over or not self.scenario.unruly:
            return
        draw = self._late()
        if draw < 0.1:
            self.conductor.warm_pool(now)
        elif draw < 0.2:
            self.conductor.cleanup_idle_connections(now)
        elif draw < 0.3 and endpoint in self.known:
            self.conductor.lookup(now, endpoint)
        elif draw < 0.35 and endpoint in self.known:
            self.remove_endpoint(now, endpoint)
        elif draw < 0.4 and endpoint not in self.known:
            self.add_endpoint(now, endpoint)

    def tell(self, now: float, what: str) -> None:
        """Something happens, for whoever wants to know."""
        if self._tell is not None:
            self._tell(now, what)

    def opened(self, connection: int, endpoint: int) -> None:
        """A transport is open."""
        self.tell(self.engine.now, f"connection {connection} to endpoint {endpoint} is open")
        self.open_to.setdefault(endpoint, set()).add(connection)
        self.promises.on_open(self.engine.now, endpoint)

    def ended(self, connection: int, endpoint: int) -> None:
        """It is not, or not any more."""
        self.tell(self.engine.now, f"connection {connection} to endpoint {endpoint} ends")
        self.descriptors -= 1
        self.open_to.get(endpoint, set()).discard(connection)

    def forget(self) -> None:
        """Connections that are gone for good."""
        for connection, peer in list(self.peer_of.items()):
            try:
                self.conductor.state(connection)
            except UsageError:
                del self.peer_of[connection]
                self.connections_of[peer].discard(connection)

    def served_since(self, endpoint: object) -> float:
        """Since when an endpoint, or any if it is None, can be reached for sure; infinite: it can't."""
        if not isinstance(endpoint, int):
            peers: Iterable[int] = range(len(self.peers))
        elif endpoint in self.known:
            peers = self.addresses(endpoint)
        else:
            return _NEVER
        return max(self.well_at[peer] if self.ill_at[peer] == _NEVER else _NEVER for peer in peers)

    # --- the loop

    def application(self, call: Callable[[float, Any], None], argument: Any = None) -> None:
        """The application does something now: in its loop, so after a stall if there is one."""
        self._waiting.append((call, argument))
        self.wake(self.engine.now)

    def wake(self, now: float) -> None:
        """The loop has something to do."""
        if self._turn_at < now and now >= self.stalled_until:
            self._turn_at = now
            self.engine.at(now, self._turn)

    def _deliver(self, now: float, connection: int, data: bytes | int) -> None:
        if len(self._inbox) >= ROOM:
            self.overflowed += 1
            return
        self._inbox.append((connection, data))
        self.wake(now)

    def stall(self, now: float, seconds: float) -> None:
        """From now on the loop stands still for so long."""
        if seconds > 0.0 and now + seconds > self.stalled_until:
            self.tell(now, f"the loop stalls for {seconds:.3f} s")
            self._stall_began = min(self._stall_began, now)
            self.stalled_until = now + seconds
            self.engine.at(self.stalled_until, self._resume)

    def _resume(self, now: float, _: object = None) -> None:
        if now >= self.stalled_until and self._stall_began < now:
            self._stall_ends(now)
            self.wake(now)

    def _stall_ends(self, now: float) -> None:
        self.stalled += max(0.0, now - self._stall_began)
        self._stall_began = _NEVER
        self.stalled_until = -_NEVER

    def _timer(self, now: float, _: object = None) -> None:
        if now >= self._armed:
            self._armed = _NEVER
        if now >= self.stalled_until:
            if self._due <= now:
                self._turn(now)
            else:
                self._arm(now)

    def _arm(self, now: float) -> None:
        """Wake up in time for the next timer, a little late."""
        due = self._due
        if due < self._armed and due < _NEVER:
            late = self.scenario.late
            self._armed = at = max(due, now) + (late * self._late() if late else 0.0)
            self.engine.at(at, self._timer)

    def _turn(self, now: float, _: object = None) -> None:
        if now < self.stalled_until:
            return
        if self._turns and now > self.promises.now:
            self._turns = 0
        self._turns += 1
        promises, conductor, inbox = self.promises, self.conductor, self._inbox
        promises.now = now
        backwards = self.scenario.unruly
        if self._timers_first and conductor.next_timeout() <= now:
            conductor.on_timeout(now)
            self._send(now)
        conductor.on_tick(now, self._due)
        for _ in range(min(len(inbox), BATCH)):
            connection, data = inbox.popleft()
            if backwards:
                now = promises.now - BACKWARDS * self._late()
            if isinstance(data, int):
                conductor.on_error(now, connection, data)
            else:
                conductor.receive(now, connection, data)
        now = promises.now
        if inbox:
            self.engine.at(now + BATCH_SECONDS, self._turn)
        if conductor.next_timeout() <= now:
            conductor.on_timeout(now)
        self._send(now)
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for call, argument in waiting:
                call(now, argument)
            self._send(now)
        self._due = conductor.next_timeout()
        if self._turns > TURNS_MOST:
            promises.fail(now, f"the loop turns {TURNS_MOST} times at the same moment")
        promises.after_turn(now)
        self._arm(now)

    def _send(self, now: float) -> None:
        """What follows from what happened: datagrams, messages, grants."""
        conductor, network = self.conductor, self.network
        for _ in range(TURNS_MOST):
            again = False
            datagrams = conductor.take_datagrams(now)
            if datagrams and self.scenario.stall_after > self._late():
                self.stall(now, STALL_MOST * self._late())
            for connection, address, payload in datagrams:
                assert isinstance(address, int)
                if errno := network.send(now, connection, address, payload):
                    conductor.on_error(now, connection, errno)
                    again = True
            for message in conductor.take_messages():
                self.promises.on_message(now, message)
            for ticket in conductor.take_grants():
                self.users.granted(now, ticket)
                again = True
            if not again:
                return
        self.promises.fail(now, "there is always something more to send")

    def _talk(self, now: float, peer: int) -> None:
        """A peer that runs has something to say, to whoever is connected to it."""
        if self.peers[peer].life == Life.RUNNING:
            endpoint = peer // self.scenario.addresses
            for connection in sorted(self.open_to.get(endpoint, ())):
                if self.peer_of[connection] == peer:
                    self.network.back(now, connection, peer, f"talk {endpoint}".encode())
        if not self.over:
            self.engine.at(now + self.scenario.talk, self._talk, peer)

    def counts(self) -> dict[str, int]:
        """What happened, in numbers."""
        promises, users, network = self.promises, self.users, self.network
        return {
            "connections": self.made,
            "judged": promises.judged_back
            + promises.judged_found
            + promises.judged_boot
            + promises.judged_served,
            "attempts": promises.attempts,
            "given_up": promises.gave_up,
            "deaths": promises.deaths,
            "datagrams": network.sent + network.returned,
            "pings": sum(peer.pings for peer in self.peers),
            "probes": sum(peer.probes for peer in self.peers),
            "messages": promises.messages,
            "lent": users.lent,
            "waited": users.waited,
            "late": users.late,
            "cancelled": users.cancelled,
            "events": self.engine.events,
        }

    # --- what is true

    def _state(self, peer: int) -> tuple[Life, bool, bool, bool]:
        path = self.network.paths[peer]
        return self.peers[peer].life, path.out_cut, path.in_cut, self.network.link

    def changed(self, now: float, peer: int) -> None:
        """Something became of a peer or its path: from now on it is well, or ill in another way."""
        how = self._state(peer)
        if how == self._how[peer]:
            return
        self._how[peer] = how
        self.tell(now, f"{self.peers[peer]!r}{_WAYS[how[1:3]]}{'' if how[3] else ', link down'}")
        at = self.awake(now)
        if how == _WELL:
            self.well_since[peer], self.well_at[peer] = at, now
            self.ill_since[peer] = self.ill_at[peer] = _NEVER
        else:
            self.ill_since[peer], self.ill_at[peer] = at, now
            self.well_since[peer] = self.well_at[peer] = _NEVER
            self.promises.on_ill(now, peer)

    def live(self, now: float, peer: int, life: Life) -> None:
        """A peer hangs, is killed, is switched off."""
        self.peers[peer].become(now, life)
        self.changed(now, peer)

    def heal(self, now: float, _: object = None) -> None:
        """All is well from now on: nothing is lost, cut or limited, and everybody runs."""
        self.descriptors_most = _NEVER
        for peer, path in enumerate(self.network.paths):
            path.lose(0.0)
            path.cut(outward=False, inward=False)
            if self.peers[peer].life != Life.RUNNING:
                self.restart(now, peer)
            self.changed(now, peer)
        if not self.network.link:
            self.link(now, up=True, told=True)

    def limit_descriptors(self, _: float, most: float) -> None:
        """So many sockets may be open from now on; those that are stay so."""
        self.descriptors_most = most

    def restart(self, now: float, peer: int) -> None:
        """A peer's application is started anew."""
        self._boots += 1
        self.peers[peer].restart(now, self._boots)
        self.changed(now, peer)
        self.promises.expect_boot(now, peer)

    def cut(self, now: float, peer: int, *, outward: bool, inward: bool) -> None:
        """Its path is cut, one way or both, or mended."""
        self.network.paths[peer].cut(outward=outward, inward=inward)
        self.changed(now, peer)

    def link(self, now: float, *, up: bool, told: bool, route: bool = True) -> None:
        """Our own link; ``told``: netlink says so, to the loop."""
        self.network.set_link(up=up, route=route)
        for peer in range(len(self.peers)):
            self.changed(now, peer)
        if told:
            self.application(self._link_told, up)

    def part_link(self, now: float, peers: Sequence[int], *, up: bool) -> None:
        """Another link of ours, that only these are reached by; netlink says so."""
        for peer in peers:
            self.cut(now, peer, outward=not up, inward=not up)
        self.application(self._part_link_told, (peers, up))

    def _part_link_told(self, now: float, what: tuple[Sequence[int], bool]) -> None:
        peers, up = what
        connections = [one for peer in peers for one in sorted(self.connections_of.get(peer, ()))]
        self.tell(now, f"netlink: the link of connections {connections} is {'up' if up else 'down'}")
        self.conductor.on_link(now, up, connections)
        if up:
            self.promises.on_link_up(now)

    def tell_link(self, now: float, _: object = None) -> None:  # noqa: ARG002
        """Netlink tells of the link as it is, again."""
        self.application(self._link_told, self.network.link)

    def _link_told(self, now: float, up: bool) -> None:
        self.link_told = up
        self.tell(now, f"netlink: our link is {'up' if up else 'down'}")
        if up:
            self.link_up_at = now
        self.conductor.on_link(now, up)
        if up:
            self.promises.on_link_up(now)

# SPDX-License-Identifier: Apache-2.0
"""What connections promise, compared with what is true while a simulation runs.

========  =================================================================================================
always    all counts add up, after every turn of the loop and, in full, every few seconds; attempts keep
          within their rate, probes within their budget; the loop is never busy for ever; nobody who is
          unreachable is asked again and again; nothing is left at the end: no connection, descriptor, timer,
          record or ticket
spared    whoever can be asked and heard, and could for SPARED seconds, is not declared dead
found     whoever cannot is not connected any more within FOUND seconds
kept      no connection to a peer that is well all the time ends before the end
back      when all is well again, who shall be connected is, in so many seconds
========  =================================================================================================

Seconds of *spared* and *found* are those in which our own loop was not stalled; those of *found* also do not
count while netlink says that our link is down.  What users may rely on is in
:mod:`~userspace.simulation.connection_users`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final

from userspace.connection.conductor import Received
from userspace.connection.grading import Status
from userspace.connection.reconnection import Phase
from userspace.connection.states import Cause, State
from userspace.connection.udp import UdpConnection
from userspace.simulation.connection_peer import Life
from xdp.errors import SluiceError, UsageError

if TYPE_CHECKING:
    from userspace.simulation.connection_world import World

#: Seconds after which one who can be reached is not declared dead any more: at 60 % loss of round trips and
#: ten questions a second that goes wrong once in 0.6**-60 = 2e13 times.
SPARED: Final = 6.0
#: Seconds in which one who cannot is dead; one whose host answers for the application; and what that takes
#: beyond its time: a question every half a second.
FOUND: Final = 15.0
BUSY_MORE: Final = 1.0
#: Attempts at an endpoint in so many seconds that can't be reached for as long.  Delays here grow to 4 s and
#: have full jitter, so 15 are expected, with a deviation of 2.2; 25 came once in 4,000 seeds.
ATTEMPTS_MOST: Final = 30
ATTEMPTS_SECONDS: Final = 30.0
#: Seconds in which a start of a peer is noticed: three intervals, as traffic takes the place of heartbeats.
BOOT: Final = 16.0

_NEVER: Final = math.inf
#: What a connection is to the pool, by its state; states in which it has a transport.
_PHASES: Final = {
    State.DISCONNECTED: ("pending", "dialing"),  # dialing: in line for an attempt
    State.CONNECTING: ("dialing",),
    State.CONNECTED: ("idle", "in use"),
    State.FAILED: ("pending", "dialing"),
    State.DRAINING: ("in use",),
    State.CLOSED: (),
}
#: Ends that the pool wants.
_POOL_S_OWN: Final = (Cause.IDLE, Cause.EXPIRED, Cause.EVICTED)
_CARRIED: Final = (State.CONNECTING, State.CONNECTED, State.DRAINING)


class PromiseBrokenError(SluiceError):
    """A simulation shows a mistake: ``at`` seconds, ``what`` it is."""

    def __init__(self, at: float, what: str) -> None:
        super().__init__(f"at {at:.3f} s: {what}")
        self.at, self.what = at, what


class Promises:
    """Watches one world; see the module."""

    def __init__(self, world: World) -> None:
        self._world = world
        settings = world.settings
        #: Of the last turn of the loop.
        self.now = 0.0
        self._broken: PromiseBrokenError | None = None
        # Of attempts: twice the rate, as endpoints that failed have one of their own.
        self._rate, self._burst = 2.0 * settings.attempt_rate, 2.0 * settings.attempt_burst
        self._level, self._level_at = self._burst, 0.0
        self._attempts: dict[int, deque[float]] = {}
        self._probes = (0.0, 0)
        self._waits_for: dict[int, float] = {}
        self._ill: set[int] = set()  # peers that were, once
        # Figures: attempts, verdicts, seconds until them, seconds until endpoints were back.
        self.raised = 0
        self.attempts = self.deaths = self.gave_up = self.refused = self.messages = 0
        self.judged_back = self.judged_found = self.judged_boot = self.judged_served = 0
        self.found_after: list[float] = []
        self.back_after: list[float] = []

    def fail(self, now: float, what: str) -> None:
        """A promise is broken; told at once, or after the turn if this is inside of a callback."""
        if self._broken is None:
            self._broken = PromiseBrokenError(now, what)

    def check(self) -> None:
        """Raise what was found."""
        if self._broken is not None:
            raise self._broken

    # --- attempts

    def on_attempt(self, now: float, connection: int, endpoint: int) -> None:
        """A transport is to be made."""
        self.attempts += 1
        self._level = min(self._burst, self._level + self._rate * (now - self._level_at)) - 1.0
        self._level_at = now
        if self._level < -1e-6:
            self.fail(now, f"attempt {self.attempts} (connection {connection}) is over the rate of attempts")
        world, times = self._world, self._attempts.get(endpoint)
        if times is None:
            times = self._attempts[endpoint] = deque(maxlen=ATTEMPTS_MOST)
        if len(times) == ATTEMPTS_MOST and times[0] > now - ATTEMPTS_SECONDS:
            ill = max(world.ill_at[peer] for peer in world.addresses(endpoint))
            if ill < times[0] and world.link_up_at < times[0]:
                self.fail(
                    now,
                    f"endpoint {endpoint} can't be reached since {ill:.3f} s, "
                    f"and there were {ATTEMPTS_MOST} attempts since {times[0]:.3f} s",
                )
        times.append(now)

    def on_give_up(self, endpoint: Hashable, cause: Cause) -> None:
        """All attempts at an endpoint were in vain; a callback that calls back in, and one that raises."""
        world = self._world
        self.gave_up += 1
        world.tell(world.engine.now, f"endpoint {endpoint} is given up: {cause}")
        if not world.scenario.unruly:
            return
        assert isinstance(endpoint, int)
        if endpoint in world.known:
            world.remove_endpoint(self.now, endpoint)
        self.raised += 1
        raise RuntimeError("a callback that raises")

    def on_open(self, now: float, endpoint: int) -> None:
        """A connection to it is open."""
        began = self._waits_for.pop(endpoint, None)
        if began is not None:
            self.back_after.append(now - began)

    # --- health

    def on_status(self, connection: int, old: Status, new: Status) -> None:
        """The monitor has another opinion."""
        world, now = self._world, self._world.engine.now
        world.tell(now, f"connection {connection} is {new.name.lower()}, was {old.name.lower()}")
        world.call_back_in(self.now, world.peer_of[connection] // world.scenario.addresses)
        if world.scenario.calm:
            self.fail(now, f"connection {connection} is {new.name.lower()}, and nothing is wrong with it")
        if new is not Status.DEAD or old is Status.DEAD:
            return
        self.deaths += 1
        peer = world.peer_of[connection]
        well, ill = world.well_since[peer], world.ill_since[peer]
        if not world.link_told:
            self.fail(now, f"connection {connection} is dead while our link is known to be down")
        elif ill < _NEVER:
            after = world.awake(now) - ill
            self.found_after.append(after)
            health = world.settings.health
            if self._busy(peer) and after < health.busy_after - health.interval - BUSY_MORE:
                self.fail(now, f"connection {connection} is dead after {after:.3f} s, but its host answers")
        elif world.scenario.spared and world.awake(now) - well > SPARED:
            self.fail(now, f"connection {connection} is dead, but its peer {peer} answers")

    def on_ill(self, now: float, peer: int) -> None:
        """A peer can't be reached, or in another way than before: from now on it is to be found."""
        self._ill.add(peer)
        if self._world.scenario.found:
            self._world.engine.at(now + FOUND, self._find, (peer, self._world.ill_since[peer], now))

    def _find(self, now: float, what: tuple[int, float, float]) -> None:
        """Time is over: is it known by now?"""
        world = self._world
        peer, since, ill_at = what
        if world.ill_since[peer] != since or world.over:
            return  # it is another story now
        counted = min(world.awake(now) - since, now - world.link_up_at)
        most = self._found_in(peer)
        if not world.link_told or counted < most - 1e-6:
            if most < _NEVER:
                world.engine.at(now + max(0.1, most - counted), self._find, what)
            return
        self.judged_found += 1
        for connection in world.connections_of.get(peer, ()):
            try:
                state = world.conductor.state(connection)
            except UsageError:
                continue  # it is gone
            if state.state in {State.CONNECTED, State.DRAINING} and state.since <= ill_at:
                self.fail(
                    now,
                    f"connection {connection} is {state.state}; {world.peers[peer]} is gone for {most:g} s",
                )
        self.check()

    def _found_in(self, peer: int) -> float:
        world = self._world
        path, life = world.network.paths[peer], world.peers[peer].life
        heard = life == Life.RUNNING and world.scenario.talk and not path.in_cut
        if heard and world.network.link:
            return _NEVER
        return world.settings.health.busy_after + BUSY_MORE if self._busy(peer) else FOUND

    def _busy(self, peer: int) -> bool:
        """Its application hangs, its host answers."""
        world = self._world
        kernel, life = world.peers[peer].kernel, world.peers[peer].life
        return world.network.link and world.network.paths[peer].open and life == Life.HUNG and kernel

    # --- being back

    def expect_back(self, now: float, within: float) -> None:
        """All is well from now on: each endpoint is to have its connections in so many seconds."""
        world = self._world
        least = self._least()
        for endpoint in range(world.endpoints):
            if len(world.open_to.get(endpoint, ())) < least:
                self._waits_for[endpoint] = now
        world.engine.at(now + within, self._are_back, within)

    def _least(self) -> int:
        return max(1, self._world.settings.pool.min_per_endpoint)

    def _are_back(self, now: float, within: float) -> None:
        world = self._world
        if world.over:
            return
        self.judged_back += 1
        for endpoint in range(world.endpoints):
            if (count := len(world.open_to.get(endpoint, ()))) < self._least():
                info = [one for one in world.conductor.connections(now) if one.endpoint == str(endpoint)]
                self.fail(
                    now,
                    f"endpoint {endpoint} has {count} connections {within:g} s after all was well again "
                    f"({', '.join(f'{one.state}: {one.cause}' for one in info) or 'none at all'})",
                )
        self.check()

    def expect_served(self, _: float, within: float) -> None:
        """All is well from now on: whoever asks for an endpoint is served in so many seconds."""
        self._world.application(self._ask_all, within)

    def _ask_all(self, now: float, within: float) -> None:
        world = self._world
        for endpoint in list(world.known):
            if endpoint not in world.known:
                continue  # a callback has removed it, when another one was asked for
            if world.settings.pool.max_waiting > world.conductor.pool.waiting_count:
                self.judged_served += 1
                world.users.ask(now, endpoint, now + within)

    def on_link_up(self, now: float) -> None:
        """Netlink has said that our link is back."""
        within = self._world.scenario.link_back
        if within is not None:
            self.expect_back(now, within)

    # --- counts

    def after_turn(self, now: float) -> None:
        """The loop has run: what must hold at any time."""
        pool = self._world.conductor.pool
        in_use, idle, opening, closing = (
            pool.active_count, pool.idle_count, pool.opening_count, pool.closing_count
        )  # fmt: skip
        size = pool.size
        if in_use + idle + opening + closing != size or size > pool.settings.max_size:
            self.fail(
                now,
                f"{in_use} in use + {idle} idle + {opening} opening + {closing} closing = {size} "
                f"of {pool.settings.max_size}",
            )
        self.check()

    def _equal(self, now: float, what: str, left: int, right: int) -> None:
        if left != right:
            self.fail(now, f"{what}: {left} != {right}")

    def look(self, now: float) -> None:
        """All that adds up."""
        world = self._world
        snapshot = world.conductor.snapshot()
        pool, health, again = snapshot.pool, snapshot.health, snapshot.reconnection
        states = snapshot.states
        connected = states.get(State.CONNECTED, 0) + states.get(State.DRAINING, 0)
        network = world.network
        for what, left, right in (
            ("slots created", pool.created, pool.gone + pool.size),
            ("dialed", pool.dialed, pool.opened + pool.open_failed + pool.abandoned + pool.dialing),
            ("acquired", pool.acquired, pool.returned + pool.lost_in_use + pool.in_use),
            ("waited", pool.waited,
             pool.granted + pool.timed_out + pool.cancelled + pool.refused + pool.waiting),
            ("held", pool.in_use, world.users.holding),
            ("live connections", pool.in_use + pool.idle, connected),
            ("questions", health.asked,
             health.answered + health.late + health.failed + health.withdrawn + health.open),
            ("watched", health.connections,
             health.healthy + health.degraded + health.unhealthy + health.dead),
            ("watched connections", health.connections, connected),
            ("taken up", again.taken_up, again.proved + again.cancelled + sum(again.phases.values())),
            ("attempts again", again.attempts + again.late,
             again.connected + again.failed + again.abandoned + again.phases[Phase.TRYING]),
            ("attempts", snapshot.attempts,
             snapshot.opened + sum(snapshot.failed.values()) + snapshot.abandoned
             + states.get(State.CONNECTING, 0)),
            ("opened", snapshot.opened, sum(snapshot.ended.values()) + connected),
            ("made", snapshot.attempts, self.attempts),
            ("descriptors", world.descriptors, connected + states.get(State.CONNECTING, 0)),
            ("open", sum(map(len, world.open_to.values())), connected),
            ("datagrams out", snapshot.datagrams_out, network.sent),
            ("datagrams", network.sent + network.returned + network.duplicated,
             network.arrived + network.delivered + network.lost + network.flying),
            ("refused by the factory", snapshot.factory_errors, self.refused),
            ("messages", snapshot.received, self.messages + snapshot.lost),
            ("callback errors", snapshot.callback_errors + health.callback_errors
             + again.callback_errors, self.raised),
        ):  # fmt: skip
            self._equal(now, what, left, right)
        self._look_at_probes(now, health.probes)
        self._look_at_states(now)
        world.users.look(now)
        if pool.waiting and pool.idle:
            self._look_at_line(now)
        self.check()

    def _look_at_states(self, now: float) -> None:
        """Pool, state and transport of a connection are of one mind."""
        conductor = self._world.conductor
        for connection in self._world.peer_of:
            phase = conductor.pool.phase(connection)
            if phase is None:
                continue
            state = conductor.state(connection).state
            transport = conductor.transport(connection)
            if phase not in _PHASES[state] or (transport is None) is (state in _CARRIED):
                self.fail(now, f"connection {connection} is {phase} and {state}, carried by {transport!r}")

    def expect_boot(self, now: float, peer: int) -> None:
        """A peer was started anew: soon every connection to it knows."""
        self._world.engine.at(now + BOOT, self._boot_known, (peer, self._world.peers[peer].boot))

    def _boot_known(self, now: float, what: tuple[int, int]) -> None:
        world = self._world
        peer, boot = what
        well_for = world.awake(now) - world.well_since[peer]
        lossy = world.network.paths[peer].loss_out > 0.0
        if world.peers[peer].boot != boot or world.over or lossy or well_for < 0.0:
            return
        if well_for < BOOT - 1e-6:
            world.engine.at(now + BOOT - well_for, self._boot_known, what)
            return
        self.judged_boot += 1
        for connection in world.connections_of.get(peer, ()):
            if world.conductor.pool.phase(connection) is None:
                continue  # it is gone
            transport = world.conductor.transport(connection)
            if not isinstance(transport, UdpConnection) or transport.heartbeats.peer_boot is None:
                continue  # nobody has answered yet
            if transport.heartbeats.peer_boot != boot:
                self.fail(
                    now,
                    f"connection {connection}: {world.peers[peer]} is another start, and it does not know",
                )
        self.check()

    def _look_at_probes(self, now: float, probes: int) -> None:
        since, before = self._probes
        self._probes = (now, probes)
        budget = self._world.conductor.settings.health.probe_budget
        if probes - before > max(1.0, 0.1 * budget) + budget * (now - since) + 1:
            self.fail(now, f"{probes - before} probes in {now - since:g} s are over the budget")

    def _look_at_line(self, now: float) -> None:
        """Nobody waits while a connection is idle that he may have."""
        world = self._world
        idle = {one.endpoint for one in world.conductor.connections(now)
                if one.phase == "idle" and one.status != "dead"}  # fmt: skip
        for one in world.conductor.pool.endpoint_snapshots():
            if one.waiting and one.up and one.endpoint in idle:
                self.fail(now, f"{one.waiting} wait for endpoint {one.endpoint}, and one is idle")

    def on_message(self, now: float, message: Received) -> None:
        """A message came: from the endpoint that it says?"""
        self.messages += 1
        if not message.payload.endswith(f" {message.endpoint}".encode()):
            self.fail(now, f"{message.payload!r} is said to come from endpoint {message.endpoint}")

    # --- the end

    def before_end(self, now: float) -> None:
        """Before everything is closed."""
        self.look(now)
        ended = dict(self._world.conductor.snapshot().ended)
        for cause in _POOL_S_OWN:
            ended.pop(cause, None)
        excused = self._least() * len(self._ill)
        if self._world.scenario.kept and sum(ended.values(), 0) > excused:
            self.fail(now, f"connections ended, of peers that were well: {ended}")
        self.check()

    def at_end(self, now: float) -> None:
        """After it: nothing is left."""
        world = self._world
        conductor = world.conductor
        self.look(now)
        for what, count in (
            ("connections", conductor.pool.size),
            ("watched connections", len(conductor.monitor)),
            ("endpoints being reconnected", len(conductor.reconnection)),
            ("descriptors", world.descriptors),
            ("callers in line", conductor.pool.waiting_count),
            ("leases", conductor.pool.active_count),
            ("states", len(conductor.connections(now))),
        ):
            self._equal(now, f"{what} at the end", count, 0)
        if not conductor.closed:
            self.fail(now, f"it is not closed: {conductor.pool!r}")
        if (at := conductor.next_timeout()) < _NEVER:
            self.fail(now, f"a timer for {at:.3f} s is left at the end")
        self.check()

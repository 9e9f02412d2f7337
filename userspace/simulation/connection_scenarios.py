# SPDX-License-Identifier: Apache-2.0
"""What can happen to an application with connections: the scenarios of ``sluice simulate connections``.

Each is small, so that a seed takes milliseconds; ``scale`` makes it larger.  What is promised in all of them,
and what ``spared``, ``found``, ``kept`` and ``back`` mean, is in
:mod:`~userspace.simulation.connection_promises`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Final

import msgspec

from userspace.connection.backoff import Backoff
from userspace.connection.conductor_settings import ConductorSettings
from userspace.connection.health_report import HealthSettings
from userspace.connection.pool_settings import PoolSettings
from userspace.simulation.connection_faults import (
    back,
    deaths,
    hangs,
    link,
    partition,
    rough,
    some,
    stalls,
)
from userspace.simulation.connection_peer import Life
from userspace.simulation.connection_promises import FOUND
from userspace.simulation.connection_settings import SHORT, anything, settings
from userspace.simulation.connection_users import Habits
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.simulation.connection_world import World

#: Seconds after a silent outage in which everything is back: the attempt that is under way when it ends and
#: fails (3 s), one delay, and an attempt that is lucky with its second ping.
BACK: Final = 3.0 + SHORT.cap + 1.0
BACK_LONG: Final = 3.0 + Backoff().cap + 1.0
#: Seconds after netlink's report.
LINK_BACK: Final = 1.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One of them."""

    name: str
    about: str
    plan: Callable[[World], None]
    seconds: float
    endpoints: int = 4
    addresses: int = 1
    #: Or a function that draws them.
    settings: ConductorSettings | Callable[[Random], ConductorSettings]
    users: Habits = Habits()
    #: Seconds by which the loop is late, at most.
    late: float = 0.005
    #: Kernel programs answer probes.
    kernel: bool = False
    #: Seconds between messages that peers send of their own accord; 0: they send none.
    talk: float = 0.0
    spared: bool = True
    found: bool = True
    kept: bool = False
    #: Probability that our loop stalls when it has just sent something.
    stall_after: float = 0.0
    #: Callbacks call back in and raise, and time goes backwards a little.
    unruly: bool = False
    #: No status of health changes.
    calm: bool = False
    #: Seconds after netlink says that the link is back, in which all are.
    link_back: float | None = None


def _steady(world: World) -> None:
    rough(world, jitter=0.02, duplicate=0.2)
    back(world, 0.0, 1.0)


def _loss(world: World) -> None:
    rough(world, loss=(0.0, 0.6), jitter=0.05)
    deaths(world, Life.OFF, peers=some(world, 0.5), between=(3.0, world.seconds - FOUND))


def _heavy_loss(world: World) -> None:
    rough(world, loss=(0.6, 0.6))
    if world.random.random() < 0.5:
        deaths(world, Life.OFF, peers=some(world, 0.1), between=(3.0, world.seconds - FOUND))


def _death(world: World) -> None:
    rough(world, duplicate=0.1)
    end = deaths(world, Life.OFF, peers=some(world, 0.5), between=(1.0, 5.0), lasting=(1.0, 20.0))
    back(world, end, BACK)


def _long_death(world: World) -> None:
    end = deaths(world, Life.OFF, peers=some(world, 0.5), between=(1.0, 5.0), lasting=(35.0, 45.0))
    back(world, end, BACK_LONG)


def _kill(world: World) -> None:
    at = world.random.uniform(0.1, 0.3)
    victims = some(world, 0.3)
    end = deaths(world, Life.STOPPED, peers=victims, between=(at, at), lasting=(0.4, 0.6))
    for peer in victims:
        world.engine.at(at, world.users.distrust, peer)
        world.engine.at(end, world.users.trust, peer)


def _refused(world: World) -> None:
    end = deaths(world, Life.STOPPED, peers=some(world, 0.6), between=(1.0, 10.0), lasting=(10.0, 30.0))
    back(world, end, BACK)


def _hang(world: World) -> None:
    lasting = (62.0, 70.0) if world.random.random() < 0.1 else (3.0, 15.0)
    end = hangs(world, peers=some(world, 0.5), between=(1.0, 5.0), lasting=lasting)
    back(world, end, BACK)


def _partition(world: World) -> None:
    rough(world, jitter=0.02)
    end = partition(world, peers=some(world, world.random.random()), between=(1.0, 6.0), lasting=(0.2, 20.0))
    back(world, end, BACK)


def _one_way(world: World) -> None:
    outward = world.random.random() < 0.5
    end = partition(
        world, peers=some(world, world.random.random()), between=(1.0, 6.0), lasting=(1.0, 20.0),
        outward=outward, inward=not outward,
    )  # fmt: skip
    back(world, end, BACK)


def _link(world: World) -> None:
    random = world.random
    deaths(world, Life.OFF, peers=some(world, 0.2), between=(0.5, 3.0), lasting=(0.1, 1.0))
    # No connection ends because the link is down: of these some wait for their next attempt when it is back.
    deaths(world, Life.STOPPED, peers=some(world, 0.5), between=(3.8, 4.2), lasting=(0.8, 1.0))
    link(world, 5.0 + random.random(), random.uniform(0.2, 15.0), told=True, route=random.random() < 0.5)


def _part_link(world: World) -> None:
    random, peers = world.random, some(world, 0.5)
    at = 1.0 + random.random()
    back_at = at + random.uniform(0.2, 20.0)
    world.engine.at(at, lambda now, _: world.part_link(now, peers, up=False))
    world.engine.at(back_at, lambda now, _: world.part_link(now, peers, up=True))


def _blackhole(world: World) -> None:
    random = world.random
    end = link(world, 5.0 + random.random(), random.uniform(0.2, 16.0), told=False)
    back(world, end, BACK)


def _flapping(world: World) -> None:
    random, at = world.random, 3.0
    while at < 9.0:
        at = link(world, at, random.uniform(0.05, 2.0), told=True, route=random.random() < 0.5)
        for again in range(3):  # carrier, address and route are told of one by one
            world.engine.at(at + 0.02 * again, world.tell_link)
        at += random.uniform(0.05, 2.0)
    back(world, at, LINK_BACK)


def _stall(world: World) -> None:
    rough(world, loss=(0.0, 0.3))
    stalls(world, count=5, between=(1.0, 33.0), lasting=(0.1, 15.0))
    if world.random.random() < 0.5:
        deaths(world, Life.OFF, peers=some(world, 0.3), between=(1.0, 20.0))


def _pause(world: World) -> None:
    stalls(world, count=3, between=(1.0, 50.0), lasting=(0.1, 15.0))


def _restart(world: World) -> None:
    rough(world, duplicate=0.3, jitter=0.05)
    for peer in range(len(world.peers)):
        life = Life.OFF if world.random.random() < 0.5 else Life.STOPPED
        deaths(world, life, peers=[peer], between=(1.0, 5.0), lasting=(0.0, 0.5))
        deaths(world, life, peers=[peer], between=(22.0, 25.0), lasting=(0.0, 0.5))


def _churn(world: World) -> None:
    rough(world, loss=(0.0, 0.2))
    random, engine = world.random, world.engine

    def change(now: float, endpoint: int) -> None:
        draw = random.random()
        if draw < 0.4 or endpoint not in world.known:
            first, *others = world.addresses(endpoint)
            world.add_endpoint(now, endpoint, others if draw < 0.2 else [first] if draw < 0.3 else ())
        else:
            world.remove_endpoint(now, endpoint)

    for endpoint in range(world.endpoints):
        at = random.uniform(0.0, 2.0)
        while at < world.seconds:
            engine.at(at, lambda _, which: world.application(change, which), endpoint)
            at += random.expovariate(1.0)
    deaths(world, Life.OFF, peers=some(world, 0.3), between=(1.0, 5.0), lasting=(0.5, 4.0))


def _descriptors(world: World) -> None:
    random = world.random
    at = 0.0
    while at < 10.0:
        most = random.randrange(0, 8)
        world.engine.at(at, world.limit_descriptors, most)
        at += random.uniform(0.5, 3.0)
    world.engine.at(at, world.limit_descriptors, math.inf)
    deaths(world, Life.STOPPED, peers=some(world, 0.3), between=(1.0, 9.0), lasting=(0.0, 1.0))
    back(world, at, BACK)


def _line(world: World) -> None:
    rough(world, jitter=0.02)
    if world.random.random() < 0.5:
        deaths(world, Life.STOPPED, peers=some(world, 0.3), between=(0.3, 2.0), lasting=(0.1, 0.5))
    else:
        # More endpoints than places, and all places in demand.
        world.engine.at(0.3, world.promises.expect_served, 2.5)


def _stampede(world: World) -> None:
    end = deaths(world, Life.STOPPED, peers=range(len(world.peers)), between=(6.0, 7.0), lasting=(2.0, 4.0))
    # Endpoints, each after a delay, at the rate of attempts; and behind them the other connections to them.
    back(world, end, BACK + 2.0 * len(world.peers) / world.settings.attempt_rate)


def _budget(world: World) -> None:
    partition(world, peers=range(len(world.peers)), between=(1.0, 2.0), lasting=(8.0, 9.0))


def _lifetimes(world: World) -> None:
    rough(world, jitter=0.02)

    def clean(now: float, _: object) -> None:
        world.conductor.cleanup_idle_connections(now)

    for _ in range(3):
        at = world.seconds * world.random.random()
        world.engine.at(at, lambda _, __: world.application(clean))


def _shutdown(world: World) -> None:
    random = world.random
    rough(world, loss=(0.0, 0.5))
    world.seconds *= 0.05 + 0.95 * random.random()
    deaths(world, Life(random.randrange(1, 4)), peers=some(world, 0.3), between=(0.0, world.seconds))
    partition(world, peers=some(world, 0.3), between=(0.0, world.seconds), lasting=(1.0, 9.0))
    if random.random() < 0.3:
        link(world, world.seconds * random.random(), 9.0, told=random.random() < 0.5)
    if random.random() < 0.3:
        stalls(world, count=1, between=(0.0, world.seconds), lasting=(0.1, 5.0))


def _chaos(world: World) -> None:
    random = world.random
    rough(world, loss=(0.0, 0.4), jitter=0.1, duplicate=0.2)
    most = world.seconds - 10.0
    for peer in some(world, 0.8):
        deaths(world, Life(random.randrange(1, 4)), peers=[peer], between=(0.5, most), lasting=(0.1, 25.0))
    for _ in range(2):
        partition(
            world, peers=some(world, random.random()), between=(0.5, most), lasting=(0.1, 20.0),
            outward=random.random() < 0.7, inward=random.random() < 0.7,
        )  # fmt: skip
    if random.random() < 0.7:
        link(world, random.uniform(0.5, most), random.uniform(0.1, 10.0), told=random.random() < 0.6,
             route=random.random() < 0.5)  # fmt: skip
    stalls(world, count=2, between=(0.5, most), lasting=(0.1, 8.0))


def _anything(world: World) -> None:
    random = world.random
    most = world.seconds - SERVED - 1.0
    rough(world, loss=(0.0, 0.2), jitter=0.05, duplicate=0.1)
    for peer in some(world, 0.8):
        life = Life.STOPPED if random.random() < 0.7 else Life.OFF
        deaths(world, life, peers=[peer], between=(0.2, most), lasting=(0.1, 4.0))
    if random.random() < 0.3:
        link(world, random.uniform(0.2, most - 2.0), random.uniform(0.1, 2.0), told=random.random() < 0.6,
             route=random.random() < 0.5)  # fmt: skip
    if random.random() < 0.3:
        world.engine.at(random.uniform(0.0, most), world.limit_descriptors, random.randrange(4))
    if random.random() < 0.3:
        stalls(world, count=1, between=(0.5, most), lasting=(0.1, 3.0))
    if random.random() < 0.5:
        down_at, peers = random.uniform(0.2, most - 1.0), some(world, 0.4)
        world.engine.at(down_at, lambda now, _: world.part_link(now, peers, up=False))
        world.engine.at(random.uniform(down_at, most), lambda now, _: world.part_link(now, peers, up=True))
    world.engine.at(most, world.heal)
    world.engine.at(most + 0.5, world.promises.expect_served, SERVED)


#: Seconds after all is well in which whoever asks for an endpoint has a connection: as BACK, and time to wait
#: for others.
SERVED: Final = BACK + 6.0
_MANY: Final = Habits(count=4, think=0.3, hold=0.2)
_RUSH: Final = Habits(count=3, think=0.04, hold=0.04, cancel=0.0, broken=0.0, one=0.0, sticky=0.0, lookup=0.0)

_ALL: Final = (
    Scenario(name="steady", about="reordering and duplicates, and nothing else", plan=_steady, seconds=32.0,
             endpoints=3, settings=settings(), kept=True, calm=True),
    Scenario(name="loss", about="0 to 60 % of round trips are lost; half of the hosts die", plan=_loss,
             seconds=29.0, endpoints=2, settings=settings()),
    Scenario(name="heavy-loss", about="60 % of round trips are lost; a host dies", plan=_heavy_loss,
             seconds=32.0, endpoints=2, settings=settings(), kept=True),
    Scenario(name="death", about="hosts are switched off and come back", plan=_death, seconds=38.0,
             endpoints=2, settings=settings()),
    Scenario(name="long-death", about="the same for minutes, with the default delays", plan=_long_death,
             seconds=86.0, endpoints=1, settings=settings(backoff=Backoff())),
    Scenario(name="kill", about="processes are killed while traffic flows (ICMP says so)", plan=_kill,
             seconds=0.8, endpoints=3, settings=settings(each=8, size=24), users=_RUSH),
    Scenario(name="refused", about="nobody listens for a long time, then somebody does", plan=_refused,
             seconds=50.0, endpoints=2, settings=settings()),
    Scenario(name="hang", about="applications hang, their hosts' kernel programs answer", plan=_hang,
             seconds=85.0, endpoints=2, settings=settings(), kernel=True),
    Scenario(name="partition", about="some peers can't be reached for a while", plan=_partition, seconds=31.0,
             endpoints=2, settings=settings()),
    Scenario(name="one-way", about="the same, one way only; peers talk", plan=_one_way, seconds=31.0,
             endpoints=2, settings=settings(), talk=4.0),
    Scenario(name="link", about="our link goes down and comes back, netlink says so", plan=_link,
             seconds=25.0, endpoints=3, settings=settings(each=2), link_back=LINK_BACK),
    Scenario(name="part-link", about="one of our links goes down and comes back", plan=_part_link,
             seconds=25.0, endpoints=2, link_back=LINK_BACK,
             settings=settings(pool=PoolSettings(
                 min_size=0, max_size=16, min_per_endpoint=1, max_lifetime=8.0))),
    Scenario(name="blackhole", about="our link loses everything for a while, and nobody says so",
             plan=_blackhole, seconds=35.0, endpoints=2, settings=settings()),
    Scenario(name="flapping", about="our link goes up and down and up, netlink tells all of it",
             plan=_flapping, seconds=14.0, endpoints=2, settings=settings(each=2)),
    Scenario(name="stall", about="our own loop stands still; hosts die meanwhile", plan=_stall, seconds=50.0,
             endpoints=2, settings=settings(), talk=3.0),
    Scenario(name="pause", about="our own loop stands still, and nothing else is wrong", plan=_pause,
             seconds=60.0, endpoints=2, settings=settings(), kept=True, calm=True, stall_after=0.4),
    Scenario(name="restart", about="peers are started anew, with new keys", plan=_restart, seconds=45.0,
             endpoints=2, settings=settings()),
    Scenario(name="churn", about="endpoints come, move and go all the time", plan=_churn, seconds=3.0,
             addresses=2, unruly=True, settings=settings(size=8), users=_MANY),
    Scenario(name="descriptors", about="sockets can't be made", plan=_descriptors, seconds=22.0,
             endpoints=2, settings=settings(each=2), users=Habits(count=1, broken=0.0)),
    Scenario(name="line", about="more users than connections", plan=_line, seconds=3.0,
             settings=settings(each=0, size=3),
             users=Habits(count=6, think=0.2, hold=0.2, cancel=0.4, broken=0.05, one=0.6)),
    Scenario(name="stampede", about="all are killed, and come back; few attempts a second", plan=_stampede,
             seconds=23.0, endpoints=3, settings=settings(each=2, rate=3.0, burst=2)),
    Scenario(name="budget", about="all are cut off, and few may be asked at a time", plan=_budget,
             seconds=11.0, endpoints=3, settings=settings(health=HealthSettings(probe_budget=8.0)),
             found=False),
    Scenario(name="lifetimes", about="connections get old and idle", plan=_lifetimes, seconds=8.0,
             settings=settings(pool=PoolSettings(
                 min_size=2, max_size=6, max_per_endpoint=4, idle_timeout=2.0, max_lifetime=4.0,
                 leak_threshold=1.0)),
             users=Habits(count=3, think=1.0, hold=0.6)),
    Scenario(name="shutdown", about="everything is closed while much goes wrong", plan=_shutdown,
             seconds=8.0, endpoints=3, settings=settings(each=2, size=10), users=_MANY),
    Scenario(name="chaos", about="everything at once", plan=_chaos, seconds=25.0, endpoints=2, addresses=2,
             kernel=True, settings=settings(size=8), users=Habits(count=2, think=2.0), talk=5.0,
             unruly=True),
    Scenario(name="anything", about="any settings, and much goes wrong", plan=_anything, seconds=20.0,
             endpoints=3, settings=anything, found=False, unruly=True,
             users=Habits(count=2, think=1.0, hold=0.3, broken=0.1)),
)  # fmt: skip
SCENARIOS: Final = {one.name: one for one in _ALL}


def scenario(name: str) -> Scenario:
    """By name.  Raises UsageError."""
    if name not in SCENARIOS:
        raise UsageError(f"no scenario {name!r}", hint=f"there are: {', '.join(SCENARIOS)}")
    return SCENARIOS[name]

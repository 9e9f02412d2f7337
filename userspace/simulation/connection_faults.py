# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in simulations of connections: each function puts it into a world, at times by chance.

    deaths(world, Life.OFF, count=2, between=(5.0, 20.0), lasting=(10.0, 40.0))

Chance is that of ``world.random``; times and durations are ranges, in seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userspace.simulation.connection_peer import Life

if TYPE_CHECKING:
    from collections.abc import Iterable

    from userspace.simulation.connection_world import World

Range = tuple[float, float]


def some(world: World, share: float) -> list[int]:
    """So many of the peers, at least one."""
    count = len(world.peers)
    return world.random.sample(range(count), max(1, min(count, round(share * count))))


def rough(world: World, *, jitter: float = 0.0, duplicate: float = 0.0, loss: Range = (0.0, 0.0)) -> None:
    """All paths lose, duplicate and reorder, each as much as chance will have it."""
    draw = world.random.random
    for path in world.network.paths:
        path.delay *= 0.5 + draw()
        path.jitter, path.duplicate = jitter * draw(), duplicate * draw()
        path.lose(loss[0] + (loss[1] - loss[0]) * draw())


def deaths(
    world: World, life: Life, *, peers: Iterable[int], between: Range, lasting: Range | None = None
) -> float:
    """Peers hang, are killed or switched off, and are started anew; returns when the last one is."""
    end = 0.0
    for peer in peers:
        at = world.random.uniform(*between)
        world.engine.at(at, lambda now, peer: world.live(now, peer, life), peer)
        if lasting is not None:
            back = at + world.random.uniform(*lasting)
            world.engine.at(back, world.restart, peer)
            end = max(end, back)
    return end


def hangs(world: World, *, peers: Iterable[int], between: Range, lasting: Range) -> float:
    """Applications that do not read for a while, and then go on as if nothing had been."""
    end = 0.0
    for peer in peers:
        at = world.random.uniform(*between)
        back = at + world.random.uniform(*lasting)
        world.engine.at(at, lambda now, peer: world.live(now, peer, Life.HUNG), peer)
        world.engine.at(back, lambda now, peer: world.live(now, peer, Life.RUNNING), peer)
        end = max(end, back)
    return end


def partition(
    world: World, *, peers: Iterable[int], between: Range, lasting: Range, outward: bool = True,
    inward: bool = True,
) -> float:  # fmt: skip
    """One cut for all of these, at the same time; returns when it is mended."""
    at = world.random.uniform(*between)
    back = at + world.random.uniform(*lasting)
    for peer in peers:
        world.engine.at(at, lambda now, peer: world.cut(now, peer, outward=outward, inward=inward), peer)
        world.engine.at(back, lambda now, peer: world.cut(now, peer, outward=False, inward=False), peer)
    return back


def link(world: World, at: float, seconds: float, *, told: bool, route: bool = True) -> float:
    """Our link goes down for so long; returns when it is up."""
    world.engine.at(at, lambda now, _: world.link(now, up=False, told=told, route=route))
    world.engine.at(at + seconds, lambda now, _: world.link(now, up=True, told=told, route=route))
    return at + seconds


def stalls(world: World, *, count: int, between: Range, lasting: Range) -> None:
    """Our own loop stands still."""
    for _ in range(count):
        seconds = world.random.uniform(*lasting)
        world.engine.at(world.random.uniform(*between), world.stall, seconds)


def back(world: World, at: float, within: float) -> None:
    """From then on all is well."""
    world.engine.at(at, world.promises.expect_back, within)

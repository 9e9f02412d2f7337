# SPDX-License-Identifier: Apache-2.0
"""Connections in asyncio, over sockets and lanes of this host."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from tests.unit.connection_loopback import ONE, TWO, balanced, connected, listen, make, peers, plain_policy
from tests.unit.event_loops import Run, asyncio_only, cancelled_at, readers, run, until  # noqa: F401
from tests.unit.socket_backends import Open, backend, free_port, open_lanes, port  # noqa: F401
from userspace.connection.aio_carrier import lane_ports, sockets
from userspace.connection.aio_pool import AsyncConnections, Borrowed
from userspace.connection.cache import CacheSettings, ConnectionCache
from userspace.connection.conductor import ConductorSettings
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.waiters import PoolClosedError, PoolTimeoutError
from xdp.errors import UsageError


def test_messages_over_sockets(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with peers(2) as (one, two), peers(1, "::1") as (six,):
            before = readers(loop)
            async with AsyncConnections(make, settings=TWO) as connections:
                for key, peer in (("one", one), ("two", two), ("six", six)):
                    connections.add_endpoint(key, addresses=[peer.name])
                assert connections.warm_pool() == 3  # one tries for both
                await connected(connections, 6)
                # Two connections to each address, so two sockets for each family.
                assert connections.carrier.statistics()[:2] == (4, 6)
                for key in ("one", "two", "six"):
                    async with connections.acquire(endpoint=key, timeout=5.0) as connection:
                        assert connection.send(b"echo " + key.encode())
                        assert connection.endpoint == key
                heard: list[Any] = []
                while len(heard) < 3:
                    heard += [(one.endpoint, one.payload) for one in await connections.messages()]
                assert sorted(heard) == [("one", b"echo one"), ("six", b"echo six"), ("two", b"echo two")]
                shared = connections.lookup("one")
                assert shared is not None
                assert connections.send(shared, b"shared")
                await until(lambda: b"shared" in one.got)
                balanced(connections)
                assert connections.carrier.statistics().stray == 0
                assert "open" in repr(connections)
            assert connections.conductor.closed
            assert readers(loop) == before
            assert connections.carrier.statistics()[:2] == (0, 0)
            await connections.close()

    run(main())


@asyncio_only
def test_messages_over_lanes(run: Run, open_lanes: Open, port: int) -> None:  # noqa: F811
    async def main() -> None:
        lanes = open_lanes(plain_policy(port))
        async with peers(3) as all_of_them:
            ports = lane_ports(lanes, [port])
            async with AsyncConnections(make, settings=ONE, ports=ports) as connections:
                for number, peer in enumerate(all_of_them):
                    connections.add_endpoint(number, addresses=[peer.name])
                connections.warm_pool()
                await connected(connections, 3)
                for number in range(3):
                    async with connections.acquire(endpoint=number) as connection:
                        assert connection.send(b"echo %d" % number)
                heard: list[Any] = []
                while len(heard) < 3:
                    heard += [(one.endpoint, one.payload) for one in await connections.messages()]
                assert sorted(heard) == [(number, b"echo %d" % number) for number in range(3)]
                # A second connection to an address has no port to leave from.
                connections.add_endpoint("again", addresses=[all_of_them[0].name])
                await until(lambda: connections.conductor.factory_errors)
                assert "each of 1 ports" in connections.conductor.last_factory_error
                # The process at the other end is gone: ICMP says so.
                killed = connections.conductor.links[0]
                all_of_them[0].transport.close()
                await asyncio.sleep(0)
                connections.send(killed.number, b"x")
                await until(lambda: not killed.live)
            assert lanes.try_receive(1).released is False  # they are still open

    run(main())


@asyncio_only
def test_lanes_that_are_closed_end_it(run: Run, open_lanes: Open, port: int) -> None:  # noqa: F811
    async def main() -> None:
        lanes = open_lanes(plain_policy(port))
        async with (
            peers(1) as (peer,),
            AsyncConnections(make, settings=ONE, ports=lane_ports(lanes, [port])) as connections,
        ):
            connections.add_endpoint("a", addresses=[peer.name])
            connections.warm_pool()
            await connected(connections, 1)
            lanes.close()
            await until(lambda: connections.error is not None)
            with pytest.raises(PoolClosedError):
                await connections.get()
            assert "failed" in repr(connections)
            with pytest.raises(PoolClosedError):
                await connections.messages()

    run(main())


@asyncio_only
def test_a_killed_peer_is_failed_over_at_once(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with (
            peers(2) as (one, two),
            AsyncConnections(make, settings=ONE, rng=random.Random(1)) as connections,
        ):
            connections.add_endpoint("one", addresses=[one.name])
            connections.add_endpoint("two", addresses=[two.name])
            connections.warm_pool()
            await connected(connections, 2)
            name = one.name
            one.transport.close()
            await asyncio.sleep(0)
            killed = last = loop.time()
            while loop.time() < killed + 0.6:
                async with connections.acquire(timeout=1.0) as connection:
                    connection.send(b"x")
                    await asyncio.sleep(0.002)
                    if connection.endpoint == "one":
                        last = loop.time()
                        connection.failed = connection.lost
            assert last - killed < 0.25
            # It comes back, and is used again.
            back = await listen(port=name[1])
            await connected(connections, 2)
            back.transport.close()
            balanced(connections)

    run(main())


@asyncio_only
@pytest.mark.parametrize("late", [False, True])
def test_cancelled_wherever_it_waits(run: Run, *, late: bool) -> None:  # noqa: F811
    async def main() -> None:
        settings = ConductorSettings(pool=PoolSettings(min_size=0, max_size=1))
        async with peers(1) as (peer,), AsyncConnections(make, settings=settings) as connections:
            connections.add_endpoint("a", addresses=[peer.name])

            async def hold() -> None:
                async with connections.acquire(timeout=5.0) as connection:
                    connection.send(b"x")
                    await asyncio.sleep(0.01)

            async def use() -> None:
                holder = asyncio.create_task(hold())
                try:
                    await asyncio.sleep(0)
                    async with connections.acquire(timeout=5.0) as connection:
                        await asyncio.sleep(0)
                        connection.send(b"y")
                finally:
                    holder.cancel()
                    await asyncio.gather(holder, return_exceptions=True)

            number = 0
            while await cancelled_at(number, use(), late=late):
                balanced(connections)
                number += 1
            assert number >= 3
            balanced(connections)
            assert connections.conductor.pool.snapshot().cancelled >= 1

    run(main())


@asyncio_only
def test_many_waiters_cancelled_at_random(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        rng = random.Random(7)
        settings = ConductorSettings(pool=PoolSettings(min_size=0, max_size=3))
        served = 0
        async with peers(2) as (one, two), AsyncConnections(make, settings=settings) as connections:
            connections.add_endpoint("a", addresses=[one.name])
            connections.add_endpoint("b", addresses=[two.name])

            async def use() -> None:
                nonlocal served
                async with connections.acquire(endpoint=rng.choice(["a", "b", None])) as connection:
                    served += 1
                    await asyncio.sleep(rng.choice([0, 0.0005]))
                    connection.failed = rng.random() < 0.05

            for _ in range(20):
                tasks = [asyncio.create_task(use()) for _ in range(20)]
                while not all(task.done() for task in tasks):
                    await asyncio.sleep(0)
                    rng.choice(tasks).cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    assert result is None or isinstance(result, asyncio.CancelledError)
                balanced(connections)
            # Whoever is not cancelled is served.
            before = served
            await asyncio.gather(*(use() for _ in range(50)))
            assert served == before + 50

    run(main())


@asyncio_only
def test_deadlines(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        number = free_port()
        async with AsyncConnections(make, settings=ONE) as connections:
            connections.add_endpoint("nobody", addresses=[("127.0.0.1", number)])
            with pytest.raises(PoolTimeoutError):
                await connections.get(timeout=0.05)
            with pytest.raises(PoolTimeoutError):
                await connections.get(timeout=0.0)
            for wrong in (-1.0, float("nan")):
                with pytest.raises(UsageError, match="a timeout"):
                    connections.acquire(timeout=wrong)
            balanced(connections)
            peer = await listen(port=number)
            borrowed = await connections.get(timeout=5.0)
            assert repr(borrowed).startswith("<Borrowed <Lease of connection 0 to 'nobody'")
            connections.release(borrowed)
            with pytest.raises(UsageError, match="before"):
                connections.release(borrowed)
            peer.transport.close()

    run(main())


@asyncio_only
def test_closing_waits_for_who_holds_something(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        async with peers(1) as (peer,):
            for wait, lost in ((5.0, False), (0.05, True)):
                connections = await AsyncConnections(make, settings=ONE).open()
                connections.add_endpoint("a", addresses=[peer.name])
                held = await connections.get(timeout=5.0)
                waiter = asyncio.create_task(connections.get(endpoint="a"))
                await asyncio.sleep(0)
                closing = asyncio.create_task(connections.close(wait))
                with pytest.raises(PoolClosedError):
                    await waiter
                if not lost:
                    assert not closing.done()
                    assert held.send(b"the last word")
                    connections.release(held)
                await closing
                assert held.lost is lost
                if lost:
                    assert not held.send(b"too late")
                    connections.release(held)
                balanced(connections)
            await until(lambda: b"the last word" in peer.got)

    run(main())


@asyncio_only
def test_cancelled_while_it_closes(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with peers(1) as (peer,):
            before = readers(loop)
            connections = await AsyncConnections(make, settings=ONE).open()
            connections.add_endpoint("a", addresses=[peer.name])
            held = await connections.get(timeout=5.0)
            assert await cancelled_at(0, connections.close(), late=False)
            assert connections.conductor.closed
            assert held.lost
            assert readers(loop) == before
            connections.release(held)
            failing = AsyncConnections(make, settings=ONE)

            async def fail() -> None:
                async with failing:
                    failing.add_endpoint("a", addresses=[peer.name])
                    await failing.get(timeout=5.0)  # and never given back
                    raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                await fail()
            assert failing.conductor.closed
            assert readers(loop) == before

    run(main())


@asyncio_only
def test_messages_are_for_whoever_asks(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        async with (
            peers(1) as (peer,),
            AsyncConnections(make, settings=ONE) as connections,
        ):
            connections.add_endpoint("a", addresses=[peer.name])
            waiting = [asyncio.create_task(connections.messages()) for _ in range(3)]
            async with connections.acquire(timeout=5.0) as connection:
                await asyncio.sleep(0)
                waiting[0].cancel()
                connection.send(b"echo")
                done, _ = await asyncio.wait(waiting[1:], return_when=asyncio.FIRST_COMPLETED)
                assert [one.payload for one in done.pop().result()] == [b"echo"]
        left = [one for one in waiting[1:] if not one.cancelled()]
        results = await asyncio.gather(*left, return_exceptions=True)
        assert sum(isinstance(one, PoolClosedError) for one in results) == 1
        assert connections._readers == set()

    run(main())


@asyncio_only
def test_a_cache_on_it(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        rules = CacheSettings(addresses=4, connections=2, idle_timeout=0.5)
        async with (
            peers(2) as (one, two),
            AsyncConnections(make, settings=rules.conductor()) as connections,
        ):
            cache = ConnectionCache(connections._now(), connections.conductor, rules)
            connections.also(cache)

            def send(name: tuple[str, int], payload: bytes) -> bool:
                taken = cache.send(connections._now(), name, payload)
                connections.wake()
                return taken

            await until(lambda: send(one.name, b"1"))
            await until(lambda: send(two.name, b"2"))
            await until(lambda: len(connections.conductor) == 4 and b"2" in two.got)
            # Nobody asks any more.
            await until(lambda: len(cache) == len(connections.conductor) == 0)
            assert connections.carrier.statistics().attached == 0

    run(main())


@asyncio_only
def test_an_address_that_is_none(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        async with AsyncConnections(make, settings=ONE) as connections:
            for number, address in enumerate(["host", ("localhost", 1), ("127.0.0.1", 0), ("::1",), 7]):
                connections.add_endpoint(number, addresses=[address])
            connections.warm_pool()
            await until(lambda: connections.conductor.factory_errors >= 5)
            assert len(connections.conductor) == 5
            connections.remove_endpoint(0)
            assert len(connections.conductor) == 4

    run(main())


@asyncio_only
def test_used_in_a_wrong_way(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        connections = AsyncConnections(make)
        assert "new" in repr(connections)
        with pytest.raises(UsageError, match="not open"):
            await connections.get()
        with pytest.raises(UsageError, match="not open"):
            await connections.messages()
        await connections.close()
        with pytest.raises(UsageError, match="no interface"):
            await AsyncConnections(make, interface="nothere0").open()
        async with AsyncConnections(make, interface="lo", ports=sockets(local=("127.0.0.1", 0))) as opened:
            with pytest.raises(UsageError, match="opened before"):
                await opened.open()
            async with peers(1) as (peer,):
                opened.add_endpoint("a", addresses=[peer.name])
                acquisition = opened.acquire(timeout=5.0)
                async with acquisition as one:
                    assert isinstance(one, Borrowed)
                    with pytest.raises(UsageError, match="in use"):
                        await acquisition.__aenter__()
                    # One socket, so one connection to each address.
                    with pytest.raises(PoolTimeoutError):
                        await opened.get(timeout=0.1)
                    assert "1 connections to one address" in opened.conductor.last_factory_error
                async with acquisition:
                    pass

    run(main())

# SPDX-License-Identifier: Apache-2.0
"""The pools of database drivers that `sluice bench connections` is measured beside, without a database.

Both are asked to lend and take back a connection while all are idle, as ours is.  Their connections are
stand-ins that do nothing: what is measured is the pool alone, as its users call it.

psycopg_pool    ``ConnectionPool.getconn`` and ``putconn``, with locks, as it is for threads
asyncpg         ``Pool.acquire`` and ``release``, in an event loop

They know no endpoints and no health: whoever is free is lent, the one that was used last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from xdp.errors import UnsupportedError

#: CPU seconds of so many calls, and nanoseconds of each of as many others.
Timed = tuple[float, list[int]]
#: Seconds for psycopg_pool's threads to make all connections.
_PATIENCE: Final = 60.0


def psycopg_pool(size: int, calls: int) -> Timed:
    """CPU seconds of so many loans, and nanoseconds of each of as many others.  Raises UnsupportedError."""
    try:
        from psycopg.pq import TransactionStatus
        from psycopg_pool import ConnectionPool
    except ImportError as error:
        raise UnsupportedError(f"psycopg_pool: {error}", hint="pip install 'sluice[bench]'") from None

    class Driver:
        transaction_status = TransactionStatus.IDLE

    class Connection:
        pgconn = Driver()
        closed = False
        _pool: Any = None

        @classmethod
        def connect(cls, _conninfo: str = "", **_options: Any) -> Connection:
            return cls()

        def close(self) -> None:
            self.closed = True

    pool: Any = ConnectionPool(
        "",
        connection_class=Connection,
        min_size=size,
        max_size=size,
        open=True,
    )
    try:
        pool.wait(_PATIENCE)
        getconn, putconn = pool.getconn, pool.putconn

        def loan() -> None:
            putconn(getconn())

        return timed(loan, calls, calls)
    finally:
        pool.close()


def asyncpg(size: int, calls: int) -> Timed:
    """As :func:`psycopg_pool`."""
    try:
        from asyncpg import create_pool
        from asyncpg.connection import Connection as Base
    except ImportError as error:
        raise UnsupportedError(f"asyncpg: {error}", hint="pip install 'sluice[bench]'") from None

    class Protocol:
        queries_count = 0

        def _is_cancelling(self) -> bool:
            return False

    class Connection(Base):  # type: ignore[misc]  # asyncpg's is not typed for that
        def __init__(self) -> None:
            self._protocol, self._proxy = Protocol(), None
            self._pool_release_ctr = 0
            self._listeners: dict[str, object] = {}
            self._log_listeners: set[object] = set()

        def is_closed(self) -> bool:
            return False

        async def reset(self, **_options: object) -> None:
            """There is no session."""

        def terminate(self) -> None:
            """There is no socket."""

        def __del__(self) -> None:
            """Nothing to warn of."""

    async def connect(*_arguments: Any, **_options: Any) -> Connection:
        return Connection()

    async def run() -> Timed:
        pool: Any = await create_pool(
            connect=connect, connection_class=Connection, min_size=size, max_size=size,
            max_inactive_connection_lifetime=0,
        )  # fmt: skip
        acquire, release = pool.acquire, pool.release
        start = time.process_time()
        for _ in range(calls):
            await release(await acquire())
        spent = time.process_time() - start
        each = []
        clock = time.perf_counter_ns
        for _ in range(calls):
            began = clock()
            await release(await acquire())
            each.append(clock() - began)
        pool.terminate()
        return spent, each

    return asyncio.run(run())


def timed(call: Callable[[], object], together: int, each: int) -> Timed:
    """CPU seconds of so many calls together, and nanoseconds of each of others, the clock's included."""
    start = time.process_time()
    for _ in range(together):
        call()
    spent = time.process_time() - start
    clock = time.perf_counter_ns
    times = []
    for _ in range(each):
        began = clock()
        call()
        times.append(clock() - began)
    return spent, times

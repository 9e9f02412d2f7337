# SPDX-License-Identifier: Apache-2.0
"""Settings for simulations of connections: small ones, larger ones, and any at all."""

from __future__ import annotations

from random import Random
from typing import Final

import msgspec

from userspace.connection.backoff import Backoff
from userspace.connection.conductor_settings import ConductorSettings
from userspace.connection.health_report import HealthSettings
from userspace.connection.outliers import OutlierSettings
from userspace.connection.pool_settings import PoolSettings

#: Delays of reconnection that a short run has room for.
SHORT: Final = Backoff(cap=4.0)


def settings(
    *, each: int = 1, size: int = 16, backoff: Backoff = SHORT, rate: float = 2000.0, burst: int = 100,
    pool: PoolSettings | None = None, health: HealthSettings | None = None,
) -> ConductorSettings:  # fmt: skip
    """Settings with ``each`` connections to an endpoint, at least."""
    return ConductorSettings(
        pool=pool or PoolSettings(min_size=0, max_size=size, min_per_endpoint=each, max_per_endpoint=size),
        health=health or HealthSettings(),
        backoff=backoff,
        attempt_rate=rate,
        attempt_burst=burst,
    )


def sized(found: ConductorSettings, scale: float) -> ConductorSettings:
    """For so many times as many endpoints."""
    pool = found.pool
    larger = msgspec.structs.replace(
        pool,
        max_size=max(1, round(pool.max_size * scale)),
        min_size=min(max(1, round(pool.max_size * scale)), round(pool.min_size * scale)),
    )
    return msgspec.structs.replace(found, pool=larger)


def anything(random: Random) -> ConductorSettings:
    """Settings that nobody would choose, but anybody may."""
    pick, draw = random.choice, random.uniform
    size = random.randint(2, 10)
    each = random.randint(1, 4)
    pool = PoolSettings(
        min_size=random.randint(0, size),
        max_size=size,
        min_per_endpoint=random.randint(0, min(each, size)),
        max_per_endpoint=each,
        max_waiting=pick((0, 1, 3, 100)),
        idle_timeout=pick((None, draw(0.5, 5.0))),
        max_lifetime=pick((None, draw(0.5, 5.0))),
        lifetime_jitter=draw(0.0, 0.5),
        leak_threshold=pick((None, draw(0.5, 2.0))),
        panic_threshold=draw(0.0, 1.0),
        outliers=OutlierSettings(
            consecutive=random.randint(1, 5), interval=draw(1.0, 5.0), base_time=draw(1.0, 5.0),
            maximum_time=5.0, share=draw(0.0, 1.0), endpoints=2, results=5,
        ),
    )  # fmt: skip
    return ConductorSettings(
        pool=pool,
        health=HealthSettings(jitter=draw(0.0, 0.5), dwell=draw(0.0, 5.0)),
        backoff=Backoff(
            attempts=random.randint(1, 5), initial=draw(0.01, 1.0), factor=draw(1.0, 3.0), cap=4.0
        ),
        attempt_rate=pick((5.0, 50.0, 2000.0)),
        attempt_burst=pick((1, 10, 100)),
        attempt_timeout=draw(0.5, 5.0),
        proof_time=draw(0.0, 5.0),
    )

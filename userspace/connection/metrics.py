# SPDX-License-Identifier: Apache-2.0
"""Figures of connections for Prometheus.

    collector = ConnectionCollector()
    prometheus_client.REGISTRY.register(collector)
    while True:
        ...
        collector.update(now, conductor)           # in the thread that drives the conductor

It needs the package ``prometheus-client``, which comes with the extra ``metrics``.  A scrape comes in another
thread: it gets what the last :meth:`~ConnectionCollector.update` saw and never touches a conductor.  An
update every ten seconds is enough for a scrape every fifteen; before the first there is nothing.

One collector is for all conductors of a process, each with a name, its ``pool``.  All other labels are words
of enums (states, causes, statuses), so a pool has some hundred series at most, whatever peers do.  No label
is an endpoint: `sluice connections` shows those.

``sluice_connections_latency_seconds`` is a gauge histogram: of each connection that is connected and was
measured, its highest round-trip time of late.  All else are gauges, and counters since the conductor was
made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from userspace.connection.grading import Status
from xdp.errors import UnsupportedError, UsageError
from xdp.told import checked_word

try:
    from prometheus_client.core import CounterMetricFamily, GaugeHistogramMetricFamily, GaugeMetricFamily
except ImportError:
    raise UnsupportedError(
        "prometheus-client is not installed", hint="pip install 'sluice[metrics]'"
    ) from None

if TYPE_CHECKING:
    from userspace.connection.conductor import Conductor
    from userspace.connection.conductor_settings import ConductorSnapshot

#: Conductors of one process: names are the one label that is the caller's.
POOLS_MAXIMUM: Final = 16
#: Seconds, upper bounds of the buckets: from a neighbour in the rack to the longest ways on Earth, and above.
BUCKETS: Final = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

_PREFIX: Final = "sluice_connections"
Family = GaugeMetricFamily | CounterMetricFamily | GaugeHistogramMetricFamily
#: Values by the words of their label.
Values = Mapping[str, float]


class _Seen(NamedTuple):
    """What an update has seen of a conductor."""

    snapshot: ConductorSnapshot
    max_size: int
    #: Connections in each bucket and above the last, and the sum of all.
    buckets: tuple[int, ...]
    total: float


class _Plain(NamedTuple):
    """A figure of a pool without further labels."""

    name: str
    about: str
    value: Callable[[_Seen], float]


class _Labelled(NamedTuple):
    """A figure of a pool by something else."""

    name: str
    about: str
    label: str
    values: Callable[[_Seen], Values]


def _phases(seen: _Seen) -> Values:
    pool = seen.snapshot.pool
    return {"in_use": pool.in_use, "idle": pool.idle, "opening": pool.opening, "closing": pool.closing}


def _health(seen: _Seen) -> Values:
    return {status.name.lower(): getattr(seen.snapshot.health, status.name.lower()) for status in Status}


def _waits(seen: _Seen) -> Values:
    pool = seen.snapshot.pool
    return {
        "granted": pool.granted,
        "timed_out": pool.timed_out,
        "cancelled": pool.cancelled,
        "refused": pool.refused,
    }


def _questions(seen: _Seen) -> Values:
    health = seen.snapshot.health
    return {
        "answered": health.answered,
        "late": health.late,
        "failed": health.failed,
        "withdrawn": health.withdrawn,
    }


def _messages(seen: _Seen) -> Values:
    told = seen.snapshot
    return {"sent": told.sent, "refused": told.refused, "received": told.received, "lost": told.lost}


_GAUGES: Final = (
    _Labelled("", "Connections by what they are to the pool.", "phase", _phases),
    _Labelled("_state", "Connections by state.", "state", lambda seen: seen.snapshot.states),
    _Labelled("_health", "Watched connections by health.", "status", _health),
    _Plain("_maximum", "Connections that there may be.", lambda seen: seen.max_size),
    _Plain("_waiters", "Callers that wait for a connection.", lambda seen: seen.snapshot.pool.waiting),
    _Plain("_endpoints", "Endpoints.", lambda seen: seen.snapshot.pool.endpoints),
    _Plain("_endpoints_well", "Endpoints that are well.", lambda seen: seen.snapshot.pool.well),
    _Plain("_endpoints_ejected", "Endpoints that are left out for doing worse than the others.",
           lambda seen: seen.snapshot.pool.ejected),
    _Plain("_endpoints_given_up", "Endpoints that are only probed: all attempts were in vain.",
           lambda seen: seen.snapshot.reconnection.given_up),
    _Plain("_panic", "1 while too few endpoints are well for health to count.",
           lambda seen: seen.snapshot.pool.panic),
    _Plain("_held", "Connections whose link is down.", lambda seen: seen.snapshot.health.held),
    _Plain("_suspects", "Connections that are asked often.", lambda seen: seen.snapshot.health.suspects),
    _Plain("_leaks_open", "Borrowers that hold a connection too long.",
           lambda seen: seen.snapshot.pool.leaks_open),
    _Plain("_loss_ratio", "Part of the last questions that was lost.",
           lambda seen: seen.snapshot.health.loss_rate),
)  # fmt: skip
_COUNTERS: Final = (
    _Plain("_acquired", "Connections that were borrowed.", lambda seen: seen.snapshot.pool.acquired),
    _Labelled("_waits", "Callers that waited, by what became of them.", "outcome", _waits),
    _Plain("_full", "Callers that could not even wait.", lambda seen: seen.snapshot.pool.full),
    _Plain("_missed", "Look-ups that found no connection.", lambda seen: seen.snapshot.pool.missed),
    _Plain("_attempts", "Attempts to connect.", lambda seen: seen.snapshot.attempts),
    _Plain("_opened", "Attempts that succeeded.", lambda seen: seen.snapshot.opened),
    _Labelled("_failures", "Attempts that failed.", "cause", lambda seen: seen.snapshot.failed),
    _Labelled("_ended", "Connections that ended.", "cause", lambda seen: seen.snapshot.ended),
    _Labelled("_closed", "Connections that the pool closed.", "cause",
              lambda seen: seen.snapshot.pool.closed),
    _Plain("_ejections", "Endpoints that were ejected.", lambda seen: seen.snapshot.pool.ejections),
    _Plain("_leaks", "Borrowers that held a connection too long.", lambda seen: seen.snapshot.pool.leaks),
    _Labelled("_questions", "Heartbeats and probes that are over.", "outcome", _questions),
    _Plain("_probes", "Questions to suspects.", lambda seen: seen.snapshot.health.probes),
    _Labelled("_health_changes", "Changes of health.", "change", lambda seen: seen.snapshot.health.changes),
    _Plain("_stalls", "Stalls of our own loop.", lambda seen: seen.snapshot.health.stalls),
    _Plain("_stalled_seconds", "Seconds of those.", lambda seen: seen.snapshot.health.stalled),
    _Plain("_restarts", "Peers that were started anew.", lambda seen: seen.snapshot.restarts),
    _Labelled("_messages", "Messages.", "what", _messages),
    _Labelled("_datagrams", "Datagrams.", "direction",
              lambda seen: {"out": seen.snapshot.datagrams_out, "in": seen.snapshot.datagrams_in}),
    _Labelled("_errors", "What the caller's own functions raised.", "where",
              lambda seen: {"factory": seen.snapshot.factory_errors,
                            "callback": seen.snapshot.callback_errors}),
)  # fmt: skip


class ConnectionCollector:
    """See the module.  A collector for a registry of prometheus_client."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        # Replaced as a whole, never changed: a scrape may go over it just now.
        self._seen: Mapping[str, _Seen] = {}

    def update(self, now: float, conductor: Conductor, pool: str = "default") -> None:
        """See what there is to tell now; goes over all connections.

        ``pool`` is the conductor's name: 1 to 32 letters, digits and any of ``_.+-``.  UsageError for another
        one, and for more than :data:`POOLS_MAXIMUM`.
        """
        checked_word("pool", pool)
        if pool not in self._seen and len(self._seen) >= POOLS_MAXIMUM:
            raise UsageError(f"{POOLS_MAXIMUM} pools have figures, no more can", hint="forget(pool)")
        counts = [0] * (len(BUCKETS) + 1)
        total = 0.0
        for link in conductor.links.values():
            latency = conductor.monitor.peak_latency(now, link.number) if link.live else 0.0
            if latency:  # else it was not measured
                counts[bisect_left(BUCKETS, latency)] += 1
                total += latency
        seen = _Seen(conductor.snapshot(), conductor.pool.settings.max_size, tuple(counts), total)
        self._seen = {**self._seen, pool: seen}

    def forget(self, pool: str = "default") -> None:
        """Tell nothing of it any more; no error if nothing was told."""
        self._seen = {name: seen for name, seen in self._seen.items() if name != pool}

    def describe(self) -> Iterator[Family]:
        """The families without samples: a registry refuses a second collector by their names."""
        return self._families({})

    def collect(self) -> Iterator[Family]:
        """What the last updates saw; in any thread."""
        return self._families(self._seen)

    @staticmethod
    def _families(pools: Mapping[str, _Seen]) -> Iterator[Family]:
        for kind, figures in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for figure in figures:
                labels = ["pool"] if isinstance(figure, _Plain) else ["pool", figure.label]
                family = kind(_PREFIX + figure.name, figure.about, labels=labels)
                for pool, seen in pools.items():
                    if isinstance(figure, _Plain):
                        family.add_metric([pool], float(figure.value(seen)))
                    else:
                        for word, value in figure.values(seen).items():
                            family.add_metric([pool, word], value)
                yield family
        yield _latency(pools)


def _latency(pools: Mapping[str, _Seen]) -> Family:
    """Buckets are cumulative, the last one is of all."""
    family = GaugeHistogramMetricFamily(
        f"{_PREFIX}_latency_seconds", "Highest round-trip times of late, of connections.", labels=["pool"]
    )
    for pool, seen in pools.items():
        below, buckets = 0, []
        for bound, count in zip([*map(str, BUCKETS), "+Inf"], seen.buckets, strict=True):
            below += count
            buckets.append((bound, float(below)))
        family.add_metric([pool], buckets, seen.total)
    return family

# SPDX-License-Identifier: Apache-2.0
"""What became of the packets of a batch manager: every one that was queued is in exactly one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from userspace.datagram.destination import Endpoint

#: Why a batch was made: ``batch_size`` packets waited, the oldest had waited ``batch_timeout``, somebody
#: asked for it, or it is time to see whether there is room again.
Reason: TypeAlias = Literal["size", "time", "demand", "retry"]

_REASONS: Final[tuple[Reason, ...]] = ("size", "time", "demand", "retry")
_MICROSECONDS: Final = 1e6  # in a second


@dataclass(frozen=True, slots=True)
class PacketFailure:
    """A packet that will not be sent: where to, why (errno), its priority and bytes of payload."""

    destination: Endpoint
    errno: int
    priority: int
    size: int


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Counters since the manager was made, in packets unless said otherwise.

    ``queued`` were accepted, ``refused`` were not (no buffer was free).  Of those queued, ``sent`` were
    accepted by the lanes, ``failed`` were given up (``failures`` has them by errno), ``expired`` found no
    room until they were too old, and ``waiting`` are still here.

    ``bytes`` is the payload that was sent.  ``attempts`` are batches that were given to the lanes, by
    reason, ``batches`` those of which something was sent, ``calls`` the send calls that they took.
    ``sizes[i]`` counts batches of which 2^i to 2^(i+1) - 1 packets were sent.  The delays are
    microseconds from queueing to sending, of the packets sent; 0 while there are none.
    """

    queued: int
    refused: int
    sent: int
    failed: int
    expired: int
    waiting: int
    bytes: int
    batches: int
    calls: int
    attempts: Mapping[Reason, int]
    failures: Mapping[int, int]
    sizes: tuple[int, ...]
    delay_minimum_us: float
    delay_mean_us: float
    delay_maximum_us: float

    @property
    def balanced(self) -> bool:
        """Whether every packet is in one place, and the parts make up the wholes, as it always must be."""
        return (
            self.queued == self.sent + self.failed + self.expired + self.waiting
            and self.failed == sum(self.failures.values())
            and self.batches == sum(self.sizes)
            and self.batches <= sum(self.attempts.values())
        )

    @property
    def packets_per_batch(self) -> float:
        """Mean packets of a batch; 0 before the first one."""
        return self.sent / self.batches if self.batches else 0.0


class BatchCounters:
    """The counters themselves; changed once per batch, but for ``queued`` and ``refused``."""

    __slots__ = (
        "_bytes",
        "_calls",
        "_delay_maximum",
        "_delay_minimum",
        "_delays",
        "attempts",
        "expired",
        "failures",
        "queued",
        "refused",
        "sent",
        "sizes",
    )

    def __init__(self, batch_size: int) -> None:
        self.queued = self.refused = self.sent = self.expired = 0
        self.failures: Counter[int] = Counter()
        self.attempts: dict[Reason, int] = dict.fromkeys(_REASONS, 0)
        self.sizes = [0] * batch_size.bit_length()
        self._bytes = self._calls = 0
        self._delays = self._delay_maximum = 0.0  # seconds
        self._delay_minimum = float("inf")

    def batch(
        self, reason: Reason, calls: int, now: float, times: Sequence[float], lengths: Sequence[int]
    ) -> None:
        """One was given to the lanes; when those that were sent had been queued, and their bytes."""
        self.attempts[reason] += 1
        self._calls += calls
        count = len(times)
        if not count:
            return
        self.sent += count
        self.sizes[count.bit_length() - 1] += 1
        self._bytes += sum(lengths)
        self._delays += now * count - sum(times)
        self._delay_minimum = min(self._delay_minimum, now - max(times))
        self._delay_maximum = max(self._delay_maximum, now - min(times))

    def snapshot(self, waiting: int) -> BatchStatistics:
        """All of them, with how many wait."""
        return BatchStatistics(
            queued=self.queued,
            refused=self.refused,
            sent=self.sent,
            failed=self.failures.total(),
            expired=self.expired,
            waiting=waiting,
            bytes=self._bytes,
            batches=sum(self.sizes),
            calls=self._calls,
            attempts=dict(self.attempts),
            failures=dict(self.failures),
            sizes=tuple(self.sizes),
            delay_minimum_us=self._delay_minimum * _MICROSECONDS if self.sent else 0.0,
            delay_mean_us=self._delays / self.sent * _MICROSECONDS if self.sent else 0.0,
            delay_maximum_us=self._delay_maximum * _MICROSECONDS,
        )

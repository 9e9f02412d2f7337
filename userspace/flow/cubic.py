# SPDX-License-Identifier: Apache-2.0
"""CUBIC (RFC 9438): NewReno whose window grows with time, by a cubic function, in congestion avoidance.

    congestion = Cubic(now, mtu)
    congestion.on_ack(now, ack)

After a reduction to 0.7 of the window, the window grows fast at first, slowly where the last loss was (W_max,
which it reaches after K seconds), and fast again beyond:

    W_cubic(t) = C * (t - K)**3 + W_max          K = cbrt((W_max - window) / C)        (packets, seconds)

So how fast it grows does not depend on the round-trip time.  Where NewReno would have the larger window
(W_est), it has that one (Reno-friendly region): on short paths and with small windows.

t is the time in which the window was used: while the program sends less than it might, and while nothing is
on its way, t stands still (RFC 9438, 4.2 and 5.8).  After an undone reduction it goes on from where it was.

Where RFC 9438 leaves a choice: reductions are of the window, not of what is on its way (the window does not
grow while it is not full, which 4.6 asks for then); fast convergence is on (4.7); the window is at least two
packets, also after marks (RFC 9002, 7.2); it follows W_est upwards only.

All else, slow start, recovery, marks and undoing, is that of :mod:`~userspace.flow.newreno`.  Inside, sizes
are bytes; the RFC's are packets: C is per packet, so that it is multiplied by the bytes of one.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from userspace.flow.congestion import MAX_DATAGRAM_SIZE, Ack
from userspace.flow.limits import WINDOW_MAXIMUM
from userspace.flow.newreno import Before, NewReno

#: Packets a cubic second (RFC 9438, 5.1): how fast the window grows away from W_max.
C: Final = 0.4
#: What a reduction leaves of the window (beta_cubic, RFC 9438, 4.6).
BETA: Final = 0.7
#: Packets a round by which W_est grows: with this it has, at BETA, the average window of NewReno (4.3).
ALPHA: Final = 3 * (1 - BETA) / (1 + BETA)
#: What fast convergence leaves of W_max (4.7).
FAST_CONVERGENCE: Final = (1 + BETA) / 2
#: The window grows at most towards so many times itself within a round-trip time (4.2).
GROWTH_MAXIMUM: Final = 1.5


class _Curve(NamedTuple):
    """What a reduction changed besides: bytes, seconds."""

    age: float | None
    k: float
    w_max: float
    w_est: float
    prior: int
    fraction: float


class Cubic(NewReno):
    """CUBIC, for one path; arguments and errors as NewReno's."""

    __slots__ = ("_curve", "_epoch", "_fraction", "_k", "_prior", "_scale", "_seen", "_w_est", "_w_max")

    name: str = "cubic"
    beta: float = BETA

    def __init__(
        self, now: float, mtu: int = MAX_DATAGRAM_SIZE, seed: int = 0, *, hystart: bool = True
    ) -> None:
        super().__init__(now, mtu, seed, hystart=hystart)
        self._scale = C * mtu  # bytes a cubic second
        #: When t was 0; None: avoidance has not begun since the last reduction.
        self._epoch: float | None = None
        self._seen = now  # until when t is right
        self._k = 0.0  # seconds
        self._w_max = 0.0  # bytes; 0.0: none
        self._w_est = 0.0  # bytes
        self._prior = 0  # bytes: the window before the last reduction, cwnd_prior
        self._fraction = 0.0  # of a byte that the window is larger
        self._curve: _Curve | None = None  # as _before

    # --- growth

    def on_sent(self, now: float, size: int, in_flight: int, *, app_limited: bool) -> None:  # noqa: ARG002
        """The first after nothing was on its way: that time does not count."""
        if in_flight <= size and self._epoch is not None:
            self._stand_still(now)

    def on_ack(self, now: float, ack: Ack) -> None:
        """Grow, if the window was full, as slow start or the cubic function says (RFC 9438, 4.2 to 4.5)."""
        if ack.largest_sent_at <= self._recovery_start:
            return
        if not self._was_full(ack):
            self._stand_still(now)
            return
        ssthresh = self.ssthresh
        acked = ack.bytes if ssthresh is not None and self.window >= ssthresh else self._slow_start(ack)
        if not acked:
            return
        window = self.window
        epoch = self._epoch
        if epoch is None:
            self._begin(now)
            epoch = now
        self._seen = now
        share = acked / window if acked < window else 1.0

        w_est = self._w_est
        w_est += share * (self._mtu if w_est >= self._prior else ALPHA * self._mtu)
        self._w_est = w_est
        since = now - epoch - self._k
        scale, w_max = self._scale, self._w_max
        exact = window + self._fraction
        # Products: a power of a float that is too large raises, these are infinite then, and bounded below.
        if scale * since * since * since + w_max < w_est:
            exact = max(exact, w_est)
        else:
            since += ack.smoothed_rtt
            target = scale * since * since * since + w_max
            if target > exact:
                exact += (min(target, GROWTH_MAXIMUM * window) - exact) * share
        exact = min(exact, WINDOW_MAXIMUM)
        self.window = window = int(exact)
        self._fraction = exact - window

    def _begin(self, now: float) -> None:
        """Avoidance begins, or begins again, with this window."""
        window = self.window
        self._epoch = now
        self._fraction = 0.0
        self._w_est = float(window)
        if self._w_max > window:
            self._k = math.cbrt((self._w_max - window) / self._scale)
        else:
            # No loss yet, after persistent congestion, or the least window is above what was reached.
            self._k = 0.0
            self._w_max = float(window)

    def _stand_still(self, now: float) -> None:
        """The time since the window was last seen in use is not of the epoch."""
        if self._epoch is not None and now > self._seen:
            self._epoch += now - self._seen
            self._seen = now

    # --- reduction

    def _reduce(self, now: float) -> None:
        window = self.window
        age = None if self._epoch is None else self._seen - self._epoch
        self._curve = _Curve(age, self._k, self._w_max, self._w_est, self._prior, self._fraction)
        self._w_max = window * FAST_CONVERGENCE if window < self._w_max else float(window)
        self._prior = window
        self._epoch = None
        super()._reduce(now)

    def on_persistent(self, now: float) -> None:
        """The least window; avoidance begins without a W_max then (RFC 9438, 4.8)."""
        super().on_persistent(now)
        self._epoch = None
        self._w_max = 0.0

    def _restore(self, now: float, before: Before) -> None:
        super()._restore(now, before)
        curve = self._curve
        assert curve is not None  # made by the same reduction
        age, self._k, self._w_max, self._w_est, self._prior, self._fraction = curve
        self._epoch = None if age is None else now - age
        self._seen = now

    # --- the path

    def on_mtu(self, mtu: int) -> None:
        """As NewReno; avoidance begins again with the window that is."""
        super().on_mtu(mtu)
        self._scale = C * mtu
        self._epoch = None

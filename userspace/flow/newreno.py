# SPDX-License-Identifier: Apache-2.0
"""NewReno as RFC 9002 has it (section 7, appendix B), and what every controller with a loss window needs.

    congestion = NewReno(now, mtu)
    congestion.on_ack(now, ack)       # window grows
    congestion.on_loss(now, loss)     # window falls, once a round
    congestion.window

================  ========================================================================================
slow start        The window grows by what is acknowledged, until the first loss or mark; HyStart++ leaves it
                  earlier, when the round-trip time rises (:mod:`~userspace.flow.hystart`).
avoidance         One full packet more for every window that is acknowledged, counted in bytes (RFC 3465), so
                  that how often the peer acknowledges makes no difference.
a loss or mark    The window is multiplied by beta.  What was sent before that is of the same congestion: its
                  loss reduces nothing more, its acknowledgement lets nothing grow (7.3.2).
window not full   It does not grow (7.8): what it would allow was not tried.
spurious          All that was lost has arrived: back to the state before the last reduction, unless a mark
                  said so too, something reduced since, or the window is as large again.
persistent        The least, and slow start up to the last threshold (7.6.2).
================  ========================================================================================

What one acknowledgement covers counts as sent when its newest packet was.  An acknowledgement across the
beginning of a recovery period so counts as after it.

The window is never below two packets nor above WINDOW_MAXIMUM, whatever comes in.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from userspace.flow.congestion import MAX_DATAGRAM_SIZE, Ack, Loss, initial_window, minimum_window
from userspace.flow.hystart import HyStart
from userspace.flow.limits import WINDOW_MAXIMUM, checked_mtu

_LONG_AGO: Final = -math.inf


class Before(NamedTuple):
    """What a reduction changed."""

    window: int
    ssthresh: int | None
    counted: int
    recovery_start: float
    hystart: HyStart | None


class NewReno:
    """The congestion controller of RFC 9002, for one path.

    ``mtu`` is the bytes of a full packet.  ``hystart`` turns HyStart++ on.  ``now`` and ``seed`` are there
    because every controller gets them: this one begins without a time and draws nothing.
    Raises UsageError for an mtu that UDP can't carry.
    """

    __slots__ = (
        "_before", "_counted", "_hystart", "_mtu", "_recovery_start", "ssthresh", "window",
    )  # fmt: skip

    name: str = "newreno"
    #: None: the pacer computes it from the window (RFC 9002, 7.7).
    pacing_rate: float | None = None
    every_packet: bool = False
    #: What a reduction leaves of the window (kLossReductionFactor, RFC 9002, B.1).
    beta: float = 0.5

    def __init__(
        self,
        now: float,  # noqa: ARG002 - the signature of CongestionFactory
        mtu: int = MAX_DATAGRAM_SIZE,
        seed: int = 0,  # noqa: ARG002
        *,
        hystart: bool = True,
    ) -> None:
        self._mtu = checked_mtu(mtu)
        self.window: int = initial_window(mtu)
        self.ssthresh: int | None = None
        self._counted = 0  # bytes acknowledged in avoidance that no packet was added for yet
        #: What was sent until then is of the last reduction (congestion_recovery_start_time).
        self._recovery_start = _LONG_AGO
        self._hystart = HyStart() if hystart else None  # None: off, or over
        self._before: Before | None = None  # what can be undone

    def __repr__(self) -> str:
        return f"<{type(self).__name__} window={self.window} ssthresh={self.ssthresh}>"

    # --- growth

    def on_sent(self, now: float, size: int, in_flight: int, *, app_limited: bool) -> None:
        """Nothing to do."""

    def on_ack(self, now: float, ack: Ack) -> None:  # noqa: ARG002 - the same for all
        """Grow, if the window was full (RFC 9002, B.5)."""
        if ack.largest_sent_at <= self._recovery_start or not self._was_full(ack):
            return
        ssthresh = self.ssthresh
        acked = ack.bytes if ssthresh is not None and self.window >= ssthresh else self._slow_start(ack)
        counted = self._counted + acked
        window = self.window
        if counted >= window:
            self.window = min(window + self._mtu, WINDOW_MAXIMUM)
            # One acknowledgement is for a window at most; what is more never lets it grow twice at once.
            counted = min(counted - window, window)
        self._counted = counted

    def _was_full(self, ack: Ack) -> bool:
        """Whether the window, and not the program, limited what was on its way (RFC 9002, 7.8).

        When the program had nothing more to send: only if no full packet would have fitted.  Else the pacer
        may have held packets back, which does not make the window unused; but then the window is at most
        twice what was really on its way, whatever held it back (a limit of the rate, say).
        """
        in_flight, window = ack.prior_in_flight, self.window
        return window - in_flight < self._mtu or (not ack.app_limited and 2 * in_flight > window)

    def _slow_start(self, ack: Ack) -> int:
        """Grow by what is acknowledged, up to ssthresh; bytes left over for avoidance."""
        divisor = 1
        if self._hystart is not None:
            divisor = self._hystart.on_ack(ack)
            if not divisor:
                self._hystart = None
                self.ssthresh = self.window
                return ack.bytes
        acked, ssthresh = ack.bytes, self.ssthresh
        if ssthresh is None:
            self.window = min(self.window + acked // divisor, WINDOW_MAXIMUM)
            return 0
        # As if packets of the same length came one by one: the one that reaches ssthresh counts whole.
        size = max(1, acked // max(1, ack.packets))
        used = min(acked, -((self.window - ssthresh) // size) * size)
        self.window = min(self.window + used, WINDOW_MAXIMUM)
        return acked - used

    # --- reduction

    def on_loss(self, now: float, loss: Loss) -> None:
        """Reduce the window, unless it was for packets of that time (RFC 9002, B.6)."""
        if loss.largest_sent_at > self._recovery_start:
            self._reduce(now)

    def on_ecn(self, now: float, marked: int, largest_sent_at: float) -> None:
        """As a loss (RFC 9002, 7.1), but one that can't prove spurious."""
        if marked > 0:
            if largest_sent_at > self._recovery_start:
                self._reduce(now)
            self._before = None

    def on_persistent(self, now: float) -> None:  # noqa: ARG002
        """The least window, and slow start from there; what comes next may reduce again (RFC 9002, B.8)."""
        if self.ssthresh is None:
            self.ssthresh = self._reduced()
        self.window = minimum_window(self._mtu)
        self._recovery_start = _LONG_AGO
        self._hystart = self._before = None
        self._counted = 0

    def _reduced(self) -> int:
        return max(int(self.window * self.beta), minimum_window(self._mtu))

    def _reduce(self, now: float) -> None:
        self._before = Before(self.window, self.ssthresh, self._counted, self._recovery_start, self._hystart)
        self._recovery_start = now
        self.window = self.ssthresh = self._reduced()
        self._counted = 0
        self._hystart = None

    def on_spurious(self, now: float) -> None:
        """Undo the last reduction; nothing, if there is none to undo or the window is as large again."""
        before, self._before = self._before, None
        if before is not None and self.window < before.window:
            self._restore(now, before)

    def _restore(self, now: float, before: Before) -> None:  # noqa: ARG002 - for who has more to restore
        self.window, self.ssthresh, self._counted, self._recovery_start, self._hystart = before

    # --- the path

    def on_mtu(self, mtu: int) -> None:
        """Full packets have another size; a window that never changed is the initial one again (7.2).

        Raises UsageError for a size that UDP can't carry.
        """
        untouched = self.ssthresh is None and self.window == initial_window(self._mtu)
        self._mtu = checked_mtu(mtu)
        least = minimum_window(mtu)
        self.window = initial_window(mtu) if untouched else max(self.window, least)
        if self.ssthresh is not None:
            self.ssthresh = max(self.ssthresh, least)
        self._before = None  # it may be less than the least

# SPDX-License-Identifier: Apache-2.0
"""A congestion controller that decides nothing and writes down what it is told."""

from __future__ import annotations

from userspace.flow.congestion import Ack, Loss

ACK_FIELDS = Ack.__slots__
LOSS_FIELDS = Loss.__slots__


class Recorder:
    """A window of a fixed size; ``calls`` has (what, when, copies of the numbers)."""

    name = "recorder"
    every_packet = True

    def __init__(self, now: float = 0.0, mtu: int = 1200, seed: int = 0) -> None:
        self.window = 1 << 30
        self.pacing_rate: float | None = None
        self.ssthresh: int | None = None
        self.calls: list[tuple[str, float, dict[str, float]]] = []
        self.mtu = mtu

    def on_sent(self, now: float, size: int, in_flight: int, *, app_limited: bool) -> None:
        self._write("sent", now, size=size, in_flight=in_flight, app_limited=app_limited)

    def on_ack(self, now: float, ack: Ack) -> None:
        self._write("ack", now, **{name: getattr(ack, name) for name in ACK_FIELDS})

    def on_loss(self, now: float, loss: Loss) -> None:
        self._write("loss", now, **{name: getattr(loss, name) for name in LOSS_FIELDS})

    def on_ecn(self, now: float, marked: int, largest_sent_at: float) -> None:
        self._write("ecn", now, marked=marked, largest_sent_at=largest_sent_at)

    def on_spurious(self, now: float) -> None:
        self._write("spurious", now)

    def on_persistent(self, now: float) -> None:
        self._write("persistent", now)

    def on_mtu(self, mtu: int) -> None:
        self.mtu = mtu

    def _write(self, what: str, now: float, **numbers: float) -> None:
        self.calls.append((what, now, numbers))

    def take(self) -> list[str]:
        """What was called since the last time, without on_sent."""
        called = [what for what, _, _ in self.calls if what != "sent"]
        self.calls.clear()
        return called

    def last(self, what: str) -> dict[str, float]:
        """The numbers of the latest such call."""
        return next(numbers for name, _, numbers in reversed(self.calls) if name == what)

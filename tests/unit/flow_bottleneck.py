# SPDX-License-Identifier: Apache-2.0
"""One queue in front of one link, and senders that fill it, in virtual time: just enough to try a controller.

A queue in order of arrival at a fixed rate needs no events: when a packet comes, it is known when it will
leave.  So there is an event for a burst that is sent and for an acknowledgement of two packets, and 100 Mb/s
for 10 s take about a second.  A change of the rate is for packets that come after it.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable

from userspace.flow.congestion import Ack, Congestion, CongestionFactory, Loss

MTU = 1200  # bytes
SLACK = 0.0005  # seconds: what is due within them leaves as one burst
PERSISTENT = 3  # probe timeouts of losses (RFC 9002, 7.6.1)


class Packet:
    """On its way."""

    __slots__ = ("app_limited", "delivered", "delivered_at", "first_sent_at", "lost", "marked", "sent_at")

    def __init__(self, sent_at: float, flow: Flow, *, app_limited: bool) -> None:
        self.sent_at, self.app_limited = sent_at, app_limited
        self.delivered, self.delivered_at = flow.delivered, flow.delivered_at
        self.first_sent_at = flow.first_sent_at
        self.lost = self.marked = False


class CoDel:
    """RFC 8289, 5: whether to drop what leaves now."""

    def __init__(self, target: float = 0.005, interval: float = 0.1) -> None:
        self.target, self.interval = target, interval
        self.first_above = self.drop_next = 0.0
        self.count = self.last_count = 0
        self.dropping = False

    def drop(self, now: float, sojourn: float, backlog: float) -> bool:
        if sojourn < self.target or backlog <= MTU:
            self.first_above, self.dropping = 0.0, False
            return False
        if not self.first_above:
            self.first_above = now + self.interval
            return False
        if now < self.first_above:
            return False
        if self.dropping:
            if now < self.drop_next:
                return False
            self.count += 1
            self.drop_next += self.interval / math.sqrt(self.count)
            return True
        self.dropping = True
        recent = self.count - self.last_count if now - self.drop_next < 16 * self.interval else 0
        self.count = self.last_count = max(1, recent)
        self.drop_next = now + self.interval / math.sqrt(self.count)
        return True


class Bottleneck:
    """A link of ``rate`` bytes/s with a queue of ``limit`` bytes; round trips take ``rtt`` seconds and it."""

    def __init__(
        self, rate: float, rtt: float, limit: float, *, loss: float = 0.0, codel: CoDel | None = None,
        ecn: bool = False, jitter: float = 0.0, seed: int = 1,
    ) -> None:  # fmt: skip
        self.rate, self.rtt, self.limit, self.loss, self.codel, self.ecn = rate, rtt, limit, loss, codel, ecn
        self.jitter = jitter  # seconds that an acknowledgement takes longer, at most; their order is kept
        self.random = random.Random(seed)
        self.up = True
        self.busy_until = self.now = 0.0
        self.delays: list[tuple[float, float]] = []  # (when, seconds queued)
        self.flows: list[Flow] = []
        self._events: list[tuple[float, int, Callable[..., None], Packet | None]] = []
        self._count = self.dropped = 0

    def at(self, when: float, action: Callable[..., None], packet: Packet | None = None) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, action, packet))

    def run(self, until: float) -> None:
        events = self._events
        while events and events[0][0] <= until:
            self.now, _, action, packet = heapq.heappop(events)
            action(self.now, packet)
        self.now = until

    def pass_on(self, now: float, packet: Packet) -> float | None:
        """When the packet has left the link; None: it is lost."""
        start = max(now, self.busy_until)
        backlog = (start - now) * self.rate
        if not self.up or backlog > self.limit or (self.loss and self.random.random() < self.loss):
            self.dropped += 1
            return None
        if self.codel is not None and self.codel.drop(start, start - now, backlog):
            if not self.ecn:
                self.dropped += 1
                return None
            packet.marked = True
        self._count += 1
        if not self._count & 3:
            self.delays.append((now, start - now))
        self.busy_until = start + MTU / self.rate
        return self.busy_until

    def queued(self, share: float, since: float = 0.0) -> float:
        """So much of the packets since then waited no longer than this, seconds."""
        delays = sorted(delay for when, delay in self.delays if when >= since)
        return delays[int(share * (len(delays) - 1))]


class Flow:
    """A sender with a controller, and its receiver, who acknowledges every second packet."""

    def __init__(
        self, link: Bottleneck, make: CongestionFactory, seed: int, *, start: float = 0.0,
        app_rate: float | None = None,
    ) -> None:  # fmt: skip
        self.link, self.app_rate = link, app_rate
        self.control: Congestion = make(start, MTU, seed)
        self.sent: deque[Packet] = deque()
        self.ack, self.loss = Ack(), Loss()
        self.delivered = self.lost = self.in_flight = self.unacknowledged = self.backoff = self.persistent = 0
        self.delivered_at = self.first_sent_at = self.next_send = self.next_app = start
        self.srtt, self.var, self.min_rtt = 0.0, 0.0, float("inf")
        self.waking = False
        self.heard = self.last_ack = start
        self.watch: Callable[[float, Flow], None] = lambda now, flow: None
        link.flows.append(self)
        link.at(start, self.wake)

    def timeout(self) -> float:
        return (self.srtt + max(4 * self.var, 0.001) + 0.025 if self.srtt else 1.0) * (1 << self.backoff)

    def wake(self, now: float, _: Packet | None = None) -> None:
        self.waking = False
        self.fill(now)

    def fill(self, now: float) -> None:
        control = self.control
        while self.in_flight + MTU <= control.window:
            due = self.next_send
            if self.app_rate is not None:
                due = max(due, self.next_app)
            if due > now + SLACK:
                if not self.waking:
                    self.waking = True
                    self.link.at(due, self.wake)
                return
            rate = control.pacing_rate or (1.25 * control.window / self.srtt if self.srtt else 1e9)
            self.next_send = max(self.next_send, now) + MTU / rate
            self.send(now)

    def send(self, now: float) -> None:
        limited = False
        if self.app_rate is not None:
            limited = self.next_send < self.next_app + MTU / self.app_rate
            self.next_app = max(self.next_app, now - 0.01) + MTU / self.app_rate
        if not self.sent:
            self.first_sent_at = self.delivered_at = self.heard = now
            self.link.at(now + self.timeout(), self.probe)
        packet = Packet(now, self, app_limited=limited)
        self.sent.append(packet)
        self.in_flight += MTU
        self.control.on_sent(now, MTU, self.in_flight, app_limited=limited)
        left = self.link.pass_on(now, packet)
        if left is None:
            packet.lost = True
            return
        self.unacknowledged += 1
        if self.unacknowledged >= 2 or self.in_flight <= 4 * MTU:
            self.unacknowledged = 0
            jitter = self.link.jitter and self.link.jitter * self.link.random.random()
            self.last_ack = max(self.last_ack, left + self.link.rtt + jitter)
            self.link.at(self.last_ack, self.acknowledged, packet)

    def probe(self, now: float, _: Packet | None) -> None:
        """Nothing was heard of for long: one packet, beyond the window."""
        if not self.sent:
            return
        if now >= self.heard + self.timeout() - 1e-9:
            self.backoff = min(self.backoff + 1, 5)
            self.heard = now
            self.unacknowledged = 2
            self.send(now)
        self.link.at(self.heard + self.timeout(), self.probe)

    def acknowledged(self, now: float, newest: Packet | None) -> None:
        sent, ack, loss = self.sent, self.ack, self.loss
        assert newest is not None
        prior, self.heard, self.backoff = self.in_flight, now, 0
        acked = lost = marked = 0
        first_lost = 0.0
        while True:
            packet = sent.popleft()
            if packet.lost:
                first_lost = first_lost or packet.sent_at
                loss.largest_sent_at = packet.sent_at
                lost += 1
            else:
                acked += 1
                marked += packet.marked
            if packet is newest:
                break
        self.in_flight -= (acked + lost) * MTU
        self.delivered += acked * MTU
        self.delivered_at, self.first_sent_at = now, newest.sent_at
        ack.rtt = rtt = now - newest.sent_at
        self.min_rtt = min(self.min_rtt, rtt)
        if lost:
            self.lost += lost
            loss.packets, loss.bytes = lost, lost * MTU
            loss.prior_in_flight, loss.in_flight = prior, prior - loss.bytes
            self.control.on_loss(now, loss)
            self.backoff = 0
            if self.srtt and loss.largest_sent_at - first_lost > PERSISTENT * self.timeout():
                self.persistent += 1
                self.control.on_persistent(now)
        self.var += (abs(self.srtt - rtt) - self.var) / 4 if self.srtt else rtt / 2
        self.srtt += (rtt - self.srtt) / 8 if self.srtt else rtt
        if marked:
            self.control.on_ecn(now, marked, newest.sent_at)
        interval = max(newest.sent_at - newest.first_sent_at, now - newest.delivered_at)
        ack.bytes, ack.packets, ack.largest_sent_at = acked * MTU, acked, newest.sent_at
        ack.smoothed_rtt, ack.min_rtt = self.srtt, self.min_rtt
        ack.prior_in_flight, ack.in_flight = prior, self.in_flight
        ack.delivered, ack.prior_delivered = self.delivered, newest.delivered
        ack.delivery_rate = (self.delivered - newest.delivered) / interval if interval > 0 else 0.0
        ack.app_limited = newest.app_limited
        self.control.on_ack(now, ack)
        self.watch(now, self)
        self.fill(now)


def change_rate(link: Bottleneck, when: float, rate: float) -> None:
    """From then on; 0: all is lost."""

    def change(now: float, _: Packet | None) -> None:
        link.up, link.rate = rate > 0, rate or link.rate

    link.at(when, change)


def jain(values: list[int]) -> float:
    """Jain's index: 1 when all have the same, 1/n when one has all."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))

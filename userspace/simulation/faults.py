# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on a wire: loss, single or in bursts, outages, duplicates, damage, jitter, overtaking.

A link (:mod:`userspace.simulation.link`) asks :class:`Faults` about every packet that leaves its queue.
Chance comes from a random.Random that is handed in.
"""

from __future__ import annotations

from random import Random
from typing import Final, Protocol

from xdp.errors import UsageError

#: Seconds that jitter and overtaking may add: more would be an outage.
MAX_EXTRA: Final = 60.0


def probability(name: str, value: float) -> float:
    """Checked: 0 to 1.  Raises UsageError."""
    if type(value) not in {int, float} or not 0 <= value <= 1:
        raise UsageError(f"{name} is a probability, 0 to 1, not {value!r}")
    return float(value)


def _seconds(name: str, value: float) -> float:
    if type(value) not in {int, float} or not 0 <= value <= MAX_EXTRA:
        raise UsageError(f"{name} is 0 to {MAX_EXTRA:g} seconds, not {value!r}")
    return float(value)


class Loss(Protocol):
    """Decides packet by packet, in the order in which they are sent."""

    #: What lost packets are counted under.
    reason: str

    def lost(self, now: float, random: Random) -> bool:
        """Whether the packet that is sent now is lost."""


class RandomLoss:
    """Each packet with the same probability, whatever happened to those before."""

    __slots__ = ("rate", "reason")

    def __init__(self, rate: float) -> None:
        self.rate = probability("loss rate", rate)
        self.reason = "random"

    def lost(self, now: float, random: Random) -> bool:  # noqa: ARG002
        """Whether this one is."""
        return random.random() < self.rate


class BurstLoss:
    """Two states (Gilbert 1960, Elliott 1963): a good one, and a bad one in which much is lost.

    ``enter`` and ``leave`` are probabilities per packet to get into the bad state and out of it.  A burst
    is 1 / leave packets long on the average, and the share of time in the bad state is
    enter / (enter + leave): :attr:`mean` is the loss rate that comes of it.
    """

    __slots__ = ("bad", "enter", "leave", "loss_bad", "loss_good", "reason")

    def __init__(self, enter: float, leave: float, *, loss_bad: float = 1.0, loss_good: float = 0.0) -> None:
        self.enter, self.leave = probability("enter", enter), probability("leave", leave)
        self.loss_bad, self.loss_good = probability("loss_bad", loss_bad), probability("loss_good", loss_good)
        if self.leave == 0:
            raise UsageError("leave is above 0, or the first burst never ends", hint="an Outage ends by time")
        self.bad = False
        self.reason = "burst"

    @property
    def mean(self) -> float:
        """Share of packets that are lost in the long run."""
        share = self.enter / (self.enter + self.leave)
        return share * self.loss_bad + (1 - share) * self.loss_good

    def lost(self, now: float, random: Random) -> bool:  # noqa: ARG002
        """Whether this one is; the state changes after it."""
        draw = random.random
        lost = draw() < (self.loss_bad if self.bad else self.loss_good)
        if draw() < (self.leave if self.bad else self.enter):
            self.bad = not self.bad
        return lost


class Outage:
    """All is lost from ``begin`` until ``end``, and nothing says so: a blackhole that comes back."""

    __slots__ = ("begin", "end", "reason")

    def __init__(self, begin: float, end: float) -> None:
        if not 0 <= begin <= end:
            raise UsageError(f"an outage begins at 0 or later and ends after that, not {begin!r} to {end!r}")
        self.begin, self.end = begin, end
        self.reason = "outage"

    def lost(self, now: float, random: Random) -> bool:  # noqa: ARG002
        """Whether this one is."""
        return self.begin <= now < self.end


class Faults:
    """All that a link does to packets besides delaying them by the same time.

    ``jitter``: seconds; each packet takes up to that much longer, evenly distributed, but none overtakes
    another.  ``reorder``: the probability that a packet is held back for ``reorder_delay`` seconds, while
    those behind it pass.
    """

    __slots__ = ("corrupt", "duplicate", "jitter", "losses", "random", "reorder", "reorder_delay")

    def __init__(
        self,
        random: Random,
        *,
        losses: tuple[Loss, ...] = (),
        duplicate: float = 0.0,
        corrupt: float = 0.0,
        jitter: float = 0.0,
        reorder: float = 0.0,
        reorder_delay: float = 0.0,
    ) -> None:
        self.random, self.losses = random, losses
        self.duplicate, self.corrupt = probability("duplicate", duplicate), probability("corrupt", corrupt)
        self.jitter, self.reorder = _seconds("jitter", jitter), probability("reorder", reorder)
        self.reorder_delay = _seconds("reorder_delay", reorder_delay)

    def lost(self, now: float) -> str:
        """Why the packet that is sent now is lost; "" when it is not.

        Every model sees every packet: what one of them loses still moves the others' states.
        """
        reason = ""
        for loss in self.losses:
            if loss.lost(now, self.random):
                reason = reason or loss.reason
        return reason

    def happens(self, chance: float) -> bool:
        """One draw; none where there is no chance, so that what is off costs nothing."""
        return chance > 0 and self.random.random() < chance

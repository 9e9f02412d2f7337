# SPDX-License-Identifier: Apache-2.0
"""The networks that congestion controllers are tried on, each with what it has to come to.

After RFC 7928 (queues), RFC 8867 (interactive media) and RFC 9743 (new controllers); each scenario names what
it is after.  The usual link carries 100 Mb/s with a round trip of 40 ms, and drops what its queue of one
bandwidth-delay product has no room for.  ``sluice simulate flow`` runs them.

Times within a scenario are parts of its length, so that a shorter run is the same in small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from userspace.simulation.disciplines import CoDelQueue, FairQueue, PriorityQueue, TailDrop
from userspace.simulation.faults import BurstLoss, Faults, Outage, RandomLoss
from userspace.simulation.link import Link
from userspace.simulation.network import Network
from xdp.errors import UsageError

#: The controller that runs when no other is named, and that the thresholds are for.
DEFAULT_CONTROLLER: Final = "cubic"

RATE: Final = 12.5e6  # bytes/s: 100 Mb/s
DELAY: Final = 0.02  # seconds one way: a round trip of 40 ms
BDP: Final = round(RATE * 2 * DELAY)  # bytes
#: Seconds, two packets of the usual link: without it flows that send in step always lose, or never do, as
#: long as that lasts (Floyd and Jacobson, "On traffic phase effects in packet-switched gateways", 1992).
HOST_JITTER: Final = 0.0002
#: Packets that a queue which is managed may hold: CoDel's decision comes long before.
MANAGED_LIMIT: Final = 2_000

Build = Callable[[Network, tuple[str, ...]], None]


@dataclass(frozen=True, slots=True)
class Threshold:
    """What a figure has to be at least or at most; ``controllers``: of these only, empty: of the default.

    ``figure`` is a key of the report's figures, or "flow.figure" for one of a flow.
    """

    figure: str
    at_least: float | None = None
    at_most: float | None = None
    controllers: tuple[str, ...] = ()

    def holds_for(self, controllers: tuple[str, ...]) -> bool:
        """Whether it is to be judged in a run with these."""
        wanted = self.controllers or (DEFAULT_CONTROLLER,)
        return all(name in wanted for name in controllers)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A network, and what it has to come to."""

    name: str
    about: str
    after: str  # the document that describes such a test
    build: Build
    seconds: float = 30.0
    #: Part of the time after which figures count: slow start and the first round of a controller are over.
    warm_up: float = 1 / 5
    #: Part of the time of the last change, from which on the time to settle is counted.
    change: float = 0.0
    thresholds: tuple[Threshold, ...] = field(default=())
    #: It is about these, whatever others are asked for; () when it needs none.
    controllers: tuple[str, ...] | None = None


def controllers_of(one: Scenario, asked: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Of each run: the scenario's own, those that were asked for, or those that its thresholds are for."""
    if one.controllers is not None:
        return [one.controllers]
    if asked:
        return [(name,) for name in asked]
    default = (DEFAULT_CONTROLLER,)
    if any(threshold.holds_for(default) for threshold in one.thresholds):
        return [default]
    return [(name,) for name in one.thresholds[0].controllers] if one.thresholds else [default]


def _tail_drop(size: float = BDP) -> TailDrop:
    return TailDrop(limit_bytes=round(size))


def _one(network: Network, link: Link, controller: str, *, ect: bool = False, back: float = DELAY) -> None:
    network.flow(controller, (link,), controller=controller, back=back, ect=ect)


def _among_others(
    network: Network, name: str, links: tuple[Link, ...], controller: str, *, back: float = DELAY,
    begin: float = 0.0,
) -> None:  # fmt: skip
    """A flow that shares a link.  Its host takes some time for each packet that is not always the same."""
    host = Faults(network.random(f"{name}, host"), jitter=HOST_JITTER)
    network.flow(name, links, controller=controller, back=back, back_faults=host, begin=begin)


def _steady(network: Network, controllers: tuple[str, ...]) -> None:
    _one(network, network.link("link", rate=RATE, delay=DELAY, queue=_tail_drop()), controllers[0])


def _codel(network: Network, controllers: tuple[str, ...]) -> None:
    queue = CoDelQueue(limit_packets=MANAGED_LIMIT)
    _one(network, network.link("link", rate=RATE, delay=DELAY, queue=queue), controllers[0])


def _ecn(network: Network, controllers: tuple[str, ...]) -> None:
    queue = CoDelQueue(limit_packets=MANAGED_LIMIT, ecn=True)
    _one(network, network.link("link", rate=RATE, delay=DELAY, queue=queue), controllers[0], ect=True)


def _share(network: Network, controllers: tuple[str, ...]) -> None:
    link = network.link("link", rate=RATE, delay=DELAY, queue=_tail_drop())
    draw = network.random("begin")
    for number in range(16):
        begin = draw.random() * network.seconds / 30
        _among_others(network, f"{controllers[0]} {number + 1}", (link,), controllers[0], begin=begin)


def _fair_queue(network: Network, controllers: tuple[str, ...]) -> None:
    link = network.link("link", rate=RATE, delay=DELAY, queue=FairQueue(limit_packets=MANAGED_LIMIT))
    for number in range(3):
        _among_others(network, f"{controllers[0]} {number + 1}", (link,), controllers[0])
    network.source("constant", (link,), rate=RATE / 2)


def _rtt_fairness(network: Network, controllers: tuple[str, ...]) -> None:
    link = network.link("link", rate=RATE, delay=0.005, queue=_tail_drop())
    for milliseconds in (20, 80):
        name, back = f"{controllers[0]} {milliseconds} ms", milliseconds / 1000 - 0.005
        _among_others(network, name, (link,), controllers[0], back=back)


def _lossy(network: Network, controllers: tuple[str, ...], loss: RandomLoss | BurstLoss) -> None:
    faults = Faults(network.random("faults"), losses=(loss,))
    link = network.link("link", rate=RATE, delay=DELAY, queue=_tail_drop(), faults=faults)
    _one(network, link, controllers[0])


def _loss(network: Network, controllers: tuple[str, ...]) -> None:
    _lossy(network, controllers, RandomLoss(0.01))


def _burst_loss(network: Network, controllers: tuple[str, ...]) -> None:
    # Bursts of four packets on the average, four in a thousand packets lost.
    _lossy(network, controllers, BurstLoss(0.001, 0.25))


def _wireless(network: Network, controllers: tuple[str, ...]) -> None:
    """The rate walks between 20 and 80 Mb/s five times a second, with jitter and bursts of loss."""
    faults = Faults(
        network.random("faults"), losses=(BurstLoss(0.001, 0.25, loss_bad=0.5),), jitter=0.004, corrupt=0.001
    )
    link = network.link("link", rate=RATE / 2, delay=DELAY, queue=_tail_drop(), faults=faults)
    draw, rate = network.random("rate"), RATE / 2
    for number in range(1, int(network.seconds * 5)):
        rate = min(0.8 * RATE, max(0.2 * RATE, rate * (0.8 + 0.45 * draw.random())))
        network.at(number / 5, link.set_rate, rate)
    _one(network, link, controllers[0])


def _satellite(network: Network, controllers: tuple[str, ...]) -> None:
    """A geostationary one: 25 Mb/s, 600 ms."""
    queue = _tail_drop(RATE / 4 * 0.6)
    _one(network, network.link("link", rate=RATE / 4, delay=0.3, queue=queue), controllers[0], back=0.3)


def _blackhole(network: Network, controllers: tuple[str, ...]) -> None:
    """Nothing arrives from 5/10 to 6/10 of the time, in neither direction."""
    begin, end = network.seconds * 0.5, network.seconds * 0.6
    random = network.random("faults")
    faults = Faults(random, losses=(Outage(begin, end),))
    link = network.link("link", rate=RATE, delay=DELAY, queue=_tail_drop(), faults=faults)
    network.flow(controllers[0], (link,), controller=controllers[0], back=DELAY, back_faults=faults)


def _step(network: Network, controllers: tuple[str, ...]) -> None:
    link = network.link("link", rate=RATE, delay=DELAY, queue=_tail_drop())
    network.at(network.seconds / 3, link.set_rate, RATE / 2)
    network.at(network.seconds * 2 / 3, link.set_rate, RATE)
    _one(network, link, controllers[0])


def _long_queue(network: Network, controllers: tuple[str, ...]) -> None:
    _one(network, network.link("link", rate=RATE, delay=DELAY, queue=_tail_drop(10 * BDP)), controllers[0])


def _reorder(network: Network, controllers: tuple[str, ...]) -> None:
    """One packet in fifty comes 3 ms late, after about thirty that were sent behind it."""
    faults = Faults(network.random("faults"), reorder=0.02, reorder_delay=0.003)
    link = network.link("link", rate=RATE, delay=DELAY, queue=_tail_drop(), faults=faults)
    _one(network, link, controllers[0])


def _overload(network: Network, controllers: tuple[str, ...]) -> None:  # noqa: ARG001 - they heed nothing
    """Ten times what the link carries, in three classes; the queue gives way at the oldest of the lowest."""
    rate = RATE / 10
    link = network.link("link", rate=rate, delay=DELAY, queue=PriorityQueue(classes=3, limit_packets=256))
    for priority, (name, part) in enumerate((("high", 0.2), ("middle", 0.5), ("low", 9.3))):
        network.source(name, (link,), rate=part * rate, priority=priority)


def _latecomer(network: Network, controllers: tuple[str, ...]) -> None:
    link = network.link("link", rate=RATE, delay=DELAY, queue=_tail_drop())
    _among_others(network, "first", (link,), controllers[0])
    _among_others(network, "late", (link,), controllers[0], begin=network.seconds / 3)


def _mixed(network: Network, controllers: tuple[str, ...]) -> None:
    link = network.link("link", rate=RATE, delay=DELAY, queue=_tail_drop())
    for name in controllers:
        _among_others(network, name, (link,), name)


def _two_bottlenecks(network: Network, controllers: tuple[str, ...]) -> None:
    """One flow over two links, each of which it shares with another flow."""
    links = [
        network.link(f"link {number}", rate=RATE, delay=DELAY / 2, queue=_tail_drop()) for number in (1, 2)
    ]
    _among_others(network, "both", tuple(links), controllers[0])
    for number, link in enumerate(links, 1):
        _among_others(network, f"only {number}", (link,), controllers[0], back=DELAY * 1.5)


_ALL: Final = (
    Scenario("steady", "one flow, a queue of one bandwidth-delay product", "RFC 9743, tail-drop queues",
             _steady, thresholds=(Threshold("utilisation", at_least=0.95),)),
    Scenario("codel", "one flow, the queue managed by CoDel", "RFC 9743, active queue management", _codel,
             thresholds=(Threshold("utilisation", at_least=0.95),
                         Threshold("standing_queue", at_most=0.010))),
    Scenario("share", "16 flows", "RFC 9743, fairness within the algorithm", _share, warm_up=1 / 3,
             thresholds=(Threshold("jain", at_least=0.95), Threshold("utilisation", at_least=0.95))),
    Scenario("fair-queue", "three flows and a source that heeds nothing, kept apart by FQ-CoDel",
             "RFC 7928, unresponsive senders", _fair_queue,
             thresholds=(Threshold("jain", at_least=0.95), Threshold("utilisation", at_least=0.95))),
    Scenario("rtt-fairness", "two flows, of 20 and of 80 ms", "RFC 7928 and 8867, round-trip time fairness",
             _rtt_fairness, warm_up=1 / 3, thresholds=(Threshold("utilisation", at_least=0.95),)),
    Scenario("loss", "1 % of the packets lost at random", "RFC 9743, high packet loss", _loss,
             thresholds=(Threshold("utilisation", at_least=0.80, controllers=("bbr",)),)),
    Scenario("burst-loss", "bursts of loss, 0.4 % of the packets", "RFC 9743, high packet loss", _burst_loss,
             thresholds=(Threshold("utilisation", at_least=0.80, controllers=("bbr",)),)),
    Scenario("wireless", "a rate that walks, jitter, bursts of loss, damage", "RFC 9743, wireless paths",
             _wireless, thresholds=(Threshold("utilisation", at_least=0.75, controllers=("bbr",)),)),
    Scenario("satellite", "25 Mb/s, 600 ms", "RFC 9743, high delay paths", _satellite, seconds=60.0,
             warm_up=1 / 3, thresholds=(Threshold("utilisation", at_least=0.90),)),
    Scenario("blackhole", "nothing gets through for a tenth of the time", "RFC 9743, transient events",
             _blackhole, change=0.6, thresholds=(Threshold("settled", at_most=3.0),)),
    Scenario("step", "the rate halves, and doubles again", "RFC 8867, variable available capacity", _step,
             change=2 / 3, thresholds=(Threshold("settled", at_most=3.0),
                                       Threshold("utilisation", at_least=0.90))),
    Scenario("long-queue", "a queue of ten bandwidth-delay products", "RFC 9743, bufferbloat", _long_queue,
             thresholds=(Threshold("utilisation", at_least=0.95),
                         Threshold("delay_p95", at_most=0.060, controllers=("bbr", "copa")))),
    Scenario("reorder", "2 % of the packets overtaken by some thirty", "RFC 9743, packet reordering",
             _reorder, thresholds=(Threshold("utilisation", at_least=0.90),)),
    Scenario("ecn", "CoDel that marks instead of dropping", "RFC 8867, explicit congestion notification",
             _ecn, thresholds=(Threshold("utilisation", at_least=0.95),
                               Threshold("standing_queue", at_most=0.010),
                               Threshold("loss", at_most=0.001))),
    Scenario("overload", "ten times the capacity, in three priorities", "RFC 7928, unresponsive senders",
             _overload, seconds=10.0, controllers=(),
             thresholds=(Threshold("high.delay_p99", at_most=0.005), Threshold("high.loss", at_most=0.0),
                         Threshold("middle.loss", at_most=0.0), Threshold("utilisation", at_least=0.99))),
    Scenario("latecomer", "a flow that begins when another has the link", "RFC 8867, competing flows",
             _latecomer, warm_up=2 / 3, change=1 / 3, thresholds=(Threshold("least_share", at_least=0.50),)),
    Scenario("mixed", "cubic against bbr", "RFC 9743, mixed algorithms", _mixed, warm_up=1 / 3,
             controllers=("cubic", "bbr"), thresholds=(
                 Threshold("least_share", at_least=0.25, controllers=("cubic", "bbr")),
                 Threshold("utilisation", at_least=0.95, controllers=("cubic", "bbr")))),
    Scenario("two-bottlenecks", "one flow over two links, each with a flow of its own",
             "RFC 8867, multiple bottlenecks", _two_bottlenecks, warm_up=1 / 3,
             thresholds=(Threshold("utilisation", at_least=0.90), Threshold("least_share", at_least=0.25))),
)  # fmt: skip

SCENARIOS: Final = {scenario.name: scenario for scenario in _ALL}


def scenario(name: str) -> Scenario:
    """The one of that name.  Raises UsageError, which says what there is."""
    try:
        return SCENARIOS[name]
    except KeyError:
        raise UsageError(f"no scenario {name!r}", hint=f"there are: {', '.join(SCENARIOS)}") from None

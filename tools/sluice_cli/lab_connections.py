# SPDX-License-Identifier: Apache-2.0
"""``sluice lab connections``: what becomes of a pool's connections when the network or a peer fails.

Each trial does something to a network of two hosts, where real interfaces, sockets and processes are, and
measures how long it takes until each connection has carried a message and its answer again:

=========  ============================================================================================
cut        the other host's interface is set down and up again: our carrier goes and comes back
blackhole  the other host drops all that arrives, and nobody is told
arp        the other host gets another MAC, and says so (gratuitous ARP or an unsolicited neighbour
           advertisement, as when a spare takes over)
move       our own address is replaced by another one
kill       kill -9 of a peer while messages go to it: its users are served by others (failover)
hang       the same with a peer that is stopped: nothing says so, there is only silence
die        kill -9 of peers that nobody speaks to
flood      strangers flood the pool's port, in a lower lane than the peers'
spoil      one datagram of twenty is lost and one changed, in each direction, with checksums that are right
=========  ============================================================================================

Thresholds: after a cut all are back within a second of what netlink reports
(99 of 100), and after a blackhole within one longest delay and its jitter; QUIC goes on without a handshake;
failover within 250 ms of a kill; who died or hangs is known within 15 s.  Under a flood and on a network
that spoils datagrams no connection ends, and messages are answered within a second; what was changed
reaches no user of QUIC.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

import click

from sluice_cli.generator import Generator, Stream
from sluice_cli.lab import Host, Lab
from sluice_cli.lab_connections_report import show
from sluice_cli.lab_connections_room import PORT, QUIC_PORT, UDP_PORT, Peers, Room
from sluice_cli.lab_flow_wire import Mode
from sluice_cli.lab_pass import load_drop
from sluice_cli.lab_spoil import Spoiler
from sluice_cli.output import Output, common_options, examples
from sluice_cli.traffic import Template, udp_frame
from userspace.connection.backoff import CAP
from userspace.connection.slots import Lease
from xdp.errors import SluiceError

#: Seconds, 99 of 100 connections, from what netlink reports (a cut), from the end (of all else).
BACK: Final = 1.0
#: Seconds: the kernel asks for a neighbour once in so many (arp(7): retrans_time; RFC 4861, 10),
#: and over kernel sockets nobody here makes it ask at once.
SOLICITATION: Final = 1.0
#: Seconds, all connections: one longest delay and its jitter, which is within it, and an attempt.
BLACKHOLE: Final = CAP + 3.0
#: Seconds, users of a peer that was killed, until another one has answered.
FAILOVER: Final = 0.25
#: Seconds until a peer that died is known to have; also until the users of one that hangs are served by
#: others, though that takes less: how soon silence is unusual is learnt from the peer's traffic.
DEATH: Final = 15.0
#: Peers that will be killed, by trial.  Hosts send some ICMP messages at once and then one a second
#: (icmp(7)): of several peers that are spoken to, some would be known by silence.
VICTIMS: Final = {"kill": 1, "hang": 1, "die": 4}
#: Users whose messages go to a peer.
USERS: Final = 8
#: Seconds between two messages of a user.
PACE: Final = 0.02
#: Seconds for which users have spoken before.
SPEAKING: Final = 1.0
#: Seconds that a trial waits for the last connection.
LONGEST: Final = 60.0

#: Packets/s of a flood, several times what a loop in Python reads of it besides its work (the report tells
#: how many), and how many strangers send them.
FLOOD: Final = 200_000
STRANGERS: Final = 1024

#: Parts of the datagrams in each direction that are lost and changed: a fifth of the messages fail.
DROP: Final = 0.05
CHANGE: Final = 0.05

MAC: Final = "02:00:00:00:5e:01"
#: By version: our other address, and ours.
MOVES: Final = {4: ("10.81.0.7/16", "10.81.0.1/16"), 6: ("fd81::7/64", "fd81::1/64")}
#: Nobody else has it, and asking takes a second (RFC 4862, 5.4).
NO_DAD: Final[dict[int, tuple[str, ...]]] = {4: (), 6: ("nodad",)}


class Plan(NamedTuple):
    """How many, and how long."""

    udp: int
    quic: int
    seconds: float
    version: int  # of IP


def percentile(values: Sequence[float], share: float) -> float | None:
    """Of a list that may be empty."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else None


def figures(room: Room, since: float, before: dict[Hashable, int], kinds: Sequence[str]) -> dict[str, Any]:
    """How long each kind of connections took to be back, and how many had to be made anew."""
    found = room.first_answers(since, LONGEST)
    told: dict[str, Any] = {}
    for kind in kinds:
        endpoints = [key for group in room.groups if group.kind == kind for key in group.endpoints]
        times = [found[key] for key in endpoints if key in found]
        told[kind] = {
            "connections": len(endpoints),
            "back": len(times),
            "p50": percentile(times, 0.5),
            "p99": percentile(times, 0.99),
            "max": max(times, default=None),
            "reconnected": sum(room.attempts[key] > before[key] for key in endpoints),
        }
    return told


def limit(name: str, value: float | None, most: float) -> dict[str, Any]:
    """A threshold; a value that is missing has missed it."""
    return {"figure": name, "value": value, "at_most": most, "holds": value is not None and value <= most}


def _limits(told: dict[str, Any], figure: str, most: float) -> list[dict[str, Any]]:
    limits = []
    for kind, found in told.items():
        limits.append(limit(f"{kind}: not back", found["connections"] - found["back"], 0))
        limits.append(limit(f"{kind}: {figure}", found[figure], most))
    if "quic" in told:
        limits.append(limit("quic: handshakes", told["quic"]["reconnected"], 0))
    return limits


def _set(host: Host, version: int, name: str) -> None:
    with host.enter():
        Path(f"/proc/sys/net/ipv{version}/conf", host.interface, name).write_text("1", encoding="ascii")


# --- trials


def cut(room: Room, plan: Plan) -> dict[str, Any]:
    """The other host's interface down and up."""
    before = dict(room.attempts)
    client = room.lab.client
    # A cable that is pulled takes no IPv6 addresses away, as setting the interface down does.
    _set(client, 6, "keep_addr_on_down")
    down = room.command(client, "link", "set", client.interface, "down")
    room.run(down + plan.seconds)
    lost = room.failed()
    up = room.command(client, "link", "set", client.interface, "up")
    room.run_until(lambda: room.carrier.link_up_at > down, LONGEST)
    told = figures(room, room.carrier.link_up_at, before, _kinds(plan))
    return {
        "kinds": told,
        "netlink_late": room.carrier.link_up_at - up,
        "lost": lost,
        "thresholds": _limits(told, "p99", BACK if room.over_frames else BACK + SOLICITATION),
    }


def blackhole(room: Room, plan: Plan) -> dict[str, Any]:
    """What arrives at the other host vanishes."""
    before = dict(room.attempts)
    client = room.lab.client
    client.detach()
    client.attach(load_drop(frags=False))
    try:
        room.run(time.monotonic() + plan.seconds)
        lost = room.failed()
    finally:
        client.detach()
        client.attach_pass()
    told = figures(room, time.monotonic(), before, _kinds(plan))
    return {"kinds": told, "lost": lost, "thresholds": _limits(told, "max", BLACKHOLE)}


def arp(room: Room, plan: Plan) -> dict[str, Any]:
    """The other host's MAC is another one."""
    before = dict(room.attempts)
    client = room.lab.client
    _set(client, 4, "arp_notify")
    _set(client, 6, "ndisc_notify")
    since = room.command(client, "link", "set", client.interface, "address", MAC)
    told = figures(room, since, before, _kinds(plan))
    return {"kinds": told, "lost": room.failed(), "thresholds": _limits(told, "p99", BACK)}


def move(room: Room, plan: Plan) -> dict[str, Any]:
    """Our own address is another one."""
    before = dict(room.attempts)
    server = room.lab.server
    # Or the kernel deletes what was added with what was there before (ip-sysctl: promote_secondaries).
    _set(server, 4, "promote_secondaries")
    new, old = MOVES[plan.version]
    room.command(server, "address", "add", new, "dev", server.interface, *NO_DAD[plan.version])
    since = room.command(server, "address", "delete", old, "dev", server.interface)
    told = figures(room, since, before, _kinds(plan))
    return {"kinds": told, "lost": room.failed(), "thresholds": _limits(told, "p99", BACK)}


def kill(room: Room, plan: Plan) -> dict[str, Any]:
    """A peer is killed while users speak to it."""
    return _fail_over(room, room.groups[_groups(plan).index("kill")], signal.SIGKILL, FAILOVER)


def hang(room: Room, plan: Plan) -> dict[str, Any]:
    """A peer is stopped while users speak to it."""
    return _fail_over(room, room.groups[_groups(plan).index("hang")], signal.SIGSTOP, DEATH)


def _fail_over(room: Room, group: Peers, number: int, most: float) -> dict[str, Any]:
    """How long until each user has an answer from somebody else, to a message that was sent after that."""
    users = _users(room, set(group.endpoints))
    sent: dict[str, float] = {}
    waiting: dict[Hashable, list[str]] = {}
    served: dict[str, float] = {}

    def speak(now: float) -> None:
        for user in users:
            if now >= sent.get(user, 0.0) + PACE:
                sent[user] = now
                got = room.conductor.acquire(now, sticky=user)
                if not isinstance(got, Lease):
                    room.conductor.cancel(now, got)  # all are borrowed just now
                    continue
                if room.ask(now, got.connection):
                    waiting.setdefault(got.endpoint, []).append(user)
                room.conductor.release(now, got)

    room.run(time.monotonic() + SPEAKING, speak)
    waiting.clear()
    group.send_signal(number)
    since = time.monotonic()
    while len(served) < len(users) and time.monotonic() < since + LONGEST:
        speak(time.monotonic())
        for one in room.carrier.step(PACE / 2):
            answer = room.answered(one)
            if answer is not None and answer[1] >= since:
                for user in waiting.pop(answer[0], []):
                    served.setdefault(user, one.at - since)
    slowest = max(served.values(), default=None)
    return {
        "failover": {"users": len(users), "served": len(served), "max": slowest},
        "thresholds": [
            limit("users without an answer", len(users) - len(served), 0),
            limit("failover", slowest, most),
        ],
    }


def _users(room: Room, victims: set[Hashable]) -> list[str]:
    """So many names whose connection is one to a victim."""
    users: list[str] = []
    now = time.monotonic()
    for number in range(1_000_000):
        lease = room.conductor.acquire(now, sticky=f"user-{number}")
        if not isinstance(lease, Lease):
            raise SluiceError(f"a user waits though nothing is borrowed: {room.conductor!r}")
        room.conductor.release(now, lease)
        if lease.endpoint in victims:
            users.append(f"user-{number}")
            if len(users) == USERS:
                break
    return users


def die(room: Room, plan: Plan) -> dict[str, Any]:
    """Peers are killed that nobody speaks to."""
    group = room.groups[_groups(plan).index("die")]
    group.send_signal(signal.SIGKILL)
    died = time.monotonic()
    known: dict[Hashable, float] = {}

    def look(now: float) -> None:
        for link in room.conductor.links.values():
            if link.peer.key in group.ports and not link.live:
                known.setdefault(link.peer.key, now - died)

    deadline = died + 2 * DEATH
    while len(known) < len(group.endpoints) and time.monotonic() < deadline:
        room.carrier.step(0.02)
        look(time.monotonic())
    told = {"peers": len(group.endpoints), "known": len(known), "max": max(known.values(), default=None)}
    return {
        "death": told,
        "thresholds": [
            limit("not known to be dead", len(group.endpoints) - len(known), 0),
            limit("known dead after", told["max"], DEATH),
        ],
    }


def flood(room: Room, plan: Plan) -> dict[str, Any]:
    """Strangers flood a lower lane of the same port."""
    before = dict(room.attempts)
    client, server = room.lab.client, room.lab.server
    stranger = type(client.ipv4)("10.81.16.0")
    frame = udp_frame(client, server, PORT, bytes(64), source_address=stranger)
    stream = Stream([Template(frame)], rate=FLOOD, sources=STRANGERS)
    read = room.carrier.strays
    rounds: list[dict[str, Any]] = []
    # Where most interrupts are; the pool may have the other CPUs.
    with Generator(client, cpu=min(os.sched_getaffinity(0))) as generator:
        generator.start([stream], plan.seconds)
        while not rounds or generator.running:
            rounds.append(figures(room, time.monotonic(), before, _kinds(plan)))
        result = generator.wait()
    told, limits = _worst(rounds, plan)
    return {
        "kinds": told,
        "lost": room.failed(),
        "flood": {
            "sent": result.sent, "refused": result.refused, "read": room.carrier.strays - read,
            "packets_per_second": result.rate, "rounds": len(rounds),
        },
        "thresholds": limits,
    }  # fmt: skip


def spoil(room: Room, plan: Plan) -> dict[str, Any]:
    """Datagrams are lost and changed in both directions."""
    before, wrong = dict(room.attempts), dict(room.wrong)
    rounds: list[dict[str, Any]] = []
    with Spoiler(room.lab.client, drop=DROP, change=CHANGE) as spoiler:
        end = time.monotonic() + plan.seconds
        while not rounds or time.monotonic() < end:
            rounds.append(figures(room, time.monotonic(), before, _kinds(plan)))
    counts = spoiler.counts()
    told, limits = _worst(rounds, plan)
    found = {kind: room.wrong[kind] - wrong[kind] for kind in _kinds(plan)}
    if "quic" in found:
        limits.append(limit("quic: wrong messages", found["quic"], 0))
    return {
        "kinds": told,
        "lost": room.failed(),
        "spoil": {**counts._asdict(), "rounds": len(rounds), "wrong": found},
        "thresholds": limits,
    }


def _worst(rounds: Sequence[dict[str, Any]], plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The worst round of each kind, and what is asked of it: no connection ends."""
    told = {kind: max((one[kind] for one in rounds), key=_badness) for kind in _kinds(plan)}
    limits = _limits(told, "p99", BACK)
    limits.append(limit("udp: ended", told["udp"]["reconnected"], 0))
    return told, limits


def _badness(found: dict[str, Any]) -> tuple[int, int, float]:
    """Of what was measured in several rounds, the worst is told."""
    return found["connections"] - found["back"], found["reconnected"], found["p99"] or LONGEST


TRIALS: Final[dict[str, Callable[[Room, Plan], dict[str, Any]]]] = {
    "cut": cut, "blackhole": blackhole, "arp": arp, "move": move, "flood": flood, "spoil": spoil,
    "kill": kill, "hang": hang, "die": die,
}  # fmt: skip


def _kinds(plan: Plan) -> list[str]:
    return ["udp", "quic"] if plan.quic else ["udp"]


def _groups(plan: Plan) -> list[str]:
    """What the groups of peers are for, in their order."""
    return [*_kinds(plan), *VICTIMS]


def run(room: Room, names: Sequence[str], plan: Plan, output: Output) -> list[dict[str, Any]]:
    """The trials, one after the other, with a pause in which all is well again."""
    found = []
    for name in names:
        output.progress(f"{name}: {TRIALS[name].__doc__}")
        began = time.monotonic()
        one = TRIALS[name](room, plan)
        found.append({"trial": name, "about": TRIALS[name].__doc__, **one,
                      "ok": all(one["holds"] for one in one["thresholds"]),
                      "seconds": time.monotonic() - began})  # fmt: skip
        room.run(time.monotonic() + 1.0)
    return found


@click.command(
    name="connections",
    epilog=examples(
        """sudo sluice lab connections
        sudo sluice lab connections --quick
        sudo sluice lab connections --ipv6 --trial move
        sudo sluice lab connections --trial cut --trial kill --mode mmsg --json"""
    ),
)
@click.option("--trial", "names", multiple=True, type=click.Choice(list(TRIALS)),
              help="Only that; may be repeated.  [default: all]")  # fmt: skip
@click.option("--udp", type=click.IntRange(10, 5000), help="UDP connections.  [default: 1000, quick: 100]")
@click.option("--quic", type=click.IntRange(0, 64), help="QUIC connections.  [default: 16, quick: 2]")
@click.option("--seconds", type=click.FloatRange(0.5, 25),
              help="Of a cut, a black hole, a flood and spoiling.  [default: 10, quick: 2]")  # fmt: skip
@click.option("--ipv6", is_flag=True, help="Instead of IPv4; the flood is IPv4 all the same.")
@click.option("--quick", is_flag=True, help="Few connections and short faults.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=1, show_default=True,
              help="Of all chance in the pool; what the machine does is not repeated.")  # fmt: skip
@click.option("--mode", type=click.Choice(get_args(Mode)), default="auto", show_default=True,
              help="Of the pool's lanes.")  # fmt: skip
@common_options
def connections(
    output: Output,
    names: tuple[str, ...],
    udp: int | None,
    quic: int | None,
    seconds: float | None,
    ipv6: bool,
    quick: bool,
    seed: int,
    mode: Mode,
) -> int:
    """Break a pool's network and its peers, and measure how long it takes until all is well.

    One process keeps connections to peers on another host of the lab, which are processes of their own. Exit
    code 1 when a threshold is missed.
    """
    plan = Plan(
        udp=udp if udp is not None else 100 if quick else 1000,
        quic=quic if quic is not None else 2 if quick else 16,
        seconds=seconds if seconds is not None else 2.0 if quick else 10.0,
        version=6 if ipv6 else 4,
    )
    chosen = [name for name in TRIALS if not names or name in names]
    with Lab() as lab:
        document = _document(output, lab, chosen, plan, seed, mode)
    output.report(document, lambda: show(output, document))
    return 0 if document["ok"] else 1


def _document(
    output: Output, lab: Lab, names: Sequence[str], plan: Plan, seed: int, mode: Mode
) -> dict[str, Any]:
    peers = partial(Peers, lab.client, version=plan.version)
    groups = [peers("udp", UDP_PORT, plan.udp)]
    if plan.quic:
        groups.append(peers("quic", QUIC_PORT, plan.quic))
    port = UDP_PORT + plan.udp
    for count in VICTIMS.values():
        groups.append(peers("udp", port, count))
        port += count
    try:
        for group in groups:
            group.wait()
        with lab.server.enter():
            room = Room(lab, groups, mode=mode, seed=seed)
            try:
                output.progress(f"{plan.udp} UDP and {plan.quic} QUIC connections over {room.mode}")
                opened = room.open()
                trials = run(room, names, plan, output)
                told = room.conductor.snapshot()
            finally:
                room.close()
    finally:
        for group in groups:
            group.close()
    return {
        "seed": seed, "mode": room.mode, "ip": plan.version, "udp": plan.udp, "quic": plan.quic,
        "seconds": plan.seconds, "opened_in": opened, "trials": trials, "probes": told.health.probes,
        "asked": told.health.asked, "stalls": told.health.stalls, "ok": all(one["ok"] for one in trials),
    }  # fmt: skip

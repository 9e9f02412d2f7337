# SPDX-License-Identifier: Apache-2.0
"""The select program against the reference classifier: random policies, real datagrams, real sockets.

    SLUICE_SEED=N python -m pytest tests/kernel/test_select_differential.py

runs the packets of an earlier run again; the seed is named in every failure.
"""

from __future__ import annotations

import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address

import pytest

from sluice_cli.lab import Lab
from tests.kernel.random_traffic import PORTS, SOURCES, random_payload, random_policy
from tests.kernel.selecting import Wire, drained, until
from userspace.datagram.selected import LaneSocket, open_drains, open_worker_sockets
from xdp._libbpf import lib
from xdp.abi import REASONS
from xdp.classify import Classifier, Verdict
from xdp.counters import Counters
from xdp.holds import PeerHolds
from xdp.policy import Policy
from xdp.select import SelectProgram
from xdp.tables import compile_policy

pytestmark = [pytest.mark.root, pytest.mark.feature("sk_reuseport")]

POLICIES = 12
DATAGRAMS = 400  # for each
#: Those that the kernel's routing refuses never come to a socket.
_IMPOSSIBLE = ("0.", "127.", "224.", "240.", "255.", "ff02:", "::ffff:")
VALID = tuple(one for one in SOURCES if not one.startswith(_IMPOSSIBLE) and one not in {"::", "::1"})


class Rig:
    """The program, with a socket for each of eight lanes on each of the ports that random policies use."""

    def __init__(self, stack: ExitStack, lab: Lab) -> None:
        self.program = stack.enter_context(SelectProgram.load(groups=2 * len(PORTS)))
        with lab.server.enter():
            drains = open_drains(self.program, PORTS)
            for drain in drains:
                stack.callback(drain.socket.close)
            opened = open_worker_sockets(self.program, lib.SLUICE_MAX_LANES, drains, 0)
        for one in opened:
            stack.callback(one.socket.close)
        self.sockets: list[LaneSocket] = opened
        self.wire = stack.enter_context(Wire(lab))


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Lab() as lab, ExitStack() as stack:
        yield Rig(stack, lab)


def entered(verdict: Verdict) -> bool:
    name = REASONS[verdict.reason]
    return verdict.lane is not None and not name.startswith("drop_")


def hold_some(program: SelectProgram, classifier: Classifier, policy: Policy, rng: random.Random) -> None:
    """The same peers in both, at one packet a second: no second is over before all are sent."""
    now = time.monotonic_ns()
    with PeerHolds(program.maps, clock=lambda: now) as holds:
        for held in holds.held():  # of peers that an earlier policy had, too
            holds.release(held)
        for peer in policy.peers:
            if rng.random() < 0.6:
                address, burst = ip_address(str(peer.address)), rng.randint(1, 5)
                holds.hold(address, 1, burst, seconds=60)
                classifier.hold(address, 1, burst, until_ns=now + 60_000_000_000, now_ns=now)


#: What policies and datagrams by chance have to meet; as a rule a few policies do.
WANTED = {
    "pass_not_ours", "pass_policy", "pass_lane", "drop_denied", "drop_policy", "drop_held", "steer", "reply",
}  # fmt: skip


def test_random_policies_and_datagrams(rig: Rig) -> None:
    seed = int(os.environ.get("SLUICE_SEED") or secrets.randbits(32))
    met: Counter[str] = Counter()
    for number in range(10 * POLICIES):
        if number >= POLICIES and set(met) >= WANTED:
            break
        rng = random.Random(f"{seed} {number}")
        text = random_policy(rng)
        told = f"SLUICE_SEED={seed} policy {number}\n{text}"
        policy = Policy.parse(text)
        rig.program.swap(compile_policy(policy))
        classifier = Classifier(policy)
        hold_some(rig.program, classifier, policy, rng)
        before = rig.program.counters()
        ports = [port for service in policy.services for port in service.ports]
        wanted: dict[int, tuple[int, int, bytes]] = {}
        verdicts: Counter[tuple[int | None, str]] = Counter()
        for index in range(1, DATAGRAMS + 1):
            port = rng.choice(ports if rng.random() < 0.9 else PORTS)
            source, payload = rng.choice(VALID), random_payload(rng)
            verdict = classifier.classify_datagram(source, port, payload, time.monotonic_ns())
            verdicts[verdict.lane, REASONS[verdict.reason]] += 1
            if entered(verdict):
                assert verdict.lane is not None
                wanted[index] = (port, verdict.lane, payload)
            rig.wire.send(source, port, payload, source_port=index)  # by which it is found again
        got: dict[int, tuple[int, int, bytes]] = {}

        def all_there(
            got: dict[int, tuple[int, int, bytes]] = got,
            wanted: dict[int, tuple[int, int, bytes]] = wanted,
            seen: int = before.seen.packets + DATAGRAMS,
        ) -> bool:
            for port, lane, sock in rig.sockets:
                for payload, index in drained(sock):
                    assert index not in got
                    got[index] = (port, -1 if lane is None else lane, payload)
            ended = sum(verdict_counts(rig.program.counters()).values())
            return ended == seen and len(got) >= len(wanted)

        until(all_there, f"{len(got)} of {len(wanted)} came; {told}")
        assert got == wanted, told
        assert verdict_counts(rig.program.counters()) - verdict_counts(before) == verdicts, told
        met.update(name for _, name in verdicts)
    counters = rig.program.counters()
    assert counters.balanced
    assert counters.worker_gone == 0
    assert set(met) >= WANTED


def verdict_counts(counters: Counters) -> Counter[tuple[int | None, str]]:
    found: Counter[tuple[int | None, str]] = Counter(
        {(None, name): count.packets for name, count in counters.other.items()}
    )
    for lane, row in enumerate(counters.lanes):
        found.update({(lane, name): count.packets for name, count in row.verdicts.items()})
    return found

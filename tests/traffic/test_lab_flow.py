# SPDX-License-Identifier: Apache-2.0
"""`sluice lab flow`: congestion control over real lanes.  What is counted is judged, not how fast it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from sluice_cli.lab import Lab
from sluice_cli.lab_flow_network import OpenNetwork
from sluice_cli.lab_flow_relay import Relay
from sluice_cli.lab_flow_sender import Sender
from sluice_cli.lab_flow_wire import NUMBER_BITS, POLICY, PORT, Clock, encode
from tests.traffic.commands import interrupt, killed, refused, run
from tests.traffic.served import until
from userspace.datagram.mmsg import MmsgLanes
from userspace.flow.ranges import Acknowledgement
from xdp.policy import Policy

pytestmark = [pytest.mark.root, pytest.mark.bpf]

TIMERS = {"sender_late", "relay_late", "overtaken", "most_overtaken", "wakeups"}
LATE = {"p50", "p95", "p99", "max"}


def flow(*words: str) -> dict[str, Any]:
    """The document of one run; on a busy machine thresholds may be missed, and the exit code says so."""
    done = run("lab", "flow", *words, "--json")
    assert done.stderr == ""
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["version"] == 1
    assert done.returncode == (0 if document["ok"] else 1)
    (found,) = document["runs"]
    thresholds = found["real"]["thresholds"] + found["simulated"]["thresholds"]
    holds = all(threshold["holds"] for threshold in thresholds)
    assert document["ok"] == found["ok"] == (holds and found["real"]["cable"]["missing"] == 0)
    return dict(found)


def check(found: dict[str, Any], seconds: float) -> None:
    """No packet is lost track of, from the sender's controllers to the receivers."""
    real, simulated = found["real"], found["simulated"]
    assert found["seconds"] == real["seconds"] == simulated["seconds"] == seconds
    sender, cable = real["sender"], real["cable"]
    assert sender["sent"] > 100
    assert sender["strange"] == 0
    assert cable["strange"] == 0
    # Between the hosts: sent = in the network + after the end + dropped by sockets + missing
    counted = cable["arrived"] + cable["afterwards"] + cable["dropped"] + cable["missing"]
    assert sender["sent"] == counted
    assert cable["missing"] == 0
    # In the network: entered = received + lost by reason + in flight
    flows, (link,) = real["flows"], real["links"]
    assert sum(one["sent"] for one in flows) == cable["arrived"] == real["packets"]
    on_their_way = link["queued"] + link["on_wire"]
    assert on_their_way >= 0
    for one in flows:
        assert one["duplicates"] == 0
        assert one["sent"] - one["received"] - sum(one["lost"].values()) >= 0
    received, lost = (sum(one["received"] for one in flows), sum(sum(one["lost"].values()) for one in flows))
    assert cable["arrived"] == received + lost + on_their_way
    assert link["sent"] == link["delivered"] + sum(link["lost"].values()) + on_their_way
    # Both have the same figures, links and thresholds.
    assert set(real["figures"]) == set(simulated["figures"])
    assert [one["name"] for one in flows] == [one["name"] for one in simulated["flows"]]
    assert 0 <= real["figures"]["utilisation"] <= 1.01
    timers = real["timers"]
    assert set(timers) == TIMERS
    for name in ("sender_late", "relay_late"):
        assert set(timers[name]) == LATE
        assert all(value >= 0 for value in timers[name].values())
    assert timers["wakeups"] > 10
    assert real["relay"]["answers"]["refused"] == 0


def test_a_flow_over_xdp_lanes() -> None:
    found = flow("--scenario", "loss", "--controller", "cubic", "--seconds", "1")
    check(found, 1)
    assert found["mode"] == "native-copy"
    assert found["controllers"] == ["cubic"]
    (one,) = found["real"]["flows"]
    state = one["controller_state"]
    assert state["congestion"] == "cubic"
    assert state["sent_packets"] == found["real"]["sender"]["sent"] + found["real"]["sender"]["unsent"]
    # Acknowledgements came back, by a path that takes 40 ms at least.
    assert 0 < state["acknowledged_packets"] <= one["received"]
    assert state["min_rtt"] >= 0.04
    assert found["real"]["relay"]["answers"]["sent"] > 10


def test_overload_over_kernel_sockets() -> None:
    found = flow("--scenario", "overload", "--seconds", "1", "--mode", "mmsg")
    check(found, 1)
    assert found["mode"] == "mmsg"
    lost = {one["name"]: one["lost"] for one in found["real"]["flows"]}
    assert set(lost) == {"high", "middle", "low"}
    assert sum(lost["low"].values()) > 100
    assert all(one["controller_state"] is None for one in found["real"]["flows"])


def test_for_people() -> None:
    done = run("lab", "flow", "--scenario", "codel", "--controller", "newreno", "--seconds", "1")
    assert done.returncode in {0, 1}
    lines = done.stdout.splitlines()
    assert lines[0].startswith("codel: one flow, the queue managed by CoDel; newreno, 1 s, native-copy")
    assert lines[1].split() == ["real", "simulated", "wanted"]
    assert any(line.startswith("used ") for line in lines)
    assert any("acknowledgements left late by" in line for line in lines)


@pytest.fixture
def ends(make_lab: Callable[..., Lab]) -> Iterator[tuple[Sender, Relay]]:
    """Sender and relay in this process, over kernel sockets; a run of a second begins now."""
    lab = make_lab(static_neighbours=True)
    networks = [OpenNetwork("steady", ("newreno",), seconds=1, seed=1) for _ in range(2)]
    with ExitStack() as stack:
        clock = Clock(time.monotonic())
        lanes = []
        for host in (lab.server, lab.client):
            with host.enter():
                lanes.append(stack.enter_context(MmsgLanes(Policy.parse(POLICY), timestamps=True)))
        yield (
            Sender(networks[0], lanes[0], clock, str(lab.client.ipv4)),
            Relay(networks[1], lanes[1], clock, str(lab.server.ipv4)),
        )


def comes(relay: Relay, packets: int) -> bool:
    """Whether so many have come so far."""
    relay.read()
    return relay.arrived + relay.strange + relay.afterwards == packets


def test_what_finds_no_room_is_told_and_sent_later(ends: tuple[Sender, Relay]) -> None:
    sender, relay = ends
    (flow,) = sender.flows
    flow.pump(0.0, sender.words)
    sender.zero.send(sender.peer, sender.zero.allocate(1, 8), lengths=7)  # too short for a number
    wanted = len(sender.words)
    assert wanted == 10  # the initial window
    held = []
    while len(buffers := sender.zero.allocate(4096)):
        held.append(buffers)
    sender.send()
    assert (sender.sent, sender.refused, len(sender.words)) == (0, wanted, wanted)
    assert flow.state()["controller"]["overflow_packets"] == wanted
    sender.zero.recycle(held[0])
    sender.send()
    assert (sender.sent, sender.words) == (wanted, [])
    until(lambda: comes(relay, wanted + 1), "all")
    assert (relay.arrived, relay.strange) == (wanted, 1)
    for buffers in held[1:]:
        sender.zero.recycle(buffers)


def test_what_is_of_no_flow_or_too_late(ends: tuple[Sender, Relay]) -> None:
    begun = time.monotonic()  # not before the run
    sender, relay = ends
    stranger = 1 << NUMBER_BITS
    sender.words += [stranger, 0]
    sender.flows.append(sender.flows[0])  # so that it can be sent
    sender.send()
    del sender.flows[1]
    until(lambda: comes(relay, 2), "both")
    assert (relay.arrived, relay.strange) == (1, 1)
    # Answers to nobody, and what is none.
    for payload in (encode(1, Acknowledgement((), 0.0, 0)), b"?", encode(0, Acknowledgement((), 0.0, 0))):
        relay.lanes.send(relay.peer, [payload], port=PORT)
    until(lambda: sender.read(0.01) == 0 or sender.strange == 2, "they have come")
    assert sender.strange == 2
    until(lambda: time.monotonic() > begun + 1, "the end")
    sender.words.append(1)
    sender.send()
    until(lambda: comes(relay, 3), "the last")
    assert relay.arrived == 1


def test_interrupted() -> None:
    interrupt("lab", "flow", "--seconds", "60", "--json", whom="terminal", when="program")


def test_killed() -> None:
    killed("lab", "flow", "--seconds", "60", "--json")


def test_what_cannot_be_had_is_refused() -> None:
    code, error = refused("lab", "flow", "--scenario", "steady", "--mode", "native-zero-copy")
    assert code == 5  # UnsupportedError: a veth has none
    assert "zero-copy" in error["message"]


def test_without_privileges() -> None:
    assert refused("lab", "flow", nobody=True)[0] == 4

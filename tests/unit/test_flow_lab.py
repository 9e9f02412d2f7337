# SPDX-License-Identifier: Apache-2.0
"""The halves of `sluice lab flow`, put together in virtual time: the same figures as the simulation's.

What is between them in the lab, interfaces and lanes, is left out: a packet enters the network at the time at
which the sender puts it into a batch, and an answer reaches the sender when it comes out of the network.
"""

from __future__ import annotations

import io
import json
import math
import struct
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from sluice_cli import lab_flow
from sluice_cli import lab_flow_wire as wire
from sluice_cli.lab_flow_network import OpenNetwork, RemoteFlow, RemoteSource
from sluice_cli.lab_flow_relay import lateness
from sluice_cli.lab_flow_report import show
from sluice_cli.lab_flow_sender import Flow, Source
from sluice_cli.output import Output
from userspace.flow.controller import FlowController
from userspace.flow.ranges import RANGES, Acknowledgement
from userspace.simulation.flow_report import report_on, simulate
from userspace.simulation.flow_scenarios import DEFAULT_CONTROLLER, controllers_of, scenario
from xdp.errors import UsageError

SEED = 7


def halves(
    name: str, controllers: tuple[str, ...], seconds: float
) -> tuple[OpenNetwork, list[Flow | Source]]:
    """Run both to the end."""
    network = OpenNetwork(name, controllers, seconds=seconds, seed=SEED)
    elsewhere = OpenNetwork(name, controllers, seconds=seconds, seed=SEED)
    senders: list[Flow | Source] = [
        Flow(remote) if isinstance(remote, RemoteFlow) else Source(remote) for remote in elsewhere.remotes
    ]
    words: list[int] = []
    while True:
        due = min(sender.due for sender in senders)
        now = min(due, network.engine.next_event())
        if now > seconds:
            break
        network.advance(now)
        answers, network.answers[:] = list(network.answers), []
        for at, flow, said in answers:
            assert at == now
            read = wire.decode(memoryview(wire.encode(flow, said)))
            assert read is not None
            senders[read[0]].acknowledged(now, said)  # as it was: the wire rounds its delay
            assert read[1]._replace(delay=said.delay) == said
            assert read[1].delay == pytest.approx(said.delay, abs=1e-6)
        for sender in senders:
            if sender.due <= now:
                sender.pump(now, words)
        for word in words:
            remote = network.remotes[word >> wire.NUMBER_BITS]
            network.enter(now, remote, word & wire.NUMBER_MASK, remote.size)
        words.clear()
    network.advance(seconds)
    network.check()
    return network, senders


@pytest.mark.parametrize(
    ("name", "controllers"),
    [("steady", ("cubic",)), ("codel", ("newreno",)), ("loss", ("cubic",)), ("ecn", ("cubic",)),
     ("share", ("cubic",)), ("overload", ())],
)  # fmt: skip
def test_together_they_are_the_simulation(name: str, controllers: tuple[str, ...]) -> None:
    """But for the order of what happens at the same time, by which flows that compete soon differ."""
    seconds = 0.6
    network, senders = halves(name, controllers, seconds)
    found = report_on(scenario(name), controllers, SEED, network).document()
    expected = simulate(scenario(name), controllers, seed=SEED, seconds=seconds)[0].document()
    if name == "overload":  # where nothing happens at the same time
        assert found["links"] == expected["links"]
        assert found["flows"] == expected["flows"]
    assert found["packets"] == pytest.approx(expected["packets"], rel=0.02)
    assert [flow["sent"] for flow in found["flows"]] == [sender.sent for sender in senders]
    for one, other in zip(found["flows"], expected["flows"], strict=True):
        assert one["sent"] == pytest.approx(other["sent"], rel=0.02 if len(senders) == 1 else 0.4)
        assert (one["name"], one["rtt"]) == (other["name"], other["rtt"])
    for figure, wanted in expected["figures"].items():
        # Delays are in seconds, all others parts of one, but settled: a run is too short for that.
        near = 0.002 if figure.startswith(("delay", "standing")) else 0.02
        if name != "share" or figure in {"utilisation", "loss"}:
            assert found["figures"][figure] == pytest.approx(wanted, abs=near), figure
    for sender in senders:
        state = json.loads(json.dumps(sender.state()))
        assert state["sent"] == sender.sent
        assert (state["controller"] is None) == isinstance(sender, Source)


def test_a_sender_that_hears_nothing_probes() -> None:
    network = OpenNetwork("steady", ("cubic",), seconds=30, seed=SEED)
    (remote,) = network.remotes
    assert isinstance(remote, RemoteFlow)
    flow = Flow(remote)
    flow.acknowledged(0.0, Acknowledgement(((0, 5),), 0.0, 0))  # before anything was sent
    words: list[int] = []
    while flow.due < 30:
        before = len(words)
        now = flow.due
        flow.pump(now, words)
        assert flow.due > now or len(words) == before
    assert [word & wire.NUMBER_MASK for word in words] == list(range(len(words)))
    assert flow.probes >= 3
    assert len(words) < 40, "the window was opened by silence"
    flow.overflowed(30.0, 3)
    assert flow.state()["controller"]["overflow_packets"] == 3


def test_a_source_ends() -> None:
    network = OpenNetwork("overload", (), seconds=1, seed=SEED)
    remote = network.remotes[0]
    assert isinstance(remote, RemoteSource)
    source = Source(remote)
    source.acknowledged(0.0, Acknowledgement((), 0.0, 0))
    source.overflowed(0.0, 1)
    words: list[int] = []
    source.pump(0.5, words)
    # 0.2 of 10 Mb/s in packets of 1,200 bytes, for half a second.
    assert len(words) == pytest.approx(104, abs=8)
    source.pump(100.0, words)
    assert source.due == math.inf
    assert len(words) == pytest.approx(208, abs=12)


def test_damaged_acknowledgements_go_nowhere() -> None:
    network = OpenNetwork("steady", ("cubic",), seconds=2, seed=SEED)
    (remote,) = network.remotes
    assert isinstance(remote, RemoteFlow)
    network.enter(0.0, remote, 0, 1200)
    network.enter(0.0, remote, 1, 1200)
    network.advance(0.03)
    (event,) = [entry for entry in network.engine._heap if getattr(entry[3], "body", None) is not None]
    event[3].corrupt = True
    network.advance(1.0)
    assert network.answers == []
    assert remote.record.acks_damaged == 1
    network.enter(1.0, remote, 2, 1200)
    network.advance(2.0)
    ((at, flow, said),) = network.answers
    assert flow == 0
    assert said.ranges == ((0, 2),)
    # Both ways, the packet's length at 100 Mb/s, and the delay of an acknowledgement of one packet.
    assert at == pytest.approx(1.0 + 0.04 + 1200 / 12.5e6 + 0.025)


def test_a_controller_is_the_simulation_s() -> None:
    """The same seed is drawn for it, so that what it does by chance is the same."""
    networks = [OpenNetwork("share", ("cubic",), seconds=3, seed=SEED) for _ in range(2)]
    for one, other in zip(networks[0].remotes, networks[1].remotes, strict=True):
        assert one.record.begin == other.record.begin
        assert isinstance(one, RemoteFlow)
        assert isinstance(one.make(0.0), FlowController)


# --- bytes

numbers = st.integers(0, (1 << 62) - 1)


@given(
    flow=st.integers(0, 65_535),
    ranges=st.lists(st.tuples(numbers, numbers), max_size=2 * RANGES),
    delay=st.floats(0, 4000),
    ce_count=st.integers(0, 1 << 40),
)
def test_an_acknowledgement_arrives_as_it_was(
    flow: int, ranges: list[tuple[int, int]], delay: float, ce_count: int
) -> None:
    payload = wire.encode(flow, Acknowledgement(tuple(ranges), delay, ce_count))
    assert len(payload) <= 12 + 16 * RANGES < wire.NUMBER_MASK
    read = wire.decode(payload)
    assert read is not None
    assert read[0] == flow
    assert read[1].ranges == tuple(ranges[:RANGES])
    assert read[1].delay == pytest.approx(delay, abs=1e-6)
    assert read[1].ce_count == ce_count % (1 << 32)


@given(st.binary(max_size=1300) | st.builds(lambda n, rest: struct.pack("!HHII", 0, n, 0, 0) + rest,
                                            st.integers(0, 65_535), st.binary(max_size=600)))  # fmt: skip
def test_anything_may_come(payload: bytes) -> None:
    read = wire.decode(payload)
    if read is None:
        return
    assert wire.encode(*read) == payload
    controller = FlowController(0.0, congestion="newreno")
    controller.on_packet_sent(0.0, 1200)
    outcome = controller.on_ack_received(0.1, read[1].ranges, read[1].delay, read[1].ce_count)
    assert 0 <= controller.in_flight <= 1200
    assert outcome is not None


def test_a_task_comes_by_the_command_line() -> None:
    task: dict[str, Any] = {"scenario": "loss", "controllers": ["bbr"], "seconds": 1.0, "seed": 2,
                            "interface": "srv0", "peer": "10.81.0.2"}  # fmt: skip
    read = wire.read_task(["", json.dumps(task)])
    assert (read.controllers, read.mode) == (("bbr",), "auto")
    for words in ([""], ["", "{}"], ["", "["], ["", json.dumps({**task, "mode": "fast"})]):
        with pytest.raises(UsageError):
            wire.read_task(words)


def test_who_is_told_no_time_does_not_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("12.25\n"))
    assert wire.begin({"mode": "mmsg"}) == 12.25
    assert json.loads(capsys.readouterr().out) == {"ready": {"mode": "mmsg"}}
    with pytest.raises(UsageError):
        wire.begin({})


def test_clock() -> None:
    clock = wire.Clock(100.0)
    assert clock.of(100_500_000_000) == pytest.approx(0.5)
    assert clock.of(0) == -100.0


# --- what people see


def test_real_beside_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    simulated = simulate(scenario("overload"), (), seed=SEED, seconds=1)[0].document()
    late = lateness([0.004, 0.001, 0.002, 0.003])
    assert late == {"p50": 0.002, "p95": 0.004, "p99": 0.004, "max": 0.004}
    assert lateness([])["max"] == 0.0
    real = json.loads(json.dumps(simulated)) | {
        "sender": {"sent": 10_500, "cpu": 0.25},
        "relay": {"cpu": 0.5},
        "cable": {"dropped": 3, "missing": 2},
        "timers": {"relay_late": late, "sender_late": late},
    }
    real["flows"][0]["delay_p99"] = 0.0071
    real["thresholds"][0]["holds"] = False
    real["figures"]["settled"] = 1.25
    run = {"scenario": "overload", "controllers": [], "seconds": 1.0, "mode": "native-copy", "real": real,
           "simulated": simulated}  # fmt: skip
    show(Output(), [run])
    written = capsys.readouterr()
    assert "overload: the machine was busy" in written.err
    lines = written.out.splitlines()
    assert lines[0].startswith("overload: ten times the capacity, in three priorities; sources, 1 s, native")
    said = next(line for line in lines if line.startswith("high: delay p99, ms"))
    assert said.split()[4:] == ["7.10", f"{1e3 * simulated['flows'][0]['delay_p99']:.2f}", "at", "most",
                                "5.00", "missed"]  # fmt: skip
    assert any(line.split() == ["settled,", "s", "1.2", "never"] for line in lines)
    assert any(line.startswith("high: lost, %") and line.endswith("holds") for line in lines)
    assert "overload: no counter tells of 2 packets" in lines
    assert any("late by 2.00, 4.00 and 4.0 ms, the sender woke" in line for line in lines)


def test_which_controllers_run() -> None:
    assert controllers_of(scenario("steady"), ()) == [(DEFAULT_CONTROLLER,)]
    assert controllers_of(scenario("loss"), ()) == [("bbr",)]  # that is what it is about
    assert controllers_of(scenario("loss"), ("cubic", "copa")) == [("cubic",), ("copa",)]
    assert controllers_of(scenario("overload"), ("cubic",)) == [()]
    assert controllers_of(scenario("mixed"), ("copa",)) == [("cubic", "bbr")]


@pytest.mark.parametrize(
    "words",
    [
        ("--scenario", "none"),
        ("--controller", "none"),
        ("--seconds", "0"),
        ("--seed", "-1"),
        ("--mode", "fast"),
    ],
)
def test_options_out_of_range(words: tuple[str, str]) -> None:
    """Told before anything is made."""
    done = CliRunner().invoke(lab_flow.flow, words)
    assert done.exit_code == 2 or isinstance(done.exception, UsageError)

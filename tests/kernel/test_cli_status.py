# SPDX-License-Identifier: Apache-2.0
"""`sluice status`, `lanes`, `peers` and `down` on the real steer program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.steered import FAR, NEAR, Steered, in_namespace, namespace, udp_frame, until
from userspace.datagram.flow_publisher import FlowPublisher
from userspace.flow.controller import FlowController
from xdp import inventory
from xdp._libbpf import lib
from xdp.link import Link
from xdp.owner_state import read_state, state_path, write_state

pytestmark = [pytest.mark.root, pytest.mark.bpf]

FRAMES = (
    [udp_frame("10.1.2.3", 8001)] * 5  # staked, votes
    + [udp_frame("203.0.113.9", 8001)] * 3  # unknown: dropped
    + [udp_frame("192.0.2.8", 8003, b"x")] * 40  # bob, bulk: 16 of them within the burst
    + [udp_frame("198.51.100.3", 8001)]  # banned
    + [udp_frame("10.1.2.3", 53)] * 2  # not ours
)


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    """The program after `FRAMES`; its owner left its state."""
    with namespace(tmp_path_factory.mktemp("status")) as made:
        made.hold(state=state_file(made))
        made.send(FRAMES)
        until(lambda: seen(made) == len(FRAMES), "all packets counted")
        yield made


def state_file(made: Steered) -> Path:
    return state_path(NEAR, in_namespace(made.name, inventory.namespace_inode))


def seen(made: Steered) -> int:
    return int(status(made)["counters"]["seen"]["packets"])


def status(made: Steered) -> Any:
    return made.json("status", "--interval", "0.05")


def test_status_says_what_is_loaded(steered: Steered) -> None:
    document = status(steered)
    owner = steered.processes[0].pid
    assert document["interface"] == NEAR
    assert document["attached"] == "native"
    assert document["program"]["name"] == inventory.PROGRAM_NAME
    assert document["link"] > 0
    assert document["pins"] == []
    assert [(one["pid"], one["link"]) for one in document["holders"]] == [(owner, True)]
    assert document["owner"]["pid"] == owner
    assert document["owner"]["alive"] is True
    assert document["owner"]["policy"].endswith("policy.toml")
    assert document["mode"] == "native copy"
    assert document["refused"] == [{"mode": "native zero-copy", "reason": "veth has none"}]


def test_status_counts_and_adds_up(steered: Steered) -> None:
    counters = status(steered)["counters"]
    assert counters["balanced"] is True
    assert counters["seen"]["packets"] == len(FRAMES)
    total = sum(counters[name] for name in ("passed", "steered", "dropped", "replied"))
    assert total == counters["seen"]["packets"]
    verdicts = {name: count["packets"] for name, count in counters["verdicts"].items()}
    assert verdicts["drop_policy"] == 3
    assert verdicts["drop_denied"] == 1
    assert verdicts["pass_not_ours"] == 2
    assert verdicts["pass_no_socket"] + verdicts["drop_lane_limit"] == 45


def test_status_as_text(steered: Steered) -> None:
    text = steered.sluice("status", NEAR, "--interval", "0.05", "--verbose").stdout
    assert "mode       native copy" in text
    assert "not native zero-copy: veth has none" in text
    assert f"(pid {steered.processes[0].pid})" in text
    assert "drop_denied" in text


def test_status_without_the_owners_word(steered: Steered) -> None:
    """Left-over and foreign files count for nothing."""
    path = state_file(steered)
    original = path.read_bytes()
    state = read_state(path)
    assert state is not None
    try:
        import msgspec

        for content in (b"{", b"[]", original.replace(b'"version":1', b'"version":2')):
            path.write_bytes(content)
            assert status(steered)["mode_known_from"] == "link"
        write_state(path, msgspec.structs.replace(state, program_id=state.program_id + 1))
        document = status(steered)
        assert (document["mode"], document["owner"]) == ("native", None)
        path.write_bytes(original)
        path.chmod(0o666)
        assert status(steered)["owner"] is None
        path.unlink()
        assert "the owner left no word" in steered.sluice("status", "--interval", "0.05").stdout
    finally:
        write_state(path, state)
    assert status(steered)["mode_known_from"] == "owner"


def test_rates_come_from_two_samples(steered: Steered) -> None:
    watch = follow(steered, "status", "--interval", "0.2", "--watch", "--json")
    assert watch.stdout is not None
    try:
        for line in watch.stdout:
            counters = json.loads(line)["counters"]
            rate = counters["packets_per_second"]
            if rate["seen"]:
                break
            steered.send([udp_frame("10.1.2.3", 53)] * 50)
        packets = rate["seen"] * counters["seconds"]
        assert packets == pytest.approx(round(packets), abs=0.01)
        assert rate["passed"] == rate["seen"]
        assert counters["bits_per_second"] == pytest.approx(rate["seen"] * 50 * 8, rel=0.001)
    finally:
        steered.stop(watch)


def follow(made: Steered, *words: str) -> subprocess.Popen[str]:
    command = made.command(sys.executable, "-m", "sluice_cli", *words)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=made.environment()
    )
    made.processes.append(process)
    return process


@pytest.mark.parametrize("command", ["status", "lanes", "peers"])
def test_ctrl_c_ends_a_watch_quietly(steered: Steered, command: str) -> None:
    watch = follow(steered, command, "--watch", "--interval", "0.05")
    assert watch.stdout is not None
    assert watch.stderr is not None
    assert watch.stdout.readline()
    watch.send_signal(signal.SIGINT)
    rest = watch.stdout.read()
    errors = watch.stderr.read()
    assert watch.wait(timeout=30) == 130
    assert "Traceback" not in rest + errors
    assert errors.strip() == ""
    steered.stop(watch)


def test_lanes(steered: Steered) -> None:
    document = steered.json("lanes", "--interval", "0.05")
    votes, bulk = document["lanes"]
    assert (votes["name"], votes["lane"], votes["end"]) == ("votes", 0, "socket")
    assert votes["seen"]["packets"] == 5
    assert votes["verdicts"]["pass_no_socket"]["packets"] == 5
    assert "rate" not in votes
    assert (bulk["name"], bulk["rate"], bulk["over"]) == ("bulk", 1000.0, "drop")
    assert bulk["seen"]["packets"] == 40
    assert 0 < bulk["dropped"] == bulk["verdicts"]["drop_lane_limit"]["packets"] <= 24
    assert votes["balanced"]
    assert bulk["balanced"]
    text = steered.sluice("lanes", "--interval", "0.05").stdout
    assert "1000/s, burst 16" in text
    assert len(steered.json("lanes", "--interval", "0.05", "--all")["lanes"]) == 8


def peers(made: Steered, *words: str) -> list[Any]:
    return list(made.json("peers", *words)["peers"])


def test_peers(steered: Steered) -> None:
    everyone = peers(steered)
    assert [one["address"] for one in everyone] == ["192.0.2.8", "10.1.2.3", "203.0.113.9", "198.51.100.3"]
    bob = everyone[0]
    assert (bob["name"], bob["origin"], bob["class_name"], bob["packets"]) == (
        "bob",
        "configured",
        "staked",
        40,
    )
    assert everyone[1]["packets"] == 5  # port 53 is not ours, and counts for nobody
    assert [one["address"] for one in peers(steered, "--all")][-1] == "192.0.2.7"
    assert [one["address"] for one in peers(steered, "--top", "1")] == ["192.0.2.8"]
    assert peers(steered, "--sort", "drops")[0]["drops"] > 3
    assert peers(steered, "--sort", "bytes")[0]["bytes"] == 40 * 43
    assert peers(steered, "--sort", "last_seen")[-1]["last_seen_ns"] <= bob["last_seen_ns"]
    assert {one["address"] for one in peers(steered, "--class", "staked")} == {"192.0.2.8", "10.1.2.3"}
    assert [one["address"] for one in peers(steered, "--class", "2")] == ["198.51.100.3"]
    assert [one["address"] for one in peers(steered, "--address", "10.0.0.0/8")] == ["10.1.2.3"]
    assert peers(steered, "--address", "2001:db8::/32") == []


def test_peers_as_text(steered: Steered) -> None:
    text = steered.sluice("peers", "--top", "2")
    assert text.stdout.splitlines()[1].split()[:4] == ["192.0.2.8", "bob", "staked", "40"]
    assert "2 of 4 peers" in text.stderr
    assert steered.sluice("peers", "--address", "10.9.0.0/16").stdout == "no peer matches\n"


def test_peers_with_flow_control(steered: Steered) -> None:
    """What a program tells of its flow control is beside the peers that it is about, while it runs."""
    flow = FlowController(0.0)
    flow.on_packet_sent(1.0, 1000)
    flow.on_ack_received(1.02, [(0, 0)])
    assert all("flows" not in one for one in peers(steered))
    with FlowPublisher(lambda: [(("192.0.2.8", 9000), flow)], "answers") as publisher:
        assert publisher.publish(0.0)
        bob = peers(steered)[0]
        (told,) = bob["flows"]
        assert (told["port"], told["program"], told["pid"]) == (9000, "answers", os.getpid())
        assert (told["window"], told["smoothed_rtt"], told["level"]) == (flow.window, 0.02, "none")
        head, first, *others = steered.sluice("peers").stdout.splitlines()
        columns = [column.strip() for column in head.split("  ") if column]
        assert columns[-6:] == ["window", "on its way", "rate", "round trip", "loss", "congestion"]
        assert first.split()[-4:] == ["20", "ms", "0.0%", "none"]
        assert not any("none" in line for line in others)
    assert all("flows" not in one for one in peers(steered))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class", "nobles"], "no class 'nobles'"),
        (["--class", "16"], "no class '16'"),
        (["--address", "10.0.0.1/8"], "--address: 10.0.0.1/8 has host bits set"),
        (["--sort", "name"], "invalid value for '--sort'"),
        (["--top", "0"], "invalid value for '-n' / '--top'"),
    ],
)
def test_peers_refuses(steered: Steered, words: list[str], message: str) -> None:
    done = steered.sluice("peers", *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_peers_watch_sorts_by_rate(steered: Steered) -> None:
    watch = follow(steered, "peers", "--watch", "--interval", "0.1", "--json", "--top", "1")
    assert watch.stdout is not None
    try:
        for line in watch.stdout:
            (first,) = json.loads(line)["peers"]
            if first["packets_per_second"]:
                break
            steered.send([udp_frame("203.0.113.77", 8001)] * 30)
        assert first["address"] == "203.0.113.77"
        assert first["drops_per_second"] == first["packets_per_second"]
    finally:
        steered.stop(watch)


# --- down --------------------------------------------------------------------------------------------------


def gone(made: Steered) -> bool:
    return in_namespace(made.name, inventory.attachments) == []


def test_down_ends_the_owner_and_can_be_repeated(tmp_path: Path) -> None:
    with namespace(tmp_path) as made:
        assert made.json("down") == {
            "version": 1,
            "interface": None,
            "removed": False,
            "settings": [],
        }
        owner = made.hold(state=state_file(made))
        document = made.json("down")
        assert (document["removed"], document["signalled"]) == (True, [owner.pid])
        assert gone(made)
        assert owner.wait(timeout=30) == 0  # it ended by itself, and cleaned up
        assert not state_file(made).exists()
        again = made.sluice("down", NEAR)
        assert (again.returncode, again.stdout) == (0, f"nothing is loaded on {NEAR}\n")


def test_down_leaves_others_alone(tmp_path: Path) -> None:
    with namespace(tmp_path) as made:
        foreign = made.hold(None, interface=FAR)
        owner = made.hold()
        refused = made.sluice("down", FAR)
        assert refused.returncode == 6
        assert "(somebody_else), which is not Sluice's" in refused.stderr
        # an owner that left no state may be anything: only when told to
        asked = made.sluice("down")
        assert asked.returncode == 6
        assert f"(pid {owner.pid}), which is not a `sluice up`" in asked.stderr
        assert owner.poll() is None
        done = made.sluice("down", "--force")
        assert done.returncode == 0
        assert done.stdout.endswith(f"off {NEAR}; ended process {owner.pid}\n")
        assert owner.wait(timeout=30) == 0
        assert foreign.poll() is None
        assert [one.interface for one in in_namespace(made.name, inventory.attachments)] == [FAR]


def test_down_of_an_owner_that_does_not_listen(tmp_path: Path) -> None:
    with namespace(tmp_path) as made:
        owner = made.hold(state=state_file(made))
        owner.send_signal(signal.SIGSTOP)
        try:
            done = made.sluice("down", "--timeout", "0.3")
            assert done.returncode == 6
            assert f"still on {NEAR} after 0.3 s, held by" in done.stderr
            assert made.json("down", "--timeout", "0.3", "--force")["removed"] is True
            assert gone(made)
        finally:
            owner.kill()
            owner.wait()
            state_file(made).unlink(missing_ok=True)


def test_down_removes_pins(tmp_path: Path) -> None:
    """A persisted program is held by a file below /sys/fs/bpf/sluice alone."""
    root = inventory.PIN_ROOT
    mounted = not os.path.ismount(root.parent)
    if mounted:
        subprocess.run(["mount", "-t", "bpf", "bpf", str(root.parent)], check=True)
    try:
        with namespace(tmp_path) as made:
            owner = made.hold()
            one = in_namespace(made.name, inventory.find)
            assert one.link_id is not None
            descriptor = lib.sluice_link_by_id(one.link_id)
            folder = root / made.name
            folder.mkdir(parents=True)
            link = Link(descriptor)
            link.pin(folder / "link")
            link.close()
            made.stop(owner)
            document = status(made)
            assert document["pins"] == [str(folder / "link")]
            assert document["holders"] == []
            assert "none: the pin keeps it" in made.sluice("status", "--interval", "0.05").stdout
            removed = made.json("down")
            assert removed["unpinned"] == [str(folder / "link")]
            assert gone(made)
            assert not folder.exists()
    finally:
        if mounted:
            subprocess.run(["umount", str(root.parent)], check=True)


def test_down_of_a_program_without_a_link(tmp_path: Path) -> None:
    from pyroute2 import IPRoute

    with namespace(tmp_path) as made:
        owner = made.hold(interface=FAR)
        one = in_namespace(made.name, inventory.find)
        descriptor = inventory.program_descriptor(one)

        def attach() -> None:
            with IPRoute() as route:
                attributes = [("IFLA_XDP_FD", descriptor), ("IFLA_XDP_FLAGS", lib.XDP_FLAGS_SKB_MODE)]
                route.link("set", index=route.link_lookup(ifname=NEAR)[0], xdp={"attrs": attributes})

        try:
            in_namespace(made.name, attach)
        finally:
            os.close(descriptor)
        made.stop(owner)
        assert "none: attached through netlink" in made.sluice("status", "--interval", "0.05").stdout
        assert made.json("down", NEAR)["removed"] is True
        assert gone(made)


def test_two_interfaces_need_a_name(tmp_path: Path) -> None:
    with namespace(tmp_path) as made:
        made.hold()
        made.hold(interface=FAR)
        for command in ("down", "status", "lanes", "peers"):
            done = made.sluice(command)
            assert done.returncode == 2, command
            assert f"Sluice runs on {FAR}, {NEAR}" in done.stderr

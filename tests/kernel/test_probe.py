# SPDX-License-Identifier: Apache-2.0
"""`sluice doctor`: what the kernel and an interface can do, asked of the real ones."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.steered import FAR, NEAR, Steered, in_namespace, namespace
from xdp import inventory, probe
from xdp.errors import UsageError
from xdp.probe_interface import driver_name, probe_interface, xdp_features

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    """A veth pair without any program."""
    with namespace(tmp_path_factory.mktemp("probe")) as made:
        yield made


def by_topic(findings: list[probe.Finding]) -> dict[str, probe.Finding]:
    found = {one.topic: one for one in findings}
    assert len(found) == len(findings), "every topic once"
    return found


def about(made: Steered, name: str) -> dict[str, probe.Finding]:
    return by_topic(in_namespace(made.name, lambda: probe_interface(name)))


def test_this_machine_can_load_sluice() -> None:
    """It can: the other kernel tests do. So nothing essential may be missing."""
    found = by_topic(probe.probe_host())
    assert [one for one in found.values() if one.essential and one.state == "missing"] == []
    for topic in (
        "XDP programs",
        "map types",
        "XDP helpers",
        "bpf_link for XDP",
        "AF_XDP sockets",
        "bcc",
        "privileges",
    ):
        assert found[topic].state == "ok", found[topic]
    assert found["libbpf"].detail.startswith("v1.")
    assert "libxdp.so." in found["libxdp"].detail
    assert Path(found["kernel headers"].detail).is_dir()
    for one in found.values():
        assert one.advice or one.state == "ok", one


def test_the_probe_leaves_nothing_behind() -> None:
    def programs() -> set[str]:
        done = subprocess.run(["bpftool", "-j", "prog", "show"], capture_output=True, check=True)
        return {str(one["id"]) for one in json.loads(done.stdout) if one.get("name") == "sluice_probe"}

    before = inventory.attachments()
    probe.probe_host()
    assert programs() == set()
    assert inventory.attachments() == before


def test_a_veth_is_what_it_is(pair: Steered) -> None:
    found = about(pair, NEAR)
    assert found["interface"].state == "ok"
    assert found["interface"].detail.startswith("veth")
    assert found["native XDP"].state == "ok"
    assert "redirect" in found["native XDP"].detail
    assert found["AF_XDP zero-copy"].state == "warn"
    assert found["program"] == probe.Finding("program", "ok", "none on the interface")
    assert found["queues"].detail.startswith("1 of")
    assert found["veth"].state == "warn"
    assert found["MTU"] == probe.Finding("MTU", "ok", "1500")
    assert in_namespace(pair.name, lambda: driver_name(NEAR)) == "veth"


def test_settings_that_hurt_are_named(pair: Steered) -> None:
    subprocess.run(["ip", "-n", pair.name, "link", "set", FAR, "mtu", "9000", "down"], check=True)
    try:
        found = about(pair, FAR)
        assert found["MTU"].detail.startswith("9000")
        # veth takes packets in several pages; so it is the kernel that decides.
        jumbo = by_topic(probe.probe_host())["AF_XDP jumbo frames"]
        assert found["MTU"].state == jumbo.state
        assert found["interface"].state == "warn"
        assert found["interface"].advice == f"ip link set dev {FAR} up"
        subprocess.run(["ip", "-n", pair.name, "link", "set", FAR, "mtu", "2000"], check=True)
        assert "frame_size = 4096" in about(pair, FAR)["MTU"].advice
    finally:
        subprocess.run(["ip", "-n", pair.name, "link", "set", FAR, "mtu", "1500", "up"], check=True)


@pytest.mark.parametrize("feature", ["rx-udp-gro-forwarding", "rx-gro-list"])
def test_merging_for_a_router_is_named(pair: Steered, feature: str) -> None:
    def switch(state: str) -> None:
        words = ["ip", "netns", "exec", pair.name, "ethtool", "-K", NEAR, feature, state]
        subprocess.run(words, check=True, capture_output=True)

    assert about(pair, NEAR)["offloads"].state == "ok"
    assert "GRO forwarding" not in about(pair, NEAR)
    switch("on")
    try:
        found = about(pair, NEAR)["GRO forwarding"]
        assert found.state == "warn"
        assert f"ethtool -K {NEAR} {feature} off" in found.advice
    finally:
        switch("off")
    assert "GRO forwarding" not in about(pair, NEAR)


def test_an_interface_without_native_xdp(pair: Steered) -> None:
    subprocess.run(["ip", "-n", pair.name, "link", "add", "dummy7", "type", "ifb"], check=True)
    subprocess.run(["ip", "-n", pair.name, "link", "add", "bridge7", "type", "bridge"], check=True)
    subprocess.run(["ip", "-n", pair.name, "link", "set", "dummy7", "master", "bridge7"], check=True)
    try:
        found = about(pair, "dummy7")
        assert found["native XDP"].state == "warn"
        assert found["master"].state == "warn"
        assert in_namespace(pair.name, lambda: driver_name("lo")) == ""
        assert about(pair, "lo")["native XDP"].state == "warn"
    finally:
        subprocess.run(["ip", "-n", pair.name, "link", "del", "dummy7"], check=True)
        subprocess.run(["ip", "-n", pair.name, "link", "del", "bridge7"], check=True)


def test_several_queues(pair: Steered) -> None:
    words = [
        "link",
        "add",
        "many",
        "numrxqueues",
        "4",
        "numtxqueues",
        "4",
        "type",
        "veth",
        "peer",
        "name",
        "other",
    ]
    subprocess.run(["ip", "-n", pair.name, *words], check=True)
    try:
        assert about(pair, "many")["queues"].detail.endswith("of 4")
    finally:
        subprocess.run(["ip", "-n", pair.name, "link", "del", "many"], check=True)


def test_programs_on_the_interface(tmp_path: Path) -> None:
    with namespace(tmp_path) as made:
        made.hold()
        made.hold(None, interface=FAR)
        ours, other = about(made, NEAR)["program"], about(made, FAR)["program"]
        assert ours.state == "ok"
        assert ours.detail.startswith("Sluice's: ")
        assert other.state == "warn"
        assert "somebody_else" in other.detail


def test_features_are_bits_or_unknown(pair: Steered) -> None:
    import socket

    features = in_namespace(pair.name, lambda: xdp_features(socket.if_nametoindex(NEAR)))
    assert features is not None
    assert features & 1


def test_unknown_interfaces_are_refused(pair: Steered) -> None:
    with pytest.raises(UsageError, match="no interface 'eth77' here"):
        about(pair, "eth77")
    assert pair.sluice("doctor", "eth77").returncode == 2


def test_the_command(pair: Steered) -> None:
    document = pair.json("doctor", NEAR)
    assert document["ok"] is True
    assert document["essential_missing"] == []
    assert document["interface"]["name"] == NEAR
    rows: list[dict[str, Any]] = [*document["host"], *document["interface"]["findings"]]
    assert {row["state"] for row in rows} <= {"ok", "warn", "missing"}
    text = pair.sluice("doctor", NEAR).stdout
    assert f"interface {NEAR}" in text
    assert text.splitlines()[-1] == "Sluice can be loaded here"
    assert "-> copy mode works" in text


def test_without_privileges_it_says_so_and_nothing_untrue(pair: Steered) -> None:
    done = pair.as_nobody("doctor", "--json")
    assert done.returncode == 5, done.stderr
    document = json.loads(done.stdout)
    found = {row["topic"]: row for row in document["host"]}
    assert document["essential_missing"] == ["privileges"]
    assert "CAP_BPF" in found["privileges"]["detail"]
    for topic in ("XDP programs", "map types", "XDP helpers", "bpf_link for XDP"):
        assert found[topic]["state"] == "warn"
        assert "can't be asked" in found[topic]["detail"]

# SPDX-License-Identifier: Apache-2.0
"""The router beside the kernel: what it says is what `ip route get` says, whatever changes."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sluice_cli.lab import Host, Lab
from tests.kernel.datapath import until
from xdp import routes
from xdp.errors import UsageError
from xdp.routes import Elsewhere, Route, Router

pytestmark = pytest.mark.root

NOW = 1000.0  # any clock's seconds


def ip(host: Host, *arguments: str) -> str:
    """The command, in a host."""
    done = host.run(["ip", *arguments], check=False)
    assert done.returncode == 0, done.stderr
    output: str = done.stdout
    return output


@contextlib.contextmanager
def router_of(host: Host) -> Iterator[Router]:
    with host.enter():
        made = Router(host.interface)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
def router(lab: Lab) -> Iterator[Router]:
    with router_of(lab.server) as made:
        yield made


def known(router: Router, address: str) -> Route:
    """The route, once all reports that are on their way have come."""

    def found() -> Route | None:
        router.poll()
        answer = router.find(address, NOW)
        return answer if isinstance(answer, Route) else None

    answer = until(found, f"a route to {address}: {router.find(address, NOW)}")
    assert answer is not None
    return answer


def unknown(router: Router, address: str) -> Elsewhere:
    def found() -> Elsewhere | None:
        router.poll()
        answer = router.find(address, NOW)
        return answer if isinstance(answer, Elsewhere) else None

    answer = until(found, f"no route to {address}")
    assert answer is not None
    return answer


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


@pytest.mark.parametrize("version", [4, 6])
def test_a_neighbour_is_known_when_the_kernel_knows_it(lab: Lab, router: Router, version: int) -> None:
    address = str(lab.client.ipv4 if version == 4 else lab.client.ipv6)
    assert "not known yet" in unknown(router, address).reason
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with lab.server.enter(), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"", (address, 9))  # what the data path does: one through the kernel
    route = known(router, address)
    assert route.hop.mac == mac(lab.client.mac)
    assert route.source_mac == mac(lab.server.mac)
    assert route.source == str(lab.server.ipv4 if version == 4 else lab.server.ipv6)
    assert (route.mtu, route.vlan, route.hops) == (1500, None, 64)


def test_gateways_and_metrics(lab: Lab, router: Router) -> None:
    server = lab.server
    dev = ("dev", server.interface)
    ip(server, "neigh", "replace", "10.81.0.77", "lladdr", "02:00:00:00:00:77", *dev)
    ip(server, "neigh", "replace", "fe80::77", "lladdr", "02:00:00:00:06:77", *dev)
    ip(server, "route", "add", "198.51.100.0/24", "via", "10.81.0.77", "mtu", "1400", "hoplimit", "17")
    ip(server, "route", "add", "203.0.113.0/24", "via", "inet6", "fe80::77", *dev)
    route = known(router, "198.51.100.9")
    assert (route.hop.mac, route.mtu, route.hops) == (mac("02:00:00:00:00:77"), 1400, 17)
    assert known(router, "203.0.113.5").hop.mac == mac("02:00:00:00:06:77")  # RFC 8950
    ip(server, "link", "set", server.interface, "mtu", "1300")
    ip(server, "neigh", "replace", "10.81.0.78", "lladdr", "02:00:00:00:00:78", *dev)
    assert known(router, "10.81.0.78").mtu == 1300
    ip(server, "link", "set", server.interface, "down")
    assert unknown(router, "10.81.0.78").reason


def test_groups_have_their_own_addresses(lab: Lab, router: Router) -> None:
    ip(lab.server, "route", "add", "224.0.0.0/4", "dev", lab.server.interface)
    route = known(router, "239.129.3.4")
    assert (route.hop.mac, route.hops) == (mac("01:00:5e:01:03:04"), 1)
    assert known(router, "ff15::1:2").hop.mac == mac("33:33:00:01:00:02")
    with lab.server.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as member:
        group = struct.pack(
            "=4s4si", bytes((239, 129, 3, 5)), bytes(4), lab.server.ifindex
        )  # struct ip_mreqn
        member.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        assert "group that it is in" in unknown(router, "239.129.3.5").reason


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1", "another interface"),
        ("10.81.0.1", "another interface"),  # its own
        ("192.0.2.99", "unreachable"),
        ("10.81.255.255", "nobody's"),  # broadcast
        ("no address", "is not an address"),
        ("fd81::1", "another interface"),
    ],
)
def test_what_the_kernel_sends_itself(router: Router, address: str, why: str) -> None:
    assert why in unknown(router, address).reason


def test_neighbours_come_change_and_go(lab: Lab, router: Router) -> None:
    dev = ("dev", lab.server.interface)
    for number, state in enumerate(("reachable", "permanent", "reachable", "stale", "permanent")):
        address = f"02:00:00:00:00:{number:02x}"
        ip(lab.server, "neigh", "replace", "10.81.0.50", "lladdr", address, "nud", state, *dev)

        def changed(address: str = address) -> bool:
            return known(router, "10.81.0.50").hop.mac == mac(address)

        until(changed, f"the new address {address}")
    ip(lab.server, "neigh", "del", "10.81.0.50", *dev)
    assert unknown(router, "10.81.0.50").reason


@pytest.mark.parametrize("version", [4, 6])
def test_who_was_not_found_without_a_carrier_is_looked_for_when_it_is_back(
    lab: Lab, router: Router, version: int
) -> None:
    """The kernel asks once a second.  Here it gets no answer, so what it has does not change by itself."""
    address = str(lab.client.ipv4 if version == 4 else lab.client.ipv6)

    def state() -> str:
        found = json.loads(ip(lab.server, "-j", "neigh", "show", "to", address, "nud", "all"))
        return found[0].get("state", ["NONE"])[0] if found else "NONE"

    def carrier() -> bool:
        router.poll()
        return router._carrier

    ip(lab.client, "link", "set", lab.client.interface, "down")
    until(lambda: not carrier(), "no carrier")
    assert isinstance(router.find(address, NOW), Elsewhere)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with lab.server.enter(), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"nobody hears", (address, 9))
    assert state() in {"INCOMPLETE", "FAILED"}
    # The address is gone: nobody answers.
    ip(lab.client, "address", "flush", "dev", lab.client.interface)
    ip(lab.client, "link", "set", lab.client.interface, "up")

    until(carrier, "a carrier")
    assert state() == "NONE"


def test_one_that_is_stale_is_confirmed_by_the_kernel_once(lab: Lab, router: Router) -> None:
    dev = ("dev", lab.server.interface)
    ip(lab.server, "neigh", "replace", "10.81.0.50", "lladdr", "02:00:00:00:00:50", "nud", "reachable", *dev)
    known(router, "10.81.0.50")
    ip(lab.server, "neigh", "replace", "10.81.0.50", "lladdr", "02:00:00:00:00:50", "nud", "stale", *dev)
    assert "confirmed" in unknown(router, "10.81.0.50").reason
    for _ in range(3):
        router.poll()
        assert isinstance(router.find("10.81.0.50", NOW), Route)


def test_asks_no_more_than_its_budget_between_two_looks(router: Router) -> None:
    asked = [router.find(f"10.81.1.{number}", NOW).reason for number in range(routes.BUDGET + 5)]  # type: ignore[union-attr]
    assert [("too many" in reason) for reason in asked] == [False] * routes.BUDGET + [True] * 5
    router.poll()
    assert "too many" not in router.find("10.81.1.250", NOW).reason  # type: ignore[union-attr]


def test_routes_are_asked_for_again_after_a_while(lab: Lab, router: Router) -> None:
    """For what is not reported."""
    ip(
        lab.server,
        "neigh",
        "replace",
        "10.81.0.50",
        "lladdr",
        "02:00:00:00:00:50",
        "dev",
        lab.server.interface,
    )
    first = known(router, "10.81.0.50")
    assert router.find("10.81.0.50", NOW + routes.MAX_AGE - 0.1) is first
    later = router.find("10.81.0.50", NOW + routes.MAX_AGE + 0.1)
    assert isinstance(later, Route)
    assert later is not first
    assert later.hop is first.hop


def test_old_routes_are_used_until_there_is_time_to_ask(lab: Lab, router: Router) -> None:
    """Many grow old in the same moment; some are asked for each time, the others are as right as before."""
    hops = [f"10.81.0.{number}" for number in range(50, 60)]
    for hop in hops:
        ip(lab.server, "neigh", "replace", hop, "lladdr", "02:00:00:00:00:50", "dev", lab.server.interface)
    before = [known(router, hop) for hop in hops]
    later = NOW + routes.MAX_AGE + 1
    for refreshed in (routes.REFRESHES, 2 * routes.REFRESHES, 3 * routes.REFRESHES):
        router.poll()
        found = [router.find(hop, later) for hop in hops]
        assert sum(new is not old for new, old in zip(found, before, strict=True)) == refreshed
        assert all(isinstance(one, Route) for one in found)


def test_lost_reports_are_changes_of_everything(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_RECEIVE_BUFFER", 1)  # the kernel makes it its least, some 2 KiB
    server = lab.server
    dev = ("dev", server.interface)
    with router_of(server) as router:
        ip(server, "neigh", "replace", "10.81.0.50", "lladdr", "02:00:00:00:00:50", *dev)
        ip(server, "neigh", "replace", "10.81.0.51", "lladdr", "02:00:00:00:00:51", *dev)
        ip(server, "route", "add", "198.51.100.0/24", "via", "10.81.0.50")
        known(router, "198.51.100.1")
        for number in range(100):  # far more than it has room for
            ip(server, "route", "add", f"203.0.113.{number}/32", "via", "10.81.0.50")
        ip(server, "route", "replace", "198.51.100.0/24", "via", "10.81.0.51")
        ip(server, "neigh", "replace", "10.81.0.51", "lladdr", "02:00:00:00:aa:51", *dev)
        assert known(router, "198.51.100.1").hop.mac == mac("02:00:00:00:aa:51")


def test_nothing_is_left_open(lab: Lab) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count is all that is wanted
    for _ in range(3):
        with router_of(lab.server) as router:
            router.find("10.81.0.2", NOW)
        router.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    with lab.server.enter(), pytest.raises(UsageError, match="no interface"):
        Router("nonesuch")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# Beside the kernel's own word, under random changes

TARGETS = [f"198.51.{number}.{number}" for number in range(6)] + ["10.81.0.50", "10.81.0.51", "10.81.0.1"]
HOPS = {f"10.81.0.{number}": f"02:00:00:00:00:{number:02x}" for number in range(50, 56)}


def random_change(rng: random.Random, host: Host) -> Callable[[], str]:
    dev = host.interface
    hop = rng.choice(list(HOPS))
    third, bits = rng.randrange(6), rng.choice((16, 24, 32))
    prefix = str(ipaddress.ip_network(f"198.51.{third}.{third}/{bits}", strict=False))
    table = str(rng.choice((254, 99)))
    changes = [
        ("route", "replace", prefix, "via", hop, "table", table),
        ("route", "replace", prefix, "via", hop, "mtu", str(rng.randrange(600, 1500)), "table", table),
        ("route", "replace", "unreachable", prefix, "table", table),
        ("route", "replace", prefix, "dev", "other0", "table", table),
        ("route", "flush", "root", prefix, "table", table),
        ("rule", "add", "to", prefix, "lookup", "99", "priority", str(rng.randrange(100, 200))),
        ("rule", "del", "lookup", "99"),
        ("neigh", "replace", hop, "lladdr", HOPS[hop][:-2] + f"{rng.randrange(256):02x}", "dev", dev),
        ("neigh", "del", hop, "dev", dev),
        ("addr", "replace", "10.82.0.9/24", "dev", dev),
        ("addr", "del", "10.82.0.9/24", "dev", dev),
    ]
    chosen = rng.choice(changes)

    def apply() -> str:
        host.run(["ip", *chosen], check=False)  # some have nothing to remove
        return " ".join(chosen)

    return apply


def word_of_the_kernel(host: Host, address: str) -> tuple[Any, ...] | None:
    """(source, next hop's MAC, MTU) of frames that the kernel would send by the host's interface, or None."""
    done = host.run(["ip", "-j", "-d", "route", "get", address], check=False)
    if done.returncode:
        return None
    (route,) = json.loads(done.stdout)
    if route["dev"] != host.interface or route.get("type", "unicast") != "unicast":
        return None
    hop = route.get("gateway", address)
    entries = json.loads(ip(host, "-j", "neigh", "show", hop, "dev", host.interface))
    macs = [entry["lladdr"] for entry in entries if "lladdr" in entry and entry["state"] != ["FAILED"]]
    if not macs:
        return None
    mtu = next((one["mtu"] for one in route.get("metrics", []) if "mtu" in one), 1500)
    return route["prefsrc"], mac(macs[0]), mtu


def test_random_changes(lab: Lab, router: Router) -> None:
    """After each change, and one look at the reports, the router says what the kernel says of all targets."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    ip(lab.server, "link", "add", "other0", "type", "veth", "peer", "name", "other1")
    ip(lab.server, "link", "set", "other0", "up")
    for address, lladdr in HOPS.items():
        ip(lab.server, "neigh", "replace", address, "lladdr", lladdr, "dev", lab.server.interface)
    frames = 0
    history = []
    for _ in range(60):
        history.append(random_change(rng, lab.server)())
        router.poll()
        for address in TARGETS:
            found = router.find(address, NOW)
            said = (found.source, found.hop.mac, found.mtu) if isinstance(found, Route) else None
            assert said == word_of_the_kernel(lab.server, address), (address, found, history)
            frames += said is not None
    assert frames


def test_beside_a_running_event_loop() -> None:
    """asyncio lets no second loop run in a thread."""

    async def main(lab: Lab) -> None:
        with router_of(lab.server) as router:
            for address in (lab.client.ipv4, lab.client.ipv6):
                assert isinstance(router.find(str(address), NOW), Route)

    with Lab(static_neighbours=True) as lab:
        asyncio.run(main(lab))

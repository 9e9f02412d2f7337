# SPDX-License-Identifier: Apache-2.0
"""What rtnetlink says of links and in reports, without a kernel; tests/kernel/test_routes.py has the rest."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from xdp import routes

UP, NOARP = 0x1, 0x80
OURS = 7


def message(index: int = OURS, flags: int = UP, **attributes: Any) -> ifinfmsg:
    link = ifinfmsg()
    link["index"], link["flags"] = index, flags
    named: dict[str, Any] = {"IFLA_ADDRESS": "02:00:00:00:00:01", "IFLA_MTU": 1500, **attributes}
    link["attrs"] = [(name, value) for name, value in named.items() if value is not None]
    link.encode()
    decoded = ifinfmsg(link.data)
    decoded.decode()
    return decoded


def tagged(number: int = 77, protocol: int = 0x8100, kind: str = "vlan", below: int = OURS) -> ifinfmsg:
    data = {"attrs": [("IFLA_VLAN_ID", number), ("IFLA_VLAN_PROTOCOL", protocol)]}
    info = [("IFLA_INFO_KIND", kind)] + ([("IFLA_INFO_DATA", data)] if kind == "vlan" else [])
    return message(9, IFLA_MTU=1300, IFLA_LINK=below, IFLA_LINKINFO={"attrs": info})


def test_our_link_and_vlans_on_top_of_it() -> None:
    link = routes._usable_link(message(), OURS)
    assert link == routes._Link(bytes.fromhex("020000000001"), 1500, None)
    link = routes._usable_link(tagged(), OURS)
    assert link == routes._Link(bytes.fromhex("020000000001"), 1300, 77)


@pytest.mark.parametrize(
    "link",
    [
        message(flags=0),
        message(flags=UP | NOARP),
        message(IFLA_ADDRESS=None),
        message(8),
        tagged(protocol=0x88A8),
        tagged(kind="macvlan"),
        tagged(below=8),
    ],
    ids=["down", "no ARP", "no address", "another", "802.1ad", "no VLAN", "VLAN of another"],
)
def test_links_that_frames_of_ours_cannot_leave_by(link: ifinfmsg) -> None:
    assert routes._usable_link(link, OURS) is None


@given(st.binary(max_size=200))
def test_hostile_reports_end_and_stay_within_their_bytes(data: bytes) -> None:
    bodies = list(routes._messages(data))
    assert sum(len(body) + 16 for _, body in bodies) <= len(data)
    for _, body in bodies:
        assert sum(len(value) + 4 for _, value in routes._attributes(body)) <= len(body)


def test_reports_are_read_one_after_the_other() -> None:
    one = struct.pack("=IHHII", 16 + 5, 24, 0, 0, 0) + b"12345" + bytes(3)
    two = struct.pack("=IHHII", 16, 28, 0, 0, 0)
    assert list(routes._messages(one + two)) == [(24, b"12345"), (28, b"")]
    attributes = struct.pack("=HH", 5, 1) + b"x" + bytes(3) + struct.pack("=HH", 4, 0x8002)
    assert dict(routes._attributes(attributes)) == {1: b"x", 2: b""}


def test_a_neighbours_states() -> None:
    hop = routes.Hop()
    mac = bytes(range(6))
    usable = {0x02, 0x04, 0x08, 0x10, 0x80}  # reachable, stale, delay, probe, permanent
    for state in (1 << bit for bit in range(8)):
        hop.update(state, mac)
        assert (hop.mac == mac) == (state in usable), hex(state)
        assert hop.unconfirmed == (state == 0x04)
    version = hop.version
    hop.update(0x80, mac)
    assert hop.version == version
    hop.update(0x80, b"short")
    assert hop.mac is None
    assert hop.version == version + 1

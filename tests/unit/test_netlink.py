# SPDX-License-Identifier: Apache-2.0
"""Questions to rtnetlink, about this machine's loopback."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Iterator

import pytest
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from xdp.netlink import Netlink

LOOPBACK = socket.if_nametoindex("lo")


@pytest.fixture(name="netlink")
def _netlink() -> Iterator[Netlink]:
    made = Netlink()
    yield made
    made.close()
    made.close()


def test_answers(netlink: Netlink) -> None:
    assert netlink.link(LOOPBACK).get_attr("IFLA_IFNAME") == "lo"
    route = netlink.route("127.0.0.1", socket.AF_INET)
    assert (route.get_attr("RTA_OIF"), route.get_attr("RTA_DST")) == (LOOPBACK, "127.0.0.1")
    through = netlink.route("127.0.0.1", socket.AF_INET, LOOPBACK)
    assert through.get_attr("RTA_OIF") == LOOPBACK


def test_refusals(netlink: Netlink) -> None:
    with pytest.raises(NetlinkError) as caught:
        netlink.link(0x7FFFFFFF)
    assert caught.value.code == errno.ENODEV
    with pytest.raises(NetlinkError) as caught:
        netlink.neighbour("127.0.0.99", socket.AF_INET, LOOPBACK)
    assert caught.value.code in {errno.ENOENT, errno.EINVAL}
    netlink.close()
    with pytest.raises(NetlinkError) as caught:
        netlink.link(LOOPBACK)
    assert caught.value.code == errno.EBADF


def test_an_answer_that_nobody_waited_for(netlink: Netlink) -> None:
    """It is not taken for that of the next question."""
    earlier = rtmsg()
    earlier["family"], earlier["dst_len"], earlier["attrs"] = socket.AF_INET, 32, [("RTA_DST", "127.0.0.1")]
    earlier["header"]["type"], earlier["header"]["flags"] = 26, 1  # RTM_GETROUTE, NLM_F_REQUEST
    earlier["header"]["sequence_number"] = 0xEEEE
    earlier.encode()
    netlink._socket.sendto(earlier.data, (0, 0))
    assert netlink.link(LOOPBACK).get_attr("IFLA_IFNAME") == "lo"


def test_beside_an_event_loop_and_in_other_threads(netlink: Netlink) -> None:
    names: list[str] = []

    async def main() -> None:
        names.append(netlink.link(LOOPBACK).get_attr("IFLA_IFNAME"))
        own = Netlink()
        names.append(own.link(LOOPBACK).get_attr("IFLA_IFNAME"))
        own.close()

    asyncio.run(main())
    thread = threading.Thread(target=lambda: names.append(netlink.link(LOOPBACK).get_attr("IFLA_IFNAME")))
    thread.start()
    thread.join()
    assert names == ["lo"] * 3

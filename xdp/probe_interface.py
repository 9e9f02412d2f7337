# SPDX-License-Identifier: Apache-2.0
"""What one interface can do for Sluice, and which of its settings stand in the way.

Asked through netlink and ethtool; nothing is changed.  Sources: Documentation/netlink/specs/netdev.yaml (XDP
features), Documentation/networking/ethtool-netlink.rst, Documentation/networking/af_xdp.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

from xdp import inventory, jumbo
from xdp._libbpf import lib
from xdp.errors import UsageError
from xdp.probe import Finding
from xdp.probe_tuning import probe_tuning

# enum netdev_xdp_act, linux/netdev.h (Linux 6.3)
XDP_FEATURES = {
    "basic": 1,
    "redirect": 2,
    "transmit": 4,
    "zero-copy": 8,
    "offload": 16,
    "multi-buffer": 32,
    "transmit multi-buffer": 64,
}
_NETDEV_CMD_DEV_GET = 1

_SIOCETHTOOL = 0x8946
_ETHTOOL_GDRVINFO = 3
_DRVINFO_SIZE = 196  # struct ethtool_drvinfo
_IFF_UP = 1

#: What [rings] frame_size may be, bytes; the first is the default.
_FRAME_SIZES = (2048, 4096)
#: A driver without multi-buffer needs a packet, its headroom and skb_shared_info within one page of 4 KiB.
_PAGE_ROOM = 3498


def probe_interface(name: str) -> list[Finding]:
    """All about an interface of this network namespace. Raises `UsageError` for an unknown name."""
    from pyroute2 import IPRoute

    names = inventory.interfaces()
    if name not in names:
        raise UsageError(f"no interface {name!r} here", hint=f"there are: {', '.join(names)}")
    with IPRoute() as route:
        message = route.get_links(socket.if_nametoindex(name))[0]
    driver = driver_name(name)
    return [
        *_link_state(name, message, driver),
        *_features(name, driver),
        *_attached(name),
        *_ethtool(name),
        *_veth(name, driver),
    ]


def _link_state(name: str, message: Any, driver: str) -> Iterator[Finding]:
    detail = f"{driver or 'no driver name'}, index {message['index']}"
    if message["flags"] & _IFF_UP:
        yield Finding("interface", "ok", detail)
    else:
        yield Finding("interface", "warn", f"{detail}, down", f"ip link set dev {name} up")
    mtu = int(message.get_attr("IFLA_MTU") or 0)
    yield _mtu(name, mtu)
    if master := message.get_attr("IFLA_MASTER"):
        advice = (
            "attach to the interfaces that carry the traffic; a bridge or bond never sees what is steered"
        )
        yield Finding("master", "warn", f"enslaved to interface {master}", advice)


def _mtu(name: str, mtu: int) -> Finding:
    usual, largest = _FRAME_SIZES
    if jumbo.fits_a_frame(mtu, usual):
        return Finding("MTU", "ok", f"{mtu}")
    if jumbo.fits_a_frame(mtu, largest) and mtu <= _PAGE_ROOM:
        room = usual - jumbo.HEADROOM
        advice = f"packets above {room} bytes don't fit a frame: frame_size = {largest} in [rings]"
        return Finding("MTU", "warn", f"{mtu}", advice)
    if refusal := jumbo.kernel_refusal():
        advice = f"ip link set dev {name} mtu 1500: what fits no frame can't be steered ({refusal})"
        return Finding("MTU", "warn", f"{mtu}", advice)
    features = xdp_features(socket.if_nametoindex(name)) or 0
    if features & XDP_FEATURES["basic"] and not features & XDP_FEATURES["multi-buffer"]:
        advice = f"ip link set dev {name} mtu 1500, or generic mode: the driver takes no such packets"
        return Finding("MTU", "warn", f"{mtu}", advice)
    return Finding("MTU", "ok", f"{mtu}, jumbo frames: packets may come in several frames")


def _features(name: str, driver: str) -> Iterator[Finding]:
    features = xdp_features(socket.if_nametoindex(name))
    if features is None:
        yield Finding(
            "native XDP",
            "warn",
            "this kernel doesn't say (before 6.3)",
            "try: sluice up says which mode held",
        )
        return
    has = [word for word, bit in XDP_FEATURES.items() if features & bit]
    if features & XDP_FEATURES["basic"]:
        yield Finding("native XDP", "ok", ", ".join(has))
    else:
        yield Finding(
            "native XDP", "warn", f"driver {driver or '?'} has none", "generic mode works, at a higher cost"
        )
    if features & XDP_FEATURES["zero-copy"]:
        yield Finding("AF_XDP zero-copy", "ok", "the driver offers it")
    else:
        yield Finding("AF_XDP zero-copy", "warn", "the driver has none", "copy mode works on every interface")


def xdp_features(ifindex: int) -> int | None:
    """The interface's NETDEV_XDP_ACT_* bits; None where the kernel has no netdev family (before 6.3)."""
    from pyroute2.netlink import NLM_F_REQUEST, genlmsg
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.generic import GenericNetlinkSocket

    class Device(genlmsg):  # type: ignore[misc] # pyroute2 has no types
        """enum netdev_a_dev."""

        prefix = "NETDEV_A_DEV_"
        nla_map = (
            ("NETDEV_A_DEV_UNSPEC", "none"),
            ("NETDEV_A_DEV_IFINDEX", "uint32"),
            ("NETDEV_A_DEV_PAD", "none"),
            ("NETDEV_A_DEV_XDP_FEATURES", "uint64"),
        )

    with GenericNetlinkSocket() as family:
        try:
            family.bind("netdev", Device)
            request = Device()
            request["cmd"] = _NETDEV_CMD_DEV_GET
            request["version"] = 1
            request["attrs"] = [["NETDEV_A_DEV_IFINDEX", ifindex]]
            answers = list(family.nlm_request(request, msg_type=family.prid, msg_flags=NLM_F_REQUEST))
        except NetlinkError as error:
            if error.code in (errno.ENOENT, errno.EOPNOTSUPP):
                return None
            raise
    found = answers[0].get_attr("NETDEV_A_DEV_XDP_FEATURES") if answers else None
    return None if found is None else int(found)


def _attached(name: str) -> Iterator[Finding]:
    found = [one for one in inventory.attachments() if one.interface == name]
    if not found:
        yield Finding("program", "ok", "none on the interface")
    for attachment in found:
        from xdp.link import program_name

        other = program_name(attachment.program_id)
        detail = f"{attachment.program_id} ({other}), {attachment.mode}"
        if other == inventory.PROGRAM_NAME:
            yield Finding("program", "ok", f"Sluice's: {detail}")
        else:
            advice = "`sluice up` refuses: have its owner take it off, or say --replace"
            yield Finding("program", "warn", f"somebody else's: {detail}", advice)


def _ethtool(name: str) -> Iterator[Finding]:
    from pyroute2.ethtool import Ethtool
    from pyroute2.ethtool.ioctl import NotSupportedError

    queues = 1
    with Ethtool() as tool:
        try:
            channels = tool.get_channels(name)
            queues = (channels.combined_count or 0) + (channels.rx_count or 0) or 1
            yield _queues(name, channels)
        except NotSupportedError:
            yield Finding("queues", "ok", "one (the driver has no channels to set)")
        try:
            rings = tool.get_rings(name)
        except NotSupportedError:
            rings = None
        if rings is not None and rings.rx and rings.rx_max and rings.rx < rings.rx_max:
            advice = f"ethtool -G {name} rx {rings.rx_max}: bursts that don't fit are lost before the program"
            yield Finding("receive ring", "warn", f"{rings.rx} of {rings.rx_max}", advice)
        try:
            coalescing = tool.get_coalesce(name)
        except NotSupportedError:
            coalescing = None
        features = tool.get_features(name).features
    on = {word for word, feature in features.items() if feature.enable}
    yield from _offloads(name, on)
    yield from probe_tuning(name, queues, on, coalescing)


def _offloads(name: str, on: set[str]) -> Iterator[Finding]:
    """What merges packets, before the program or behind it; ``on`` are ethtool's names."""
    before = [word for word in ("rx-lro", "rx-gro-hw") if word in on]
    if before:
        short = {"rx-lro": "lro", "rx-gro-hw": "rx-gro-hw"}
        switches = " ".join(f"{short[word]} off" for word in before)
        detail = f"the hardware merges packets ({', '.join(before)}), which XDP can't see"
        yield Finding("offloads", "warn", detail, f"ethtool -K {name} {switches}")
    else:
        yield Finding("offloads", "ok", "the hardware merges no packets")
    behind = [word for word in ("rx-udp-gro-forwarding", "rx-gro-list") if word in on]
    if behind:
        detail = f"UDP packets that are passed are merged to be forwarded ({', '.join(behind)})"
        switches = " ".join(f"{word} off" for word in behind)
        advice = f"unless this machine is a router: ethtool -K {name} {switches}; sockets get them later"
        yield Finding("GRO forwarding", "warn", detail, advice)


def _queues(name: str, channels: Any) -> Finding:
    count = (channels.combined_count or 0) + (channels.rx_count or 0)
    if count > lib.SLUICE_MAX_QUEUES:
        advice = (
            f"ethtool -L {name} combined {lib.SLUICE_MAX_QUEUES}: packets of higher queues go to the kernel"
        )
        return Finding("queues", "warn", f"{count}", advice)
    most = (channels.max_combined or 0) + (channels.max_rx or 0)
    return Finding("queues", "ok", f"{count} of {max(count, most)}")


def _veth(name: str, driver: str) -> Iterator[Finding]:
    if driver == "veth":
        advice = "replies by XDP_TX need an XDP program and `ethtool -K PEER tx off` on the other end"
        yield Finding("veth", "warn", f"{name} is one end of a pair in this machine", advice)


def driver_name(name: str) -> str:
    """The driver as `ethtool -i` shows it; "" when the interface has none to tell."""
    buffer = bytearray(struct.pack("=I", _ETHTOOL_GDRVINFO).ljust(_DRVINFO_SIZE, b"\0"))
    address = _address(buffer)
    request = struct.pack("16sP", os.fsencode(name)[:15], address).ljust(40, b"\0")  # struct ifreq
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            fcntl.ioctl(any_socket, _SIOCETHTOOL, request)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENODEV, errno.EPERM):
                return ""
            raise
    return bytes(buffer[4:36]).split(b"\0", 1)[0].decode("ascii", "replace")


def _address(buffer: bytearray) -> int:
    import ctypes

    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))

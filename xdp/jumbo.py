# SPDX-License-Identifier: Apache-2.0
"""Jumbo frames: whether packets in several frames are wanted here, and whether this kernel has them.

It takes a program that is loaded for them (BPF_F_XDP_HAS_FRAGS, Linux 5.18) and sockets that are bound for
them (XDP_USE_SG, Linux 6.6).  Sources: Documentation/networking/af_xdp.rst, net/xdp/xsk.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

from xdp._libbpf import lib
from xdp.errors import InterfaceGoneError, UnsupportedError
from xdp.policy_model import Rings

#: What the kernel keeps free in front of every packet in a frame, bytes (XDP_PACKET_HEADROOM).
HEADROOM = 256
#: An Ethernet header and two VLAN tags, bytes: what a packet has beyond its MTU.
ETHERNET_AND_TAGS = 14 + 8
#: With ``jumbo = true`` the room is for at least this MTU, the largest that is common.
COMMON_JUMBO_MTU = 9216

_SIOCGIFMTU = 0x8921  # linux/sockios.h


def read_mtu(interface: str) -> int:
    """The MTU of an interface of this thread's network namespace.  Raises InterfaceGoneError."""
    request = struct.pack("16si20x", os.fsencode(interface)[:15], 0)  # struct ifreq
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFMTU, request)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            raise InterfaceGoneError(
                f"there is no interface {interface!r} here", hint="`ip link` lists them"
            ) from error
    mtu: int = struct.unpack_from("i", answer, 16)[0]
    return mtu


def fits_a_frame(mtu: int, frame_size: int) -> bool:
    """Whether the longest packet of an interface fits one frame."""
    return mtu + ETHERNET_AND_TAGS <= frame_size - HEADROOM


def kernel_refusal() -> str:
    """Why this kernel's AF_XDP sockets can't have packets in several frames; "": they can."""
    result: int = lib.sluice_probe_xsk_sg()
    if result >= 0:
        return ""
    if result == -errno.EINVAL:
        return "AF_XDP takes packets in several frames from Linux 6.6 on"
    return f"asking for packets in several frames: {os.strerror(-result)}"


def longest_packet(rings: Rings, mtu: int) -> int:
    """Bytes of the longest packet in several frames that ``[rings] jumbo`` asks for; 0: none are wanted.

    "auto" asks for them when the MTU does not fit a frame and the kernel has them.  Raises
    UnsupportedError when they are required and the kernel has none.
    """
    if rings.jumbo is False:
        return 0
    if rings.jumbo == "auto":
        wanted = not fits_a_frame(mtu, rings.frame_size) and not kernel_refusal()
        return mtu + ETHERNET_AND_TAGS if wanted else 0
    if refusal := kernel_refusal():
        raise UnsupportedError(
            f"the policy requires jumbo frames: {refusal}",
            hint='jumbo = "auto" in [rings] goes without them where there are none',
        )
    return max(mtu, COMMON_JUMBO_MTU) + ETHERNET_AND_TAGS

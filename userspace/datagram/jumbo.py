# SPDX-License-Identifier: Apache-2.0
"""Whether lanes have jumbo frames: what the policy, its sizes, the MTU and the kernel say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from userspace.datagram.descriptors import LaneSpec, plan_geometry
from xdp import jumbo
from xdp.errors import UsageError
from xdp.policy_model import Rings


def choose(
    interface: str, rings: Rings, lanes: Sequence[LaneSpec], notify: Callable[[str], None] | None = None
) -> int:
    """Bytes of the longest packet that may come in several frames on an interface of this namespace; 0: none.

    ``jumbo = "auto"`` never makes a start fail: where it can't be had, ``notify`` gets a line with the
    reason, and what is longer than a frame is lost.  Raises UnsupportedError and UsageError where the
    policy requires it, InterfaceGoneError.
    """
    mtu = jumbo.read_mtu(interface)
    longest = jumbo.longest_packet(rings, mtu)
    refusal = ""
    if longest and lanes:
        try:
            plan_geometry(
                lanes,
                frame_size=rings.frame_size,
                reserve=rings.reserve,
                transmit_ring=rings.tx,
                longest=longest,
            )
        except UsageError as error:
            if rings.jumbo is True:
                raise
            longest, refusal = 0, str(error)
    elif rings.jumbo == "auto" and not jumbo.fits_a_frame(mtu, rings.frame_size):
        refusal = jumbo.kernel_refusal()
    if refusal and lanes and notify is not None:
        room = rings.frame_size - jumbo.HEADROOM
        notify(f"{interface} has an MTU of {mtu}, but packets above {room} bytes can't be steered: {refusal}")
    return longest

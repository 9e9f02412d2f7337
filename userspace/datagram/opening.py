# SPDX-License-Identifier: Apache-2.0
"""What may be opened: the rungs of the mode ladder that are wanted, the lanes that end in a socket."""

from __future__ import annotations

from typing import Literal, get_args

from userspace.datagram.descriptors import LaneSpec, Mode
from xdp.errors import UsageError
from xdp.policy import Policy

#: All modes, the best first.
LADDER: tuple[Mode, ...] = get_args(Mode)

#: What may be asked for: one mode, or the best of some.
Wanted = Literal["auto", "native", "generic"] | Mode

_CHOICES: dict[str, tuple[Mode, ...]] = {
    "auto": LADDER,
    "native": ("native-zero-copy", "native-copy"),
    "generic": ("generic-copy",),
    **{mode: (mode,) for mode in LADDER},
}


def rungs(wanted: Wanted, policy: Policy) -> tuple[Mode, ...]:
    """The modes to try, best first.

    ``wanted`` "auto" leaves the choice to the policy's ``[interface] mode``; below its
    ``minimum_mode`` nothing is tried.  Raises UsageError when nothing remains.
    """
    if wanted not in _CHOICES:
        raise UsageError(f"there is no mode {wanted!r}", hint=f"allowed: {', '.join(_CHOICES)}")
    modes = _CHOICES[policy.mode if wanted == "auto" else wanted]
    allowed = LADDER[: LADDER.index(policy.minimum_mode) + 1]
    left = tuple(mode for mode in modes if mode in allowed)
    if not left:
        raise UsageError(
            f"mode {wanted} is below the policy's minimum_mode {policy.minimum_mode}",
            hint="change [interface] minimum_mode in the policy, or ask for a better mode",
        )
    return left


def lane_specs(policy: Policy) -> tuple[LaneSpec, ...]:
    """The lanes that end in a socket.  Raises UsageError when none does."""
    specs = tuple(
        LaneSpec(number=number, name=lane.name, ring=lane.ring, quota=lane.quota, share=lane.share)
        for number, lane in enumerate(policy.lanes)
        if lane.end == "socket"
    )
    if not specs:
        raise UsageError(
            "every lane of the policy ends in the kernel, so there is nothing to receive",
            hint='give a lane end = "socket"',
        )
    return specs


def socket_lane_specs(policy: Policy) -> tuple[LaneSpec, ...]:
    """Of all lanes, none where each of them ends in the kernel."""
    return lane_specs(policy) if any(lane.end == "socket" for lane in policy.lanes) else ()


def shape(policy: Policy) -> tuple[object, ...]:
    """What an application's sockets depend on."""
    return (policy.lane_names, socket_lane_specs(policy), policy.rings)

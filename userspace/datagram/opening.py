# SPDX-License-Identifier: Apache-2.0
"""The mode ladder: a program on an interface and sockets on its queues, as well as can be had.

The privileged side of AF_XDP lanes.  :func:`open_interface` loads the steer program, puts the
policy in force, attaches, opens the sockets and lets the program steer into them;
the best mode first, and every refusal is kept with its reason.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args

from userspace.datagram.descriptors import LaneDescriptors, LaneSpec, Mode, Refusal
from userspace.datagram.xsk import open_queues, register
from xdp.errors import UnsupportedError, UsageError
from xdp.link import Link, attach
from xdp.policy import Policy
from xdp.program import SteerProgram
from xdp.tables import compile_policy

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


class OpenedInterface:
    """A program that steers into open sockets.

    ``descriptors`` are the application's to take; program and link stay here, and
    packets are steered until ``close``.
    """

    def __init__(self, program: SteerProgram, link: Link, descriptors: LaneDescriptors) -> None:
        self.program = program
        self.link = link
        self.descriptors = descriptors

    def close(self) -> None:
        """Take the program off the interface and close what is still open; may be called again."""
        self.link.close()
        self.program.close()
        self.descriptors.close()

    def __enter__(self) -> OpenedInterface:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_interface(
    policy: Policy, interface: str, modes: Sequence[Mode], *, queues: Sequence[int] | None = None
) -> OpenedInterface:
    """Open ``interface`` in the first of the AF_XDP ``modes`` that works.

    Why the others did not is in ``descriptors.refused``.  Raises UnsupportedError when none
    works, with all reasons in its detail; BusyError, PermissionsError, UsageError
    as soon as they come up: another mode would not help.
    """
    specs = lane_specs(policy)
    try:
        ifindex = socket.if_nametoindex(interface)
    except OSError as error:
        raise UsageError(f"there is no interface {interface!r} here", hint="`ip link` lists them") from error
    refused: list[Refusal] = []
    with _loaded(policy) as (cleanup, program):
        for mode in modes:
            try:
                with ExitStack() as attempt:
                    link = attach(program, ifindex, "generic" if mode == "generic-copy" else "native")
                    attempt.callback(link.close)
                    descriptors = open_queues(
                        interface,
                        specs,
                        mode=mode,
                        queues=queues,
                        cookie=program.cookie,
                        frame_size=policy.rings.frame_size,
                        reserve=policy.rings.reserve,
                        transmit_ring=policy.rings.tx,
                    )
                    attempt.callback(descriptors.close)
                    register(descriptors, program.maps["xsks"])
                    attempt.pop_all()
            except UnsupportedError as error:
                refused.append(Refusal(mode=mode, reason=str(error)))
                continue
            cleanup.pop_all()
            descriptors.refused = tuple(refused)
            return OpenedInterface(program, link, descriptors)
    raise UnsupportedError(
        f"no AF_XDP on {interface}: {refused[-1].reason if refused else 'no mode to try'}",
        hint="`sluice doctor` says what this kernel and interface can do",
        detail="\n".join(f"{refusal.mode}: {refusal.reason}" for refusal in refused),
    )


@contextmanager
def _loaded(policy: Policy) -> Iterator[tuple[ExitStack, SteerProgram]]:
    """The program with the policy in force; closed unless the stack is emptied."""
    with ExitStack() as cleanup:
        program = SteerProgram.load()
        cleanup.callback(program.close)
        program.swap(compile_policy(policy))
        yield cleanup, program

# SPDX-License-Identifier: Apache-2.0
"""The mode ladder: the best mode that works, and why each better one did not.

    native-zero-copy   program in the driver, packets by DMA into our memory
    native-copy        program in the driver, one copy
    generic-copy       program in the kernel's stack, one copy
    mmsg, portable     without XDP: not an owner's business

``[interface] mode`` chooses where the program may sit, ``minimum_mode`` the rung below which
starting fails instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from userspace.datagram.descriptors import LaneDescriptors, LaneSpec, Mode, Refusal
from userspace.datagram.opening import LADDER
from userspace.datagram.xsk import open_queues
from xdp import link as links
from xdp.errors import SluiceError, UnsupportedError
from xdp.link import AttachMode, Link
from xdp.policy_model import InterfaceMode, Rung
from xdp.program import SteerProgram

_ATTACHED: dict[str, tuple[Mode, ...]] = {
    "native": ("native-zero-copy", "native-copy"),
    "generic": ("generic-copy",),
}


class NoModeError(UnsupportedError):
    """No allowed mode holds; ``refused`` says why, rung by rung."""

    refused: tuple[Refusal, ...] = ()

    @classmethod
    def of(cls, interface: str, minimum: Rung, refused: Sequence[Refusal]) -> NoModeError:
        """One line with the reason of the last rung that was tried."""
        why = f": {refused[-1].mode}: {refused[-1].reason}" if refused else ""
        error = cls(
            f"{interface}: no mode of {minimum} or better holds{why}",
            hint="allow a lower one ([interface] mode and minimum_mode), or see `sluice doctor`",
            detail="\n".join(f"{one.mode}: {one.reason}" for one in refused),
        )
        error.refused = tuple(refused)
        return error


def allowed(mode: InterfaceMode, minimum: Rung) -> tuple[AttachMode, ...]:
    """Where the program may sit, best first."""
    kinds: tuple[AttachMode, ...] = ("native", "generic") if mode == "auto" else (mode,)
    lowest = LADDER.index(minimum)
    return tuple(kind for kind in kinds if LADDER.index(_ATTACHED[kind][0]) <= lowest)


def attach_best(
    program: SteerProgram, interface: str, ifindex: int, mode: InterfaceMode, minimum: Rung
) -> tuple[Link, AttachMode, list[Refusal]]:
    """Attach as high as it goes; with the reasons of rungs that were refused.

    Raises NoModeError, and what says that it is not a matter of mode: BusyError,
    PermissionsError, InterfaceGoneError.
    """
    refused: list[Refusal] = []
    for kind in allowed(mode, minimum):
        try:
            return links.attach(program, ifindex, kind), kind, refused
        except UnsupportedError as error:
            refused += [Refusal(mode=rung, reason=str(error)) for rung in _ATTACHED[kind]]
    raise NoModeError.of(interface, minimum, refused)


@dataclass(frozen=True)
class Sizes:
    """What ``open_queues`` is told beside the lanes."""

    frame_size: int
    reserve: int
    transmit_ring: int
    longest: int = 0


def open_best(
    interface: str,
    attached: AttachMode,
    minimum: Rung,
    lanes: Sequence[LaneSpec],
    sizes: Sizes,
    *,
    queues: Sequence[int] | None,
    cookie: int,
    known: Sequence[Refusal] = (),
) -> tuple[LaneDescriptors, list[Refusal]]:
    """Open the queues in the best rung that a program attached so allows.

    A queue that lacks zero-copy takes the whole interface down a rung: lanes have one mode.
    ``known`` refusals are not asked for again.
    """
    refused = list(known)
    for rung in _ATTACHED[attached]:
        if any(one.mode == rung for one in known):
            continue
        if LADDER.index(rung) > LADDER.index(minimum):
            break
        try:
            opened = open_queues(
                interface,
                lanes,
                mode=rung,
                queues=queues,
                cookie=cookie,
                frame_size=sizes.frame_size,
                reserve=sizes.reserve,
                transmit_ring=sizes.transmit_ring,
                longest=sizes.longest,
            )
        except UnsupportedError as error:
            refused.append(Refusal(mode=rung, reason=str(error)))
        else:
            return opened, refused
    raise NoModeError.of(interface, minimum, refused)


def probe(
    interface: str,
    attached: AttachMode,
    minimum: Rung,
    *,
    longest: int = 0,
    known: Sequence[Refusal] = (),
) -> tuple[Mode, list[Refusal]]:
    """Which rung the queues allow, found out with the smallest sockets there are, closed again.

    ``longest`` is that of ``open_queues``: drivers may lack packets in several frames in one mode only.
    ``known`` refusals are not asked for. Raises NoModeError; a queue that somebody else uses is BusyError.
    """
    try:
        opened, refused = open_best(
            interface,
            attached,
            minimum,
            # One page of frames would do; drivers with zero-copy want a ring's worth to start a queue.
            [LaneSpec(number=0, name="probe", ring=64, quota=64, share=0.0)],
            Sizes(frame_size=2048, reserve=0, transmit_ring=64, longest=longest),
            queues=None,
            cookie=0,
            known=known,
        )
    except SluiceError as error:
        error.add_note("while finding out which mode the queues allow")
        raise
    opened.close()
    return opened.mode, refused

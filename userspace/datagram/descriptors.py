# SPDX-License-Identifier: Apache-2.0
"""What an unprivileged process needs to use lanes that somebody else opened.

:class:`LaneDescriptors` is made by the privileged side (:mod:`userspace.datagram.xsk`), travels
as a JSON-able dict plus a list of file descriptors (SCM_RIGHTS), and is turned
into lanes by :func:`userspace.datagram.lanes.attach_lanes`, in the same process
or in another.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from userspace.native._native import lib
from xdp.errors import UsageError
from xdp.policy_model import Pin

#: From best to worst; what ``status`` and ``minimum_mode`` say.
Mode = Literal["native-zero-copy", "native-copy", "generic-copy", "mmsg", "portable"]

#: Of the message; another version is refused.
VERSION = 3

#: The kernel's limits (net/xdp/xdp_umem.c: a chunk is 2048 bytes to one page).
FRAME_SIZES = (2048, 4096)

#: Frames that a packet may take, as far as the kernel's code goes (native/queue_private.h): what a lane's
#: ring and quota have room for where there are jumbo frames.
JUMBO_FRAMES = 64

#: Offsets within a queue's memory have 32 bits.
MAXIMUM_AREA = 1 << 32


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class LaneSpec(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A lane as the data path sees it; in order of priority, highest first.

    ``number`` is the policy's (and the XSKMAP's), ``ring`` its receive ring on each
    queue in packets, ``quota`` what an application may hold of it on each queue in
    frames, ``share`` the part of each batch (0 to 1) that higher lanes leave it.
    """

    number: int
    name: str
    ring: int = 4096
    quota: int = 1024
    share: float = 0.05


class Geometry(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes that all queues share: frames in bytes, rings in entries (powers of 2).

    ``longest``: bytes of the longest packet in several frames with its headers; 0: each is in one.
    """

    frame_size: int
    fill_frames: int
    transmit_frames: int
    fill_ring: int
    completion_ring: int
    transmit_ring: int
    longest: int = 0

    @property
    def area(self) -> int:
        """Bytes of one queue's frames."""
        return (self.fill_frames + self.transmit_frames) * self.frame_size


class Refusal(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A better mode that could not be had, and why."""

    mode: Mode
    reason: str


class _QueueMessage(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Indices into the list of descriptors."""

    queue: int
    umem: int
    sockets: tuple[int, ...]
    transmit: int


class _Message(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int
    interface: str
    ifindex: int
    mode: Mode
    cookie: int
    geometry: Geometry
    lanes: tuple[LaneSpec, ...]
    queues: tuple[_QueueMessage, ...]
    counters: int | None
    companions: tuple[tuple[int, int], ...]
    refused: tuple[Refusal, ...]
    pin: Pin | None = None


class QueueDescriptors:
    """Of one receive queue: its UMEM's memfd, one AF_XDP socket per lane and one to send by, all bound."""

    __slots__ = ("queue", "sockets", "transmit", "umem")

    def __init__(self, queue: int, umem: int, sockets: Sequence[int], transmit: int) -> None:
        self.queue = queue
        self.umem = umem
        self.sockets = tuple(sockets)
        self.transmit = transmit

    def descriptors(self) -> tuple[int, ...]:
        """All of them, in the order in which they travel."""
        return (self.umem, *self.sockets, self.transmit)


class LaneDescriptors:
    """Open descriptors with what must be known about them.

    Whoever holds it owns the descriptors: close it, or attach it (which takes
    them over).  ``companions`` are (port, descriptor) of kernel UDP sockets,
    ``counters`` the program's counters map, ``pin`` what the policy says of its readers' CPUs.
    """

    def __init__(
        self,
        *,
        interface: str,
        ifindex: int,
        mode: Mode,
        cookie: int,
        geometry: Geometry,
        lanes: Sequence[LaneSpec],
        queues: Sequence[QueueDescriptors],
        counters: int | None = None,
        companions: Sequence[tuple[int, int]] = (),
        refused: Sequence[Refusal] = (),
        pin: Pin | None = None,
    ) -> None:
        self.interface = interface
        self.ifindex = ifindex
        self.mode: Mode = mode
        self.cookie = cookie
        self.geometry = geometry
        self.lanes = tuple(lanes)
        self.queues = tuple(queues)
        self.counters = counters
        self.companions = tuple(companions)
        self.refused = tuple(refused)
        self.pin = pin
        self._open = True

    def __repr__(self) -> str:
        names = ", ".join(lane.name for lane in self.lanes)
        return f"<LaneDescriptors {self.interface}: {len(self.queues)} queues, {names}; {self.mode}>"

    @property
    def open(self) -> bool:
        """Whether the descriptors are still this object's."""
        return self._open

    def descriptors(self) -> list[int]:
        """All file descriptors, in the order of :meth:`to_message`."""
        found = [fd for queue in self.queues for fd in queue.descriptors()]
        if self.counters is not None:
            found.append(self.counters)
        return found + [fd for _, fd in self.companions]

    def to_message(self) -> tuple[dict[str, Any], list[int]]:
        """A JSON-able dict and the descriptors to pass with it (SCM_RIGHTS)."""
        descriptors = self.descriptors()
        place = iter(range(len(descriptors)))
        message = _Message(
            version=VERSION,
            interface=self.interface,
            ifindex=self.ifindex,
            mode=self.mode,
            cookie=self.cookie,
            geometry=self.geometry,
            lanes=self.lanes,
            queues=tuple(
                _QueueMessage(
                    queue=queue.queue,
                    umem=next(place),
                    sockets=tuple(next(place) for _ in queue.sockets),
                    transmit=next(place),
                )
                for queue in self.queues
            ),
            counters=None if self.counters is None else next(place),
            companions=tuple((port, next(place)) for port, _ in self.companions),
            refused=self.refused,
            pin=self.pin,
        )
        plain: dict[str, Any] = msgspec.to_builtins(message)
        return plain, descriptors

    @classmethod
    def from_message(cls, message: object, descriptors: Sequence[int]) -> LaneDescriptors:
        """Of what :meth:`to_message` made; takes over ``descriptors``.

        Raises UsageError, the descriptors closed, when the message is not one.
        """
        try:
            return cls._from_message(message, descriptors)
        except (msgspec.ValidationError, ValueError) as error:
            for fd in set(descriptors):
                with contextlib.suppress(OSError):
                    os.close(fd)
            raise UsageError(
                f"the lanes' descriptors came with a message that is not understood: {error}",
                hint="owner and application must be the same version of Sluice",
            ) from error

    @classmethod
    def _from_message(cls, message: object, descriptors: Sequence[int]) -> LaneDescriptors:
        parsed = msgspec.convert(message, _Message)
        if parsed.version != VERSION:
            raise ValueError(f"version {parsed.version}, this is {VERSION}")
        places = [index for queue in parsed.queues for index in (queue.umem, *queue.sockets, queue.transmit)]
        places += [] if parsed.counters is None else [parsed.counters]
        places += [index for _, index in parsed.companions]
        if sorted(places) != list(range(len(descriptors))):
            raise ValueError(f"it speaks of {len(places)} descriptors, {len(descriptors)} came")
        check_lanes(parsed.lanes)
        if not parsed.queues or any(len(queue.sockets) != len(parsed.lanes) for queue in parsed.queues):
            raise ValueError("every queue has one socket per lane")
        return cls(
            interface=parsed.interface,
            ifindex=parsed.ifindex,
            mode=parsed.mode,
            cookie=parsed.cookie,
            geometry=parsed.geometry,
            lanes=parsed.lanes,
            queues=[
                QueueDescriptors(
                    queue.queue,
                    descriptors[queue.umem],
                    [descriptors[index] for index in queue.sockets],
                    descriptors[queue.transmit],
                )
                for queue in parsed.queues
            ],
            counters=None if parsed.counters is None else descriptors[parsed.counters],
            companions=[(port, descriptors[index]) for port, index in parsed.companions],
            refused=parsed.refused,
            pin=parsed.pin,
        )

    def take_companions(self) -> tuple[tuple[int, int], ...]:
        """The (port, descriptor) pairs; they are the caller's from then on."""
        taken, self.companions = self.companions, ()
        return taken

    def close(self) -> None:
        """Close all descriptors, unless they were taken over; may be called again."""
        if self._open:
            self._open = False
            for fd in self.descriptors():
                os.close(fd)

    def __enter__(self) -> LaneDescriptors:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_lanes(lanes: Sequence[LaneSpec]) -> None:
    """Raises ValueError with what is wrong with them."""
    if not 1 <= len(lanes) <= lib.SL_QUEUE_LANES:
        raise ValueError(f"{len(lanes)} lanes; allowed: 1 to {lib.SL_QUEUE_LANES}")
    numbers = [lane.number for lane in lanes]
    if sorted(set(numbers)) != numbers or not 0 <= numbers[0] <= numbers[-1] < lib.SLUICE_MAX_LANES:
        raise ValueError(f"lane numbers {numbers}; allowed: ascending, below {lib.SLUICE_MAX_LANES}")
    for lane in lanes:
        if lane.ring < 1 or lane.ring & (lane.ring - 1) or lane.ring > 1 << 20:
            raise ValueError(f"lane {lane.name}: ring of {lane.ring}; allowed: a power of 2 up to 1048576")
        if not 1 <= lane.quota <= 1 << 20:
            raise ValueError(f"lane {lane.name}: quota of {lane.quota}; allowed: 1 to 1048576 frames")
        if not 0 <= lane.share <= 1:
            raise ValueError(f"lane {lane.name}: share of {lane.share}; allowed: 0 to 1")


def _check_sizes(frame_size: int, reserve: int, transmit_ring: int) -> None:
    if frame_size not in FRAME_SIZES:
        raise ValueError(f"frames of {frame_size} bytes; allowed: {FRAME_SIZES}")
    if transmit_ring < 64 or transmit_ring & (transmit_ring - 1) or transmit_ring > 1 << 20:
        raise ValueError(f"transmit ring of {transmit_ring}; allowed: a power of 2 from 64 to 1048576")
    if not 0 <= reserve <= 1 << 20:
        raise ValueError(f"reserve of {reserve}; allowed: 0 to 1048576 frames")


def _check_jumbo(lanes: Sequence[LaneSpec], longest: int) -> None:
    if not 0 <= longest <= lib.SL_LONGEST:
        raise ValueError(f"packets of {longest} bytes; allowed: up to {lib.SL_LONGEST}")
    for lane in lanes if longest else ():
        if min(lane.ring, lane.quota) < JUMBO_FRAMES:
            raise ValueError(
                f"lane {lane.name}: ring of {lane.ring} and quota of {lane.quota}; "
                f"with jumbo frames both are at least {JUMBO_FRAMES}"
            )


def _slots(lanes: Sequence[LaneSpec], longest: int) -> int:
    """Bytes at most of the room where packets in several frames are put together (native/queue_chain.c)."""
    if not longest:
        return 0
    return sum(lane.quota // 2 for lane in lanes) * (longest + 63) + (4 << 20)


def plan_geometry(
    lanes: Sequence[LaneSpec],
    *,
    frame_size: int = 2048,
    reserve: int = 1024,
    transmit_ring: int = 2048,
    longest: int = 0,
) -> Geometry:
    """Sizes of a queue with these lanes.

    Frames to receive into are all rings, all quotas and ``reserve`` (for packets
    between the fill ring and a receive ring, and bursts while frames come back).
    Raises UsageError when they are too many or a size is not allowed.
    """
    try:
        check_lanes(lanes)
        _check_sizes(frame_size, reserve, transmit_ring)
        _check_jumbo(lanes, longest)
    except ValueError as error:
        raise UsageError(f"these lanes can't be opened: {error}", hint="see [rings] in the policy") from error
    fill_frames = sum(lane.ring + lane.quota for lane in lanes) + reserve
    geometry = Geometry(
        frame_size=frame_size,
        fill_frames=fill_frames,
        # As many as the ring takes, and as many again on the wire or waiting to be reaped.
        transmit_frames=2 * transmit_ring,
        # Twice the frames: the kernel tells late which entries it has taken (native/queue.h).
        fill_ring=1 << (2 * fill_frames - 1).bit_length(),
        completion_ring=2 * transmit_ring,
        transmit_ring=transmit_ring,
        longest=longest,
    )
    needed = geometry.area + _slots(lanes, longest)
    if needed >= MAXIMUM_AREA:
        raise UsageError(
            f"rings and quotas need {needed >> 20} MiB a queue; 4096 MiB is the most",
            hint="make rings or quotas under [rings] or [[lane]] in the policy smaller",
        )
    return geometry

# SPDX-License-Identifier: Apache-2.0
"""Sending through one queue's transmit ring: payloads in, whole frames out.

Where a datagram goes is the kernel's to say (:mod:`xdp.routes`).  What cannot leave as a frame of ours
(own addresses, other interfaces, a next hop that is not known yet) goes through the kernel socket of
the same port, where there is one.
"""

from __future__ import annotations

import errno
import itertools
import threading
import time
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from typing_extensions import Buffer

from userspace.datagram.batch import Batch
from userspace.datagram.destination import Destination, Endpoint, resolve_destination
from userspace.datagram.fanout import Fanout, Outgoing, outgoing
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.socket_statistics import SendFailure
from userspace.datagram.xsk_queues import failure
from userspace.native._native import ffi, lib
from xdp.errors import UsageError
from xdp.routes import Elsewhere, Route, Router

if TYPE_CHECKING:
    from userspace.native._native import CData

#: Seconds for which headers of a destination are used before the kernel is asked again, without a router.
RESOLVED_FOR = 5.0

#: Seconds after which a fan-out is gone through again although nothing was reported: so routes that are
#: too old get their turn, and it costs a thousandth of the time with a thousand destinations.
_SPREAD_AGE = 0.5

#: Headers kept, of either kind; the oldest go first.
_MAX_KEPT = 65_536


class FrameTooSmallError(UsageError):
    """A payload fits the MTU but not a frame: the kernel's sockets can send it."""


def longest(to: Destination, frame_size: int) -> int:
    """Bytes of payload that fit both the MTU and a frame."""
    headers: int = to.template.length
    return min(to.payload_maximum, frame_size - headers)


class Spread:
    """A fan-out as it is routed at the moment."""

    __slots__ = (
        "_endpoints",
        "_found",
        "_frame_size",
        "frames",
        "kernel",
        "maximum",
        "others",
        "port",
        "templates",
        "until",
        "version",
    )

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        port: int,
        version: int,
        until: float,
        found: Sequence[Destination | Elsewhere],
        frame_size: int = 2048,
    ) -> None:
        self.port, self.version, self.until = port, version, until
        self._endpoints = endpoints
        self._frame_size = frame_size
        self._found = found  # keeps the templates
        headers = [one for one in found if isinstance(one, Destination)]
        #: indices of those that get a frame, and of those that the kernel reaches
        self.frames = tuple(index for index, one in enumerate(found) if isinstance(one, Destination))
        self.kernel = tuple(index for index, one in enumerate(found) if isinstance(one, Elsewhere))
        self.others = Fanout(endpoints[index] for index in self.kernel) if self.kernel else None
        self.templates = ffi.new("struct sl_template *[]", [one.template for one in headers])
        self.maximum = min((longest(one, frame_size) for one in headers), default=1 << 16)

    def without_longer(self, data: Outgoing) -> Spread:
        """The same with what fits no packet, or no frame, left to the kernel, which fragments it."""
        found = [
            Elsewhere("longer than the MTU, or than a frame")
            if isinstance(one, Destination) and data.lengths[index] > longest(one, self._frame_size)
            else one
            for index, one in enumerate(self._found)
        ]
        return Spread(self._endpoints, self.port, self.version, self.until, found, self._frame_size)

    def columns(self, data: Outgoing) -> tuple[CData, CData]:
        """Offsets and lengths of the payloads that leave as frames."""
        if data.offsets or not self.kernel:
            return data.offsets, data.lengths
        lengths = ffi.unpack(data.lengths, len(self._endpoints))
        starts = [0, *itertools.accumulate(lengths)]
        return (
            ffi.new("uint32_t[]", [starts[index] for index in self.frames]),
            ffi.new("uint32_t[]", [lengths[index] for index in self.frames]),
        )


class Sender:
    """Sends from the transmit frames of one queue."""

    def __init__(self, queue: CData, interface: str, frame_size: int) -> None:
        self._queue = queue
        self._interface = interface
        self._frame_size = frame_size
        self._resolved: dict[tuple[object, int, int], tuple[float, Destination]] = {}
        self._routed: dict[tuple[object, int, int], tuple[Route, int, Destination]] = {}
        self._spreads: WeakKeyDictionary[Fanout, Spread] = WeakKeyDictionary()
        self._router: Router | None = None
        self._lock = threading.Lock()  # of the router and what was made of its answers
        self._bad = ffi.new("uint32_t *")

    def close(self) -> None:
        """Stop watching routes; may be called again."""
        with self._lock:
            router, self._router = self._router, None
        if router is not None:
            router.close()

    def find(self, destination: Endpoint, port: int) -> Destination | None:
        """Headers to an (address, port) as the kernel routes now; None: that is the kernel's to send.

        Never waits for the network.
        """
        with self._lock:
            found = self._look(self._ready(), destination, port, time.monotonic())
        return found if isinstance(found, Destination) else None

    def _ready(self) -> Router:
        if self._router is None:
            self._router = Router(self._interface)
        self._router.poll()
        return self._router

    def _look(self, router: Router, destination: Endpoint, port: int, now: float) -> Destination | Elsewhere:
        address, to = destination
        found = router.find(str(address), now)
        if isinstance(found, Elsewhere):
            return found
        mac, version = found.hop.mac, found.hop.version
        assert mac is not None  # find says so otherwise
        key = (address, to, port)
        made = self._routed.get(key)
        if made is None or made[0] is not found or made[1] != version:
            headers = Destination(
                found.source_mac,
                mac,
                (found.source, port),
                destination,
                vlan=found.vlan,
                hops=found.hops,
                mtu=found.mtu,
            )
            if len(self._routed) >= _MAX_KEPT:
                del self._routed[next(iter(self._routed))]
            self._routed[key] = made = (found, version, headers)
        return made[2]

    def spread(self, fanout: Fanout, port: int, *, routed: bool) -> Spread:
        """Who of many gets a frame, and who is the kernel's to reach.

        Not ``routed``: without a kernel socket to go by; all are resolved, as :meth:`resolve` does.
        """
        now = time.monotonic()
        with self._lock:
            router = self._ready() if routed else None
            version = router.version if router is not None else 0
            made = self._spreads.get(fanout)
            if made is not None and (made.port, made.version) == (port, version) and now < made.until:
                return made
            found = [
                self._look(router, one, port, now) if router is not None else self.resolve(one, port)
                for one in fanout.endpoints
            ]
            passing = any(one.passing for one in found if isinstance(one, Elsewhere))
            until = now if passing else now + _SPREAD_AGE
            spread = Spread(fanout.endpoints, port, version, until, found, self._frame_size)
            self._spreads[fanout] = spread
            return spread

    def send_many(
        self, fanout: Fanout, payloads: Buffer | Sequence[Buffer], port: int, kernel: MmsgLanes | None
    ) -> tuple[int, tuple[SendFailure, ...]]:
        """How many were accepted, and which were not."""
        data = outgoing(payloads, len(fanout))
        spread = self.spread(fanout, port, routed=kernel is not None)
        if data.longest > spread.maximum:
            if kernel is None:
                fit = f"{spread.maximum} fit a frame and the smallest MTU"
                raise UsageError(f"a payload of {data.longest} bytes; {fit}")
            spread = spread.without_longer(data)
        offsets, lengths = spread.columns(data)
        count = len(spread.frames)
        sent = 0
        if count:
            sent = lib.sl_queue_send(
                self._queue, spread.templates, count, data.base, data.size, offsets, lengths, count, self._bad
            )
            if sent < 0:
                raise failure(self._interface, -sent, "sending")
        failures = [SendFailure(index, errno.EAGAIN) for index in spread.frames[sent:]]
        if spread.others is not None and kernel is not None:
            sent += kernel.send_many(spread.others, data.of(spread.kernel), port=port, timeout=0)
            failures += [SendFailure(spread.kernel[one.index], one.errno) for one in kernel.failures]
            failures.sort(key=lambda one: one.index)
        return sent, tuple(failures)

    def send(self, destination: Destination, payloads: Sequence[Buffer] | Batch) -> int:
        """As :meth:`XskLanes.send`."""
        if isinstance(payloads, Batch):
            if not payloads:
                return 0
            memory = payloads.memory
            return self._send(
                destination,
                memory.data,
                memory.data_size,
                memory.offsets,
                memory.lengths,
                len(payloads),
            )
        try:
            joined = b"".join(payloads)
            lengths = array("I", [memoryview(payload).nbytes for payload in payloads])
        except TypeError:
            raise UsageError("payloads are a sequence of bytes-like objects") from None
        return self._send(
            destination,
            ffi.from_buffer("uint8_t[]", joined),
            len(joined),
            ffi.NULL,
            ffi.from_buffer("uint32_t[]", lengths),
            len(lengths),
        )

    def send_columns(
        self,
        destination: Destination,
        data: Buffer,
        offsets: Buffer,
        lengths: Buffer,
    ) -> int:
        """As :meth:`XskLanes.send_columns`."""
        starts = ffi.from_buffer("uint32_t[]", offsets)
        sizes = ffi.from_buffer("uint32_t[]", lengths)
        if len(starts) != len(sizes):
            raise UsageError(f"{len(starts)} offsets and {len(sizes)} lengths; they belong together")
        base = ffi.from_buffer("uint8_t[]", data)
        return self._send(destination, base, len(base), starts, sizes, len(starts))

    def _send(
        self, to: Destination, data: CData, size: int, offsets: CData, lengths: CData, count: int
    ) -> int:
        result = lib.sl_queue_send(
            self._queue, to.templates, 1, data, size, offsets, lengths, count, self._bad
        )
        if result >= 0:
            return result
        index = self._bad[0]
        if result == -errno.EMSGSIZE:
            if lengths[index] <= to.payload_maximum:
                most = longest(to, self._frame_size)
                raise FrameTooSmallError(
                    f"payload {index} has {lengths[index]} bytes; {most} fit a frame",
                    hint="send to an (address, port), for companion sockets to send it; nothing was sent",
                )
            raise UsageError(
                f"payload {index} has {lengths[index]} bytes; {longest(to, self._frame_size)} fit "
                f"a frame and the MTU of {to.mtu}",
                hint="send less at a time; nothing of this call was sent",
            )
        if result == -errno.EFAULT:
            raise UsageError(f"payload {index} is not within the {size} bytes of data")
        raise failure(self._interface, -result, "sending")

    def resolve(self, destination: Endpoint, port: int) -> Destination:
        """Headers to an (address, port), asked for anew after some seconds; waits for the neighbour's answer.

        For sockets without a companion, which could send in the meantime.  Raises what
        resolve_destination raises.
        """
        key = (*destination, port)
        now = time.monotonic()
        known = self._resolved.get(key)
        if known is None or known[0] < now:
            resolved = resolve_destination(self._interface, *destination, port)
            if len(self._resolved) >= _MAX_KEPT:
                del self._resolved[next(iter(self._resolved))]
            self._resolved[key] = known = (now + RESOLVED_FOR, resolved)
        return known[1]

# SPDX-License-Identifier: Apache-2.0
"""Sending through one queue's transmit ring: payloads in, whole frames out.

Where a datagram goes is the kernel's to say (:mod:`xdp.routes`).  What cannot leave as a frame of ours
(own addresses, other interfaces, a next hop that is not known yet) goes through the kernel socket of
the same port, where there is one.
"""

from __future__ import annotations

import errno
import threading
import time
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from userspace.datagram.batch import Batch
from userspace.datagram.destination import Destination, Endpoint, resolve_destination
from userspace.datagram.xsk_queues import failure
from userspace.native._native import ffi, lib
from xdp.errors import UsageError
from xdp.routes import Route, Router

if TYPE_CHECKING:
    from userspace.native._native import CData

#: Seconds for which headers of a destination are used before the kernel is asked again, without a router.
RESOLVED_FOR = 5.0

#: Headers kept, of either kind; the oldest go first.
_MAX_KEPT = 65_536


class Sender:
    """Sends from the transmit frames of one queue."""

    def __init__(self, queue: CData, interface: str) -> None:
        self._queue = queue
        self._interface = interface
        self._resolved: dict[tuple[object, int, int], tuple[float, Destination]] = {}
        self._routed: dict[tuple[object, int, int], tuple[Route, int, Destination]] = {}
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
        address, to = destination
        with self._lock:
            if self._router is None:
                self._router = Router(self._interface)
            self._router.poll()
            found = self._router.find(str(address), time.monotonic())
            if not isinstance(found, Route) or found.hop.mac is None:
                return None
            key = (address, to, port)
            made = self._routed.get(key)
            if made is None or made[0] is not found or made[1] != found.hop.version:
                headers = Destination(
                    found.source_mac,
                    found.hop.mac,
                    (found.source, port),
                    destination,
                    vlan=found.vlan,
                    hops=found.hops,
                    mtu=found.mtu,
                )
                if len(self._routed) >= _MAX_KEPT:
                    del self._routed[next(iter(self._routed))]
                self._routed[key] = made = (found, found.hop.version, headers)
            return made[2]

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
        result = lib.sl_queue_send(self._queue, to.template, data, size, offsets, lengths, count, self._bad)
        if result >= 0:
            return result
        index = self._bad[0]
        if result == -errno.EMSGSIZE:
            raise UsageError(
                f"payload {index} has {lengths[index]} bytes; {to.payload_maximum} fit the MTU of {to.mtu}",
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

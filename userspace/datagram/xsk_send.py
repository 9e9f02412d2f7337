# SPDX-License-Identifier: Apache-2.0
"""Sending through one queue's transmit ring: payloads in, whole frames out."""

from __future__ import annotations

import errno
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

if TYPE_CHECKING:
    from userspace.native._native import CData

#: Seconds for which headers of a destination are used before the kernel is asked again.
RESOLVED_FOR = 5.0


class Sender:
    """Sends from the transmit frames of one queue."""

    def __init__(self, queue: CData, interface: str) -> None:
        self._queue = queue
        self._interface = interface
        self._resolved: dict[tuple[object, int, int], tuple[float, Destination]] = {}
        self._bad = ffi.new("uint32_t *")

    def send(
        self,
        destination: Destination | Endpoint,
        payloads: Sequence[Buffer] | Batch,
        port: int | None,
    ) -> int:
        """As :meth:`XskLanes.send`."""
        if isinstance(payloads, Batch):
            if not payloads:
                return 0
            memory = payloads.memory
            return self._send(
                self._destination(destination, port),
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
            self._destination(destination, port),
            ffi.from_buffer("uint8_t[]", joined),
            len(joined),
            ffi.NULL,
            ffi.from_buffer("uint32_t[]", lengths),
            len(lengths),
        )

    def send_columns(
        self,
        destination: Destination | Endpoint,
        data: Buffer,
        offsets: Buffer,
        lengths: Buffer,
        port: int | None,
    ) -> int:
        """As :meth:`XskLanes.send_columns`."""
        starts = ffi.from_buffer("uint32_t[]", offsets)
        sizes = ffi.from_buffer("uint32_t[]", lengths)
        if len(starts) != len(sizes):
            raise UsageError(f"{len(starts)} offsets and {len(sizes)} lengths; they belong together")
        base = ffi.from_buffer("uint8_t[]", data)
        return self._send(self._destination(destination, port), base, len(base), starts, sizes, len(starts))

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

    def _destination(self, destination: Destination | Endpoint, port: int | None) -> Destination:
        if isinstance(destination, Destination):
            return destination
        if port is None:
            raise UsageError("which port to send from is not known", hint="give port=, one of your services'")
        key = (*destination, port)
        now = time.monotonic()
        known = self._resolved.get(key)
        if known is None or known[0] < now:
            resolved = resolve_destination(self._interface, *destination, port)
            if len(self._resolved) >= 4096:  # bounded; the oldest is the first
                del self._resolved[next(iter(self._resolved))]
            self._resolved[key] = known = (now + RESOLVED_FOR, resolved)
        return known[1]

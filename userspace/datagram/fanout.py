# SPDX-License-Identifier: Apache-2.0
"""Many destinations of one call: a payload to each of a tree's children, say.

    children = Fanout([("192.0.2.7", 8001), ("192.0.2.8", 8001)])
    lanes.send_many(children, shred, port=8001)

Made once and used again: what backends need of each destination is then looked up once, too.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import Buffer

from userspace.datagram.destination import Endpoint
from userspace.datagram.sockets import SocketAddress
from userspace.native._native import ffi
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.native._native import CData


class Fanout:
    """Destinations, as (address, port), in the order of payloads; does not change.

    Raises UsageError for one that is not an (address, port), or when there are none.
    """

    __slots__ = ("__weakref__", "addresses", "endpoints", "sources")

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self.endpoints: tuple[Endpoint, ...] = tuple((str(address), port) for address, port in endpoints)
        if not self.endpoints:
            raise UsageError("a fan-out without destinations")
        self.addresses = tuple(SocketAddress.parse(endpoint) for endpoint in self.endpoints)
        #: ``struct sl_source[]``, for kernel sockets
        self.sources: CData = ffi.new("struct sl_source[]", len(self.endpoints))
        for source, parsed in zip(self.sources, self.addresses, strict=True):
            ffi.memmove(source.address, parsed.address, len(parsed.address))
            source.port, source.scope, source.family = parsed.port, parsed.scope, parsed.family

    def __len__(self) -> int:
        return len(self.endpoints)

    def __repr__(self) -> str:
        return f"<Fanout to {len(self)}>"


class Outgoing(NamedTuple):
    """Payloads as C code wants them: one behind the other, or (``offsets`` not NULL) one for all."""

    base: CData
    size: int
    offsets: CData
    lengths: CData
    longest: int

    def of(self, indices: Sequence[int]) -> Buffer | list[Buffer]:
        """The payloads of these destinations, as `outgoing` takes them."""
        whole = memoryview(ffi.buffer(self.base, self.size))
        if self.offsets:
            return whole
        starts = [0, *itertools.accumulate(self.lengths)]
        return [whole[starts[index] : starts[index + 1]] for index in indices]


def outgoing(payloads: Buffer | Sequence[Buffer], count: int) -> Outgoing:
    """One payload for each of ``count`` destinations, or one for all.  Raises UsageError."""
    if isinstance(payloads, (bytes, bytearray, memoryview)):
        base = ffi.from_buffer("uint8_t[]", payloads)
        size = len(base)
        return Outgoing(base, size, _zeros(count), same_lengths(size, count), size)
    try:
        joined = b"".join(payloads)  # type: ignore[arg-type]
        lengths = array("I", [memoryview(payload).nbytes for payload in payloads])  # type: ignore[union-attr]
    except TypeError:
        raise UsageError("payloads are a bytes-like object for all, or a sequence of one for each") from None
    if len(lengths) != count:
        raise UsageError(f"{len(lengths)} payloads for {count} destinations")
    base = ffi.from_buffer("uint8_t[]", joined)
    return Outgoing(base, len(joined), ffi.NULL, ffi.from_buffer("uint32_t[]", lengths), max(lengths))


@functools.lru_cache(maxsize=64)
def _zeros(count: int) -> CData:
    return ffi.new("uint32_t[]", count)


@functools.lru_cache(maxsize=256)
def same_lengths(length: int, count: int) -> CData:
    """A column of one number."""
    return ffi.new("uint32_t[]", [length] * count)

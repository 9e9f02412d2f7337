# SPDX-License-Identifier: Apache-2.0
"""Payloads that are put together from pieces: a header of the application's and a body, say."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from userspace.native._native import ffi, lib
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.native._native import CData


class Pieces:
    """Where the pieces of each packet are, as C code wants it; keeps them.

    Raises UsageError for what is not a sequence of sequences of bytes-like objects in one piece of
    memory, and for more than 64 pieces of one payload.
    """

    __slots__ = ("_kept", "counts", "ends", "lengths", "most", "packets", "table")

    def __init__(self, packets: Sequence[Sequence[Buffer]]) -> None:
        try:
            self.packets = [_packet(packet) for packet in packets]
            self._kept = [ffi.from_buffer("uint8_t[]", piece) for packet in self.packets for piece in packet]
        except (TypeError, ValueError, BufferError):
            raise UsageError(
                "packets are a sequence of sequences of bytes-like objects (C-contiguous)",
                hint="[[header, body], ...], say",
            ) from None
        counts = [len(packet) for packet in self.packets]
        #: of the packet with the most pieces, at least 1
        self.most = max(counts, default=1) or 1
        if self.most > lib.SL_PIECES_MAX:
            raise UsageError(f"a payload of {self.most} pieces; {lib.SL_PIECES_MAX} are allowed")
        sizes = list(map(len, self._kept))
        ends = list(itertools.accumulate(counts))
        #: ``struct sl_piece[]``, of all packets
        self.table: CData = ffi.new("struct sl_piece[]", list(zip(self._kept, sizes, strict=True)))
        self.counts: CData = ffi.new("uint32_t[]", counts)
        self.ends: CData = ffi.new("uint32_t[]", ends)
        self.lengths: CData = ffi.new(
            "uint32_t[]",
            [sum(sizes[end - count : end]) for end, count in zip(ends, counts, strict=True)],
        )

    def __len__(self) -> int:
        return len(self.packets)


def _packet(pieces: Sequence[Buffer]) -> tuple[Buffer, ...]:
    if isinstance(pieces, (bytes, bytearray, memoryview)):  # whose items are numbers
        raise TypeError
    return tuple(pieces)

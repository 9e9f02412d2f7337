# SPDX-License-Identifier: Apache-2.0
"""Buffers to write payloads into, which are then sent from where they are.

:class:`Buffers` come from ``ZeroCopyUDP.allocate`` and end by being sent or recycled.  As with a
received :class:`~userspace.datagram.batch.Batch`, whatever was taken out of them stops working
then: a view used afterwards raises ValueError, it never touches another packet.  What cannot be
stopped (a slice of a view, an array made on top of it) makes sending and recycling raise
BufferError, and nothing is sent.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from userspace.datagram.batch import Abandoned, Batch, TakesBack
from userspace.datagram.fanout import same_lengths
from userspace.datagram.views import FORMATS, Watch
from userspace.native._native import ffi, lib
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.native._native import CData

__all__ = ["BufferPool", "Buffers"]


class BufferPool(TakesBack, Protocol):
    """Where buffers come from.  A ``memory`` is a ``struct sl_batch *`` with offsets and lengths."""

    @property
    def area(self) -> tuple[CData, int]:
        """What offsets count from, and its bytes; keeps the memory if it is not somebody else's."""

    def recycle(self, buffers: Buffers) -> None:
        """Take back all that are left."""

    def spare(self, memory: CData) -> None:
        """Columns that nobody sees any more."""

    def abandon(self, abandoned: Abandoned) -> None:
        """As BatchBackend.abandon."""


class Buffers:
    """Memory for payloads, ``size`` bytes each, in frames that are sent as they are.

    ``buffers[i]`` is a writable memoryview, made when asked for; its content is whatever was there
    before.  ``len(buffers)`` is how many are left to send: 0 when all were sent or recycled.  At the
    end of a ``with`` what is left is recycled.  Belongs to one thread.
    """

    __slots__ = ("_count", "_ended", "_memory", "_pool", "_size", "_watch")

    def __init__(self, pool: BufferPool, memory: CData, count: int, size: int) -> None:
        self._pool = pool
        self._memory: CData | None = memory
        self._count = count
        self._size = size
        self._ended = ""  # what became of them
        self._watch: Watch | None = None

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<Buffers, {self._ended}>" if self._ended else f"<{self._count} Buffers of {self._size}>"

    @property
    def size(self) -> int:
        """Bytes of each."""
        return self._size

    def _held(self) -> CData:
        memory = self._memory
        if memory is None:
            raise ValueError(f"these buffers were {self._ended}; allocate new ones")
        return memory

    def _watched(self) -> Watch:
        if self._watch is None:
            self._watch = Watch()
        return self._watch

    def _column(self, name: str) -> memoryview:
        memory, watch = self._held(), self._watched()
        column = watch.columns.get(name)
        if column is None:
            column = watch.columns[name] = watch.column(memory, name, self._count)
        return column

    @property
    def offsets(self) -> memoryview:
        """Where each begins in ``data``, bytes, format I."""
        return self._column("offsets")

    @property
    def lengths(self) -> memoryview:
        """Bytes of each payload, format I: ``size``, or what ``set_lengths`` or sending said."""
        return self._column("lengths")

    @property
    def data(self) -> memoryview:
        """The whole area that ``offsets`` count from, format B, writable.

        For C and array libraries.  Only ``size`` bytes at each of ``offsets`` are yours.
        """
        watch = self._watched()
        if watch.area is None:
            self._held()
            watch.area = watch.export(*self._pool.area)
        return watch.area

    def __getitem__(self, index: int) -> memoryview:
        memory, count = self._held(), self._count
        if not -count <= index < count:
            raise IndexError(f"buffer {index} of {count}")
        start = memory.offsets[index % count]
        view = self.data[start : start + self._size]
        self._watched().views.append(view)
        return view

    def __iter__(self) -> Iterator[memoryview]:
        self._held()
        for index in range(self._count):
            yield self[index]

    def scatter(self, offset: int, values: Sequence[int], width: int = 8) -> None:
        """Write ``values[i]`` at ``offset`` of every buffer, in network order; the counterpart of gather.

        ``width`` is 1 to 8 bytes; of longer numbers the lowest bytes are written.  One pass in C, for
        the fields that differ from packet to packet.  Values as an array("Q") are not copied.
        Raises UsageError where that is not within a buffer, or for another number of values.
        """
        memory = self._held()
        if not 1 <= width <= 8 or not 0 <= offset <= self._size - width:
            raise UsageError(f"scatter({offset}, ..., {width}) is not within {self._size} bytes")
        numbers = _numbers(values, "Q", "values")
        if len(numbers) != self._count:
            raise UsageError(f"{len(numbers)} values for {self._count} buffers")
        lib.sl_scatter(
            self._pool.area[0],
            memory.offsets,
            self._count,
            offset,
            width,
            ffi.from_buffer("uint64_t[]", numbers),
        )

    def set_lengths(self, lengths: int | Sequence[int]) -> None:
        """How many bytes of each are payload: one number for all, or one for each of the first ones.

        Raises UsageError for one that is not 0 to ``size``, or for more than there are buffers.
        """
        memory, count, size = self._held(), self._count, self._size
        if isinstance(lengths, int):
            if not 0 <= lengths <= size:
                raise UsageError(f"a length of {lengths} for buffers of {size} bytes")
            ffi.memmove(memory.lengths, same_lengths(lengths, count), 4 * count)
            return
        numbers = _numbers(lengths, "I", "lengths")
        if len(numbers) > count:
            raise UsageError(f"{len(numbers)} lengths for {count} buffers")
        if len(numbers) and max(numbers) > size:
            raise UsageError(f"a length of {max(numbers)} for buffers of {size} bytes")
        ffi.memmove(memory.lengths, numbers, 4 * len(numbers))

    def fill(self, batch: Batch) -> None:
        """Copy a received batch's payloads into the first ones; what is longer than ``size`` is cut off."""
        memory, count = self._held(), len(batch)
        if count > self._count:
            raise UsageError(f"{count} payloads for {self._count} buffers")
        if count:
            lib.sl_batch_copy(batch.memory, count, self._pool.area[0], memory.offsets, self._size)

    # for the pool

    def surrender(self, pool: BufferPool) -> CData:
        """End all views; the ``struct sl_batch *`` with what is left.

        Raises ValueError when all were sent or recycled before, UsageError when they are another
        pool's, and BufferError, naming the buffer, when a slice of a view or an array on top of it
        still exists; they stay held then.
        """
        memory = self._held()
        if pool is not self._pool:
            raise UsageError("these buffers are another ZeroCopyUDP's", hint="send and recycle them there")
        watch = self._watch
        if watch is not None:
            if not watch.end():
                raise BufferError(
                    f"{self._name(watch.survivor())} is still in use (a slice or an array made of its view); "
                    "copy what must outlive sending with bytes()"
                )
            self._watch = None
        return memory

    def keep(self, indices: Sequence[int], ended: str) -> None:
        """Only these are left, in that order; with none they have ``ended`` ("sent", say)."""
        memory = self._held()
        kept = [(memory.offsets[index], memory.lengths[index]) for index in indices]
        for place, (offset, length) in enumerate(kept):
            memory.offsets[place], memory.lengths[place] = offset, length
        self._count = memory.count = len(kept)
        if not kept:
            self._memory, self._ended = None, ended
            self._pool.spare(memory)

    def _name(self, view: memoryview | None) -> str:
        """Which buffer or column a view shows."""
        memory = self._held()
        if view is not None:
            at = int(ffi.cast("uintptr_t", ffi.from_buffer(view)))
            within = at - int(ffi.cast("uintptr_t", self._pool.area[0]))
            for index in range(self._count):
                if memory.offsets[index] <= within < memory.offsets[index] + self._size:
                    return f"buffer {index}"
            for name in ("offsets", "lengths"):
                start = int(ffi.cast("uintptr_t", getattr(memory, name)))
                if start <= at < start + self._count * FORMATS[name][0]:
                    return f"column {name!r}"
        return "a buffer or column"

    def __enter__(self) -> Buffers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._memory is not None:
            self._pool.recycle(self)

    def __del__(self) -> None:
        try:
            memory = self._memory
        except AttributeError:  # never finished
            return
        if memory is None or not self._count:
            return
        warnings.warn(
            f"{self._count} buffers were neither sent nor recycled; use them in a with statement",
            ResourceWarning,
            source=self,
            stacklevel=2,
        )
        self._pool.abandon(Abandoned(self._pool, memory, self._watch))


def _numbers(values: Sequence[int], code: str, what: str) -> array[int] | memoryview:
    """As an array of that type, which it may be already."""
    if isinstance(values, array) and values.typecode == code:
        return values
    if isinstance(values, memoryview) and values.format == code and values.c_contiguous:
        return values
    try:
        return array(code, values)
    except (TypeError, OverflowError):
        raise UsageError(f"{what} are whole numbers, not negative, that fit") from None

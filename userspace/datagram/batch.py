# SPDX-License-Identifier: Apache-2.0
"""Packets received together: columns over one data area, views on demand.

A :class:`Batch` holds buffers that its backend wants back.  Whatever was taken
out of it (a column, a packet's view) stops working when it is given back: using
it afterwards raises ValueError, it never shows another packet.  What cannot be
stopped (a slice of a view, an array made on top of it) makes ``release`` raise
BufferError, and the batch stays held.
"""

from __future__ import annotations

import ipaddress
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeAlias

from userspace.datagram.views import FORMATS, SOURCE_SIZE, Watch
from userspace.native._native import ffi, lib
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.native._native import CData

__all__ = [
    "SOURCE_SIZE", "Abandoned", "Address", "Batch", "BatchBackend", "TakesBack", "unpack_source",
]  # fmt: skip

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

# Looked up once: an attribute of lib costs 35 ns at every use.
_gather = lib.sl_batch_gather

# Memory of columns that somebody could still see when their backend was gone.
_kept: list[CData] = []


def unpack_source(source: CData, index: int) -> tuple[Address, int]:
    """Address and port of a ``struct sl_source``, that of packet ``index``."""
    packed = bytes(source.address)
    if source.family == 4:
        return ipaddress.IPv4Address(packed[12:]), source.port
    if source.family == 6:
        address = ipaddress.IPv6Address(packed)
        if source.scope:
            address = ipaddress.IPv6Address(f"{address}%{source.scope}")
        return address, source.port
    raise ValueError(f"packet {index} has no IP and UDP header that could be read")


class TakesBack(Protocol):
    """Whoever gets back what is in a ``struct sl_batch``."""

    def take_back(self, memory: CData) -> None:
        """It is done with; raises when the buffers are not what was handed out."""


class BatchBackend(TakesBack, Protocol):
    """What a batch needs of whoever filled it.  ``memory`` is a ``struct sl_batch *``."""

    def fill_columns(self, memory: CData) -> None:
        """Make all columns but ``sources`` true; called once, when the first is asked for."""

    def fill_sources(self, memory: CData) -> None:
        """Make ``sources`` true; called once, when the first is asked for."""

    def abandon(self, abandoned: Abandoned) -> None:
        """A batch was garbage collected without being released.

        Called from any thread at any time: only put it on a list, and try
        ``abandoned.reclaim()`` at the next receive.
        """


class Abandoned:
    """What is left of a batch that nobody released."""

    __slots__ = ("_backend", "_memory", "_watch")

    def __init__(self, backend: TakesBack, memory: CData, watch: Watch | None) -> None:
        self._backend = backend
        self._memory: CData | None = memory
        self._watch = watch

    def reclaim(self) -> bool:
        """Give the buffers back if nobody can see them any more; True when done."""
        if self._watch is not None and not self._watch.end():
            return False
        memory, self._memory = self._memory, None
        self._backend.take_back(memory)
        return True

    def __del__(self) -> None:
        if self._memory is not None and self._watch is not None and not self._watch.end():
            # Somebody looks at the columns of a backend that is gone.  Never free them.
            _kept.append(self._memory)


class Batch:
    """Packets received together, highest lane first.

    Columns are read-only memoryviews with one entry per packet:

    ============ === ==================================================================
    ``offsets``   I  where the payload begins in ``data``, bytes
    ``lengths``   I  of the payload, bytes
    ``lanes``     B  0 is the highest
    ``kinds``     B  number of the payload kind in its service, 0: no pattern matched
    ``classes``   B  of the sender, 0: in nobody's prefix
    ``services``  B  of the destination port, 0: unknown
    ``peers``     I  number of the configured peer, 0: stranger
    ``times``     Q  when it was read, or, in lanes with timestamps, when it came; ns of
                     CLOCK_MONOTONIC
    ============ === ==================================================================

    ``batch[i]`` is a writable memoryview of a payload, made when asked for.
    ``len(batch)`` may be 0: the timeout passed.  Belongs to one thread.
    """

    __slots__ = ("_backend", "_count", "_memory", "_watch")

    def __init__(self, backend: BatchBackend, memory: CData | None, count: int) -> None:
        self._backend = backend
        # None: nothing to give back, because empty or because it was given back.
        self._memory: CData | None = memory
        self._count = count  # -1: given back
        self._watch: Watch | None = None  # none yet: nobody has looked inside

    def __len__(self) -> int:
        count = self._count
        if count < 0:
            raise self._gone()
        return count

    def __bool__(self) -> bool:
        count = self._count
        if count < 0:
            raise self._gone()
        return count > 0

    def __repr__(self) -> str:
        return "<Batch, given back>" if self._count < 0 else f"<Batch of {self._count}>"

    @staticmethod
    def _gone() -> ValueError:
        return ValueError("this batch was given back; use what you need of it before release()")

    @property
    def released(self) -> bool:
        """Whether the batch was given back."""
        return self._count < 0

    @property
    def backend(self) -> BatchBackend:
        """Who filled it and gets it back."""
        return self._backend

    @property
    def memory(self) -> CData:
        """The ``struct sl_batch *``, columns filled, for C code; valid until release.

        Raises ValueError when the batch was given back or is empty.
        """
        return self._filled()

    def _filled(self) -> CData:
        memory = self._memory
        if memory is None:
            raise self._gone() if self._count < 0 else ValueError("the batch is empty")
        if not memory.columns_ready:
            self._backend.fill_columns(memory)
        return memory

    def _watched(self) -> Watch:
        if self._watch is None:
            self._watch = Watch()
        return self._watch

    def _column(self, name: str) -> memoryview:
        watch = self._watch
        if watch is not None:
            column = watch.columns.get(name)
            if column is not None:
                return column
        count = self._count
        if count <= 0:
            if count < 0:
                raise self._gone()
            return memoryview(b"").cast(FORMATS[name][1])
        memory = self._filled()
        if watch is None:
            watch = self._watch = Watch()
        column = watch.columns[name] = watch.column(memory, name, count)
        return column

    @property
    def offsets(self) -> memoryview:
        """Where each payload begins in ``data``, bytes, format I."""
        return self._column("offsets")

    @property
    def lengths(self) -> memoryview:
        """Bytes of each payload, format I."""
        return self._column("lengths")

    @property
    def lanes(self) -> memoryview:
        """Lane of each packet, format B."""
        return self._column("lanes")

    @property
    def kinds(self) -> memoryview:
        """Payload kind of each packet, format B."""
        return self._column("kinds")

    @property
    def classes(self) -> memoryview:
        """Class of each sender, format B."""
        return self._column("classes")

    @property
    def services(self) -> memoryview:
        """Service of each packet, format B."""
        return self._column("services")

    @property
    def peers(self) -> memoryview:
        """Number of each configured peer, 0: stranger, format I."""
        return self._column("peers")

    @property
    def times(self) -> memoryview:
        """Arrival of each packet, ns of CLOCK_MONOTONIC, format Q."""
        return self._column("times")

    @property
    def sources(self) -> memoryview:
        """Packed ``struct sl_source`` (native/batch.h), SOURCE_SIZE bytes each, format B.

        16 bytes address in network order (IPv4 mapped), u32 scope, u16 port in
        host order, u8 family (4, 6, 0: unknown), u8 reserved.
        """
        if self._count:
            self._sourced()
        return self._column("sources")

    def _sourced(self) -> CData:
        memory = self._filled()
        if not memory.sources_ready:
            self._backend.fill_sources(memory)
        return memory

    def source(self, index: int) -> tuple[Address, int]:
        """Sender's address and port of one packet; an object each time, not for every packet.

        Raises ValueError where the packet's headers do not tell.
        """
        index = self._index(index)
        return unpack_source(self._sourced().sources[index], index)

    @property
    def data(self) -> memoryview:
        """The whole area that ``offsets`` count from, format B.

        For C and array libraries.  It reaches beyond this batch's packets; only
        ``offsets[i]`` to ``offsets[i] + lengths[i]`` is yours.
        """
        if self._count == 0:
            return memoryview(b"")
        return self._whole()

    def _whole(self) -> memoryview:
        watch = self._watched()
        if watch.area is None:
            memory = self._filled()
            watch.area = watch.export(memory.data, memory.data_size)
        return watch.area

    def gather(self, offset: int, width: int = 8) -> memoryview:
        """``width`` bytes (1 to 8) at ``offset`` of every payload, as numbers, format Q.

        Read in network order; 0 where the payload is too short.  One pass in C,
        for the fields that a protocol dispatches on.  The next call overwrites
        the result.  Raises UsageError for another width or a negative offset.
        """
        if not 1 <= width <= 8 or not 0 <= offset < 1 << 31:
            raise UsageError(f"gather({offset}, {width}): width is 1 to 8 bytes and offset not negative")
        if self._count == 0:
            return memoryview(b"").cast("Q")
        _gather(self._filled(), offset, width)
        return self._column("gathered")

    def _index(self, index: int) -> int:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"packet {index} of a batch of {count}")
        return index % count

    def __getitem__(self, index: int) -> memoryview:
        index = self._index(index)
        area = self._whole()
        memory = self._filled()
        start = memory.offsets[index]
        view = area[start : start + memory.lengths[index]]
        self._watched().views.append(view)
        return view

    def __iter__(self) -> Iterator[memoryview]:
        count = len(self)
        if count == 0:
            return
        area = self._whole()
        memory = self._filled()
        views = self._watched().views
        for start, length in zip(
            ffi.unpack(memory.offsets, count), ffi.unpack(memory.lengths, count), strict=True
        ):
            if self._count < 0:
                raise self._gone()
            view = area[start : start + length]
            views.append(view)
            yield view

    def release(self) -> None:
        """Give the buffers back.

        Raises ValueError when that was done before, and BufferError, naming the
        packet, when a slice of a view or an array on top of it still exists; the
        batch stays held then, and release may be called again.
        """
        if self._count < 0:
            raise self._gone()
        if self._watch is not None:
            self.detach()
        memory, self._memory = self._memory, None
        self._count = -1
        if memory is not None:
            self._backend.take_back(memory)

    def detach(self) -> None:
        """Release all views and columns, as release does, but keep the buffers.

        For backends that do something else with the buffers than take them back
        (send them, say).  Raises as :meth:`release` does.
        """
        watch = self._watch
        if watch is None:
            return
        if not watch.end():
            raise BufferError(
                f"{self._name(watch.survivor())} of this batch is still in use (a slice or an array made of "
                "its view); copy what must outlive the batch with bytes()"
            )
        self._watch = None

    def _name(self, view: memoryview | None) -> str:
        """Which packet or column a view shows."""
        if view is None:
            return "a packet or column"
        memory = self._filled()
        at = int(ffi.cast("uintptr_t", ffi.from_buffer(view)))
        within = at - int(ffi.cast("uintptr_t", memory.data))
        for index in range(self._count):
            start = memory.offsets[index]
            if start <= within < start + max(memory.lengths[index], 1):
                return f"packet {index}"
        for name, (size, _) in FORMATS.items():
            start = int(ffi.cast("uintptr_t", getattr(memory, name)))
            if start <= at < start + self._count * size:
                return f"column {name!r}"
        return "data"

    def surrender(self) -> CData | None:
        """Hand the memory to a backend that disposes of it itself; the batch is then released."""
        if self._count < 0:
            raise self._gone()
        self.detach()
        memory, self._memory = self._memory, None
        self._count = -1
        return memory

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watch is not None:
            if self._count >= 0:
                self.release()
            return
        # As release does, without the calls: this is the way of every batch whose packets nobody looked at.
        memory = self._memory
        self._count = -1
        if memory is not None:
            self._memory = None
            self._backend.take_back(memory)

    def __del__(self) -> None:
        try:
            memory = self._memory
        except AttributeError:  # never finished
            return
        if memory is None:
            return
        warnings.warn(
            f"a batch of {self._count} was never released; use it in a with statement",
            ResourceWarning,
            source=self,
            stacklevel=2,
        )
        self._backend.abandon(Abandoned(self._backend, memory, self._watch))

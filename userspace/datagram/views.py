# SPDX-License-Identifier: Apache-2.0
"""Views of a batch's memory that can be ended: none of them ever shows another batch's packets."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import TYPE_CHECKING, Literal, TypeAlias

from userspace.native._native import ffi, lib

if TYPE_CHECKING:
    from userspace.native._native import CData

SOURCE_SIZE: int = ffi.sizeof("struct sl_source")

# Of struct sl_batch: element size in bytes and struct format of what Python sees.
_Code: TypeAlias = Literal["B", "I", "Q"]
FORMATS: dict[str, tuple[int, _Code]] = {
    "offsets": (4, "I"),
    "lengths": (4, "I"),
    "peers": (4, "I"),
    "times": (8, "Q"),
    "gathered": (8, "Q"),
    "lanes": (1, "B"),
    "kinds": (1, "B"),
    "classes": (1, "B"),
    "services": (1, "B"),
    "sources": (SOURCE_SIZE, "B"),
}


# Looked up once: an attribute of ffi costs 35 ns at every use.
_buffer = ffi.buffer


@functools.lru_cache(maxsize=64)
def _layout(capacity: int) -> dict[str, int]:
    """Where each column begins in the block of all; the same for every batch of that capacity."""
    memory = ffi.gc(lib.sl_batch_new(capacity), lib.sl_batch_free)
    return {name: ffi.cast("uint8_t *", getattr(memory, name)) - memory.columns for name in FORMATS}


class Watch:
    """All that was made of a batch's buffers, so that it can be ended.

    A view that was handed out can be released, but slices and casts that were made of it
    live on.  They keep the exporter alive: the object that the first view was made of.

    Made when the first view is asked for: a batch of which only the length is asked costs less.
    """

    __slots__ = ("area", "block", "columns", "exporters", "places", "views")

    def __init__(self) -> None:
        self.views: list[memoryview] = []
        self.exporters: list[weakref.ref[object]] = []
        self.columns: dict[str, memoryview] = {}
        self.area: memoryview | None = None  # all of the data, once a packet was asked for
        self.block: memoryview | None = None  # all columns, once one was asked for
        self.places: dict[str, int]  # of the columns in it

    def export(self, pointer: CData, size: int) -> memoryview:
        """A view of memory under watch; all further ones are to be slices of it."""
        buffer = _buffer(pointer, size)
        self.exporters.append(weakref.ref(buffer))
        view = memoryview(buffer)
        self.views.append(view)
        return view

    def column(self, memory: CData, name: str, count: int) -> memoryview:
        """A column, read-only; slices of one view, where all columns are in one piece."""
        size, code = FORMATS[name]
        block = self.block
        if block is None:
            columns = memory.columns
            if not columns:
                view = memoryview(_buffer(getattr(memory, name), count * size))
                self.exporters.append(weakref.ref(view.obj))
                column = view.toreadonly().cast(code)
                self.views.append(column)
                return column
            buffer = _buffer(columns, memory.columns_size)
            self.exporters.append(weakref.ref(buffer))
            block = self.block = memoryview(buffer).toreadonly()
            self.views.append(block)
            self.places = _layout(memory.capacity)
        start = self.places[name]
        column = block[start : start + count * size].cast(code)
        self.views.append(column)
        return column

    def end(self) -> bool:
        """Release all views; whether nobody sees the memory any more."""
        ended = True
        for view in self.views:
            try:
                view.release()
            except BufferError:  # an array was made of the view itself
                ended = False
        for exporter in self.exporters:
            if exporter() is not None:
                ended = False
        if not ended:  # the batch stays, and what is asked for again is made again
            self.columns = {}
            self.area = self.block = None
        return ended

    def survivor(self) -> memoryview | None:
        """One of the views that keep the memory in use; slow, for the error message."""
        exporters = [exporter() for exporter in self.exporters]
        for found in gc.get_objects():
            if type(found) is memoryview:
                try:
                    exporter = found.obj
                except ValueError:  # released
                    continue
                if any(exporter is one for one in exporters if one is not None):
                    return found
        return None

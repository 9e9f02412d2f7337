# SPDX-License-Identifier: Apache-2.0
"""In place of the C module of this name (build.py) where there is no Linux: batches, in Python.

Where both are, Python takes the C module.  native/batch.h says what these functions do.
"""

from __future__ import annotations

import errno
from typing import Any

from userspace.native.build import ABI_HEADER, HERE, KERNEL_TYPES, PARTS, declarations
from xdp.elsewhere import Library, declare, refuse_on_linux

refuse_on_linux("userspace.native._native", "userspace/native/build.py")

# Columns of struct sl_batch, widest first, with their types.
_COLUMNS = {
    "times": "uint64_t",
    "addresses": "uint64_t",
    "gathered": "uint64_t",
    "offsets": "uint32_t",
    "lengths": "uint32_t",
    "peers": "uint32_t",
    "sizes": "uint32_t",
    "sources": "struct sl_source",
    "lanes": "uint8_t",
    "kinds": "uint8_t",
    "classes": "uint8_t",
    "services": "uint8_t",
}
_ALIGN = 64

ffi = declare(KERNEL_TYPES, declarations(ABI_HEADER), *(declarations(HERE / f"{part}.h") for part in PARTS))

#: Memory of batches that were not freed yet, by address.
_batches: dict[int, tuple[Any, Any]] = {}


def _address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


def _batch_new(capacity: int) -> Any:
    if not 1 <= capacity <= lib.SL_BATCH_MAX:
        return ffi.NULL
    places, size = {}, 0
    for name, kind in _COLUMNS.items():
        places[name] = size
        size += -(-capacity * ffi.sizeof(kind) // _ALIGN) * _ALIGN
    block = ffi.new("uint8_t[]", size)
    batch = ffi.new("struct sl_batch *")
    batch.capacity = capacity
    batch.columns, batch.columns_size = block, size
    for name, kind in _COLUMNS.items():
        setattr(batch, name, ffi.cast(f"{kind} *", block + places[name]))
    _batches[_address(batch)] = batch, block
    return batch


def _batch_free(batch: Any) -> None:
    _batches.pop(_address(batch), None)


def _batch_gather(batch: Any, offset: int, width: int) -> int:
    if not 1 <= width <= 8:
        return -errno.EINVAL
    data = ffi.buffer(batch.data, batch.data_size)
    for index in range(batch.count):
        start = batch.offsets[index] + offset
        whole = offset + width <= batch.lengths[index]
        batch.gathered[index] = int.from_bytes(data[start : start + width], "big") if whole else 0
    return 0


lib = Library(
    ffi,
    {"sl_batch_new": _batch_new, "sl_batch_free": _batch_free, "sl_batch_gather": _batch_gather},
)

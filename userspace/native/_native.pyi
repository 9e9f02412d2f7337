# SPDX-License-Identifier: Apache-2.0
"""Types of the cffi module that build.py makes; the headers are the manual.

C data is ``Any``: mypy cannot see into it.  Functions that return int return 0,
a count or a descriptor, or a negative errno, unless their header says otherwise.
Each part adds its functions below under its own name.
"""

from typing import Any, TypeAlias

from typing_extensions import Buffer

CData: TypeAlias = Any

class _CType:
    elements: dict[int, str]
    relements: dict[str, int]
    fields: list[tuple[str, Any]]
    length: int

class _FFI:
    NULL: CData
    def new(self, declaration: str, init: Any = ...) -> CData: ...
    def cast(self, declaration: str, value: Any) -> CData: ...
    def sizeof(self, declaration: Any) -> int: ...
    def offsetof(self, declaration: str, *fields: str | int) -> int: ...
    def typeof(self, declaration: Any) -> _CType: ...
    def buffer(self, data: CData, size: int = ...) -> Any: ...
    def from_buffer(self, declaration: str, buffer: Buffer, require_writable: bool = ...) -> CData: ...
    def string(self, data: CData, maxlen: int = ...) -> bytes: ...
    def unpack(self, data: CData, length: int) -> Any: ...
    def memmove(self, destination: Any, source: Any, size: int) -> None: ...
    def addressof(self, data: CData, *fields: str | int) -> CData: ...
    def gc(self, data: CData, destructor: Any, size: int = ...) -> CData: ...

class _Lib:
    # bpf/include/abi.h
    SLUICE_MAX_LANES: int
    SLUICE_MAX_SERVICES: int
    SLUICE_MAX_CLASSES: int
    SLUICE_MAX_KINDS: int
    SLUICE_MAX_QUEUES: int
    SLUICE_XSKS_SIZE: int
    SLUICE_NO_LANE: int

    # batch
    SL_BATCH_MAX: int
    def sl_batch_new(self, capacity: int) -> CData: ...
    def sl_batch_free(self, batch: CData) -> None: ...
    def sl_batch_gather(self, batch: CData, offset: int, width: int) -> int: ...

    # checksum
    def sl_sum(self, data: Any, length: int, partial: int) -> int: ...
    def sl_fold(self, partial: int) -> int: ...

ffi: _FFI
lib: _Lib

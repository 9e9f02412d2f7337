# SPDX-License-Identifier: Apache-2.0
"""Names for what bpf/include/abi.h numbers.

Every value here is read from the compiled header; nothing is typed in again.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from xdp._libbpf import ffi, lib

Address = IPv4Address | IPv6Address
Category = Literal["passed", "steered", "dropped", "replied"]

_REASON_ENUM: dict[int, str] = ffi.typeof("enum sluice_reason").elements

#: "pass_truncated", ..., indexed by the number that the program counts under.
REASONS: tuple[str, ...] = tuple(
    _REASON_ENUM[number].removeprefix("SLUICE_").lower() for number in range(lib.SLUICE_REASONS)
)

_CATEGORY_OF_PREFIX: dict[str, Category] = {
    "pass": "passed",
    "steer": "steered",
    "drop": "dropped",
    "reply": "replied",
}

_V4_MAPPED = bytes(10) + b"\xff\xff"


def category(reason: int) -> Category:
    """What happened to packets counted under ``reason``."""
    return _CATEGORY_OF_PREFIX[REASONS[reason].split("_", 1)[0]]


def pack_address(address: Address) -> bytes:
    """16 bytes in network order; IPv4 becomes ::ffff:a.b.c.d, as in ``struct sluice_address``."""
    return _V4_MAPPED + address.packed if isinstance(address, IPv4Address) else address.packed


def unpack_address(raw: bytes) -> Address:
    """The inverse of :func:`pack_address`; ``raw`` has 16 bytes."""
    if raw[:12] == _V4_MAPPED:
        return IPv4Address(raw[12:16])
    return IPv6Address(raw)

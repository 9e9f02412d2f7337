# SPDX-License-Identifier: Apache-2.0
"""A policy as JSON and back, exactly: what an owner tells applications about names and peers.

Not the TOML file again: that may refer to files which the application may not read, and the
kernel's numbers of peers outlive several policies, so they differ from a file's.
"""

from __future__ import annotations

import functools
import types
import typing
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import msgspec

from xdp._libbpf import ffi
from xdp.abi import unpack_address
from xdp.errors import UsageError
from xdp.policy import Policy
from xdp.policy_model import Address, PeerEntry
from xdp.tables import Tables

#: 131,072 peers with names of 64 characters are about 15 MB.
MAX_DOCUMENT = 64 << 20

_SPECIAL = (IPv4Address, IPv6Address, IPv4Network, IPv6Network)


def encode_policy(policy: Policy) -> bytes:
    """The document; bytes are in base64, addresses and prefixes as text."""
    return msgspec.json.encode(policy, enc_hook=str)


def decode_policy(document: bytes) -> Policy:
    """The policy in a document. Raises `UsageError` when it is none."""
    try:
        found = _build(Policy, msgspec.json.decode(document))
    except (msgspec.MsgspecError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"the owner's policy is not understood: {error}",
            hint="owner and application must be the same version of Sluice",
        ) from error
    assert isinstance(found, Policy)
    return found


def known_ids(tables: Tables) -> dict[Address, int]:
    """The numbers that the kernel has for configured peers."""
    count = tables.known.count
    raw = bytes(ffi.buffer(tables.known.keys, count * ffi.sizeof("struct sluice_address")))
    size = ffi.sizeof("struct sluice_address")
    return {
        unpack_address(raw[index * size : (index + 1) * size]): int(tables.known.ids[index])
        for index in range(count)
    }


def with_ids(policy: Policy, ids: dict[Address, int]) -> Policy:
    """The same policy with these numbers of its peers."""

    def renumbered(peers: tuple[PeerEntry, ...]) -> tuple[PeerEntry, ...]:
        return tuple(msgspec.structs.replace(peer, id=ids[peer.address]) for peer in peers)

    classes = tuple(msgspec.structs.replace(one, peers=renumbered(one.peers)) for one in policy.classes)
    return msgspec.structs.replace(policy, classes=classes)


def _build(kind: Any, value: Any) -> Any:
    """``value`` (plain JSON) as a ``kind``; msgspec itself allows no unions of two address types."""
    origin = typing.get_origin(kind)
    if origin in {typing.Union, types.UnionType}:
        return _build_union(typing.get_args(kind), value)
    if origin is tuple:
        item, *rest = typing.get_args(kind)
        if rest != [Ellipsis] or not isinstance(value, list):
            raise TypeError(f"a list was expected, not {value!r:.60}")
        return tuple(_build(item, one) for one in value)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if not isinstance(value, dict):
            raise TypeError(f"{kind.__name__}: an object was expected, not {value!r:.60}")
        fields = _fields(kind)
        return kind(**{fields[key][0]: _build(fields[key][1], one) for key, one in value.items()})
    if kind in _SPECIAL:
        if not isinstance(value, str):
            raise TypeError(f"an address was expected, not {value!r:.60}")
        return kind(value)
    return msgspec.convert(value, kind)


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> dict[str, tuple[str, Any]]:
    """Name in JSON -> name and type in Python."""
    hints = typing.get_type_hints(kind)
    return {field.encode_name: (field.name, hints[field.name]) for field in msgspec.structs.fields(kind)}


def _build_union(kinds: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in kinds:
        return None
    failure: Exception = ValueError(f"{value!r:.60} was not expected")
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _build(kind, value)
        except (ValueError, TypeError, msgspec.ValidationError) as error:
            failure = error
    raise failure

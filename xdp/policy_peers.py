# SPDX-License-Identifier: Apache-2.0
"""Addresses in a policy: prefixes, peers, and files with one peer a line.

All of it is made for tens of thousands of entries: places for messages are built
only when something is wrong.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, NetmaskValueError
from pathlib import Path
from typing import Any

from xdp.policy_model import Address, Prefix
from xdp.policy_place import Place, Table, escape, escape_source, show

#: 131,072 peers, each with an IPv6 address and a name of 64 bytes, are 14 MB.
MAX_PEERS_FILE = 16 << 20
MAX_PEER_NAME = 64

_PREFIX_LENGTH = re.compile(r"0|[1-9][0-9]{0,2}", re.ASCII)
_MAPPED = IPv6Network("::ffff:0:0/96")
_LONGEST_ADDRESS = 45  # INET6_ADDRSTRLEN - 1

_ADDRESS_ALLOWED = "one IPv4 or IPv6 address"
_PREFIX_ALLOWED = "an IPv4 or IPv6 prefix such as 192.0.2.0/24 or 2001:db8::/32"


def read_text(path: Path, place: Place, limit: int) -> str:
    """The whole of a regular UTF-8 file of at most ``limit`` bytes; anything else is ``place``'s error.

    A FIFO or a device is refused rather than waited for.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError:
        raise place.error("the file name holds a NUL") from None
    except OSError as error:
        raise place.error(_open_failure(error)) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            what = "is a directory" if stat.S_ISDIR(mode) else "is not a regular file"
            raise place.error(what, allowed="a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise place.error(f"cannot be read: {os.strerror(error.errno or errno.EIO)}") from None
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise place.error(f"is larger than {limit} bytes", allowed=f"at most {limit} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise place.error(f"is not UTF-8 (byte {error.start})", allowed="UTF-8 text") from None
    if text.startswith("\ufeff"):
        raise place.error("starts with a byte order mark", allowed="UTF-8 text without one")
    return text


def _open_failure(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "there is no such file"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "may not be read by this user; change the file's permissions or use another user"
    return f"cannot be opened: {os.strerror(error.errno or errno.EIO)}"


def parse_address(text: str) -> Address | None:
    """``text`` as an address without scope, or None."""
    if len(text) > _LONGEST_ADDRESS or "%" in text:
        return None
    try:
        return IPv6Address(text) if ":" in text else IPv4Address(text)
    except AddressValueError:
        return None


def address_fault(address: Address) -> str | None:
    """Why ``address`` cannot be a peer (no packet from it is ever looked up), or None."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return f"is IPv4 mapped into IPv6; write it as {address.ipv4_mapped}"
    if address.is_multicast:
        return "is a multicast address"
    if address.is_loopback:
        return "is a loopback address"
    if isinstance(address, IPv4Address):
        first = address.packed[0]
        if first == 0:
            return "is in 0.0.0.0/8, which no host has"
        if first >= 240:
            return "is in 240.0.0.0/4, which no host has"
    elif address.is_unspecified:
        return "is the unspecified address"
    return None


def check_peer_text(text: str, place: Place) -> Address:
    """The peer's address in ``text``; raises at ``place`` when it is none or can't be a peer."""
    address = parse_address(text)
    if address is None:
        if "/" in text:
            raise place.error(
                f"found {show(text)}", allowed=f"{_ADDRESS_ALLOWED}; a prefix belongs into prefixes"
            )
        raise place.error(f"found {show(text)}", allowed=_ADDRESS_ALLOWED)
    fault = address_fault(address)
    if fault is not None:
        raise place.error(f"{address} {fault}", allowed="the unicast address of another host")
    return address


def check_peer_name(name: object, place: Place) -> str:
    """``name`` when it can be shown in a table; raises at ``place`` otherwise."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_PEER_NAME or not name.isprintable():
        raise place.wrong(name, f"1 to {MAX_PEER_NAME} printable characters")
    return name


def read_peers(table: Table, model: type[Any]) -> list[tuple[Address, str]]:
    """The inline ``peers`` of a class: addresses, or tables with address and name (``model``'s keys)."""
    place = table.at("peers")
    found: list[tuple[Address, str]] = []
    for index, value in enumerate(table.array("peers")):
        if isinstance(value, str):
            address = parse_address(value)
            if address is None or address_fault(address) is not None:
                check_peer_text(value, place.item(index))
            else:
                found.append((address, ""))
            continue
        if not isinstance(value, dict):
            raise place.item(index).wrong(value, 'an address or { address = "...", name = "..." }')
        entry = Table(place.item(index), value, model)
        entry.require("address", _ADDRESS_ALLOWED)
        text = entry.values["address"]
        if not isinstance(text, str):
            raise entry.at("address").wrong(text, _ADDRESS_ALLOWED)
        name = check_peer_name(entry.values["name"], entry.at("name")) if "name" in entry else ""
        found.append((check_peer_text(text, entry.at("address")), name))
    return found


def read_peers_file(table: Table, directory: Path | None) -> list[tuple[Address, str]]:
    """The peers in the file that ``peers_file`` names, relative to ``directory``."""
    if "peers_file" not in table:
        return []
    place = table.at("peers_file")
    name = table.values["peers_file"]
    if not isinstance(name, str) or not name:
        raise place.wrong(name, "the name of a file, relative to the policy file")
    path = Path(name)
    if not path.is_absolute():
        if directory is None:
            raise place.error(
                "a policy that is not in a file needs the whole path", allowed="an absolute path"
            )
        path = directory / path
    shown = escape_source(name)
    text = read_text(path, Place(place.source, f"{place.path}: {shown}"), MAX_PEERS_FILE)
    return list(_lines_to_peers(text, place, shown))


def _lines_to_peers(text: str, place: Place, shown: str) -> Iterator[tuple[Address, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.split("#", 1)[0].split(None, 1)
        if not words:
            continue
        address = parse_address(words[0])
        if address is None or address_fault(address) is not None:
            address = check_peer_text(words[0], _at_line(place, shown, number))
        name = ""
        if len(words) == 2:
            name = check_peer_name(words[1].rstrip(), _at_line(place, shown, number))
        yield address, name


def _at_line(place: Place, shown: str, number: int) -> Place:
    return Place(place.source, f"{place.path}: {shown}:{number}")


def read_prefixes(table: Table) -> tuple[Prefix, ...]:
    """The ``prefixes`` of a class, each once."""
    place = table.at("prefixes")
    return tuple(
        _parse_prefix(value) or _explain_prefix(value, place.item(index))
        for index, value in enumerate(table.array("prefixes"))
    )


def _parse_prefix(value: object) -> Prefix | None:
    """``value`` as a prefix, or None for :func:`_explain_prefix` to say why not."""
    if not isinstance(value, str):
        return None
    address, slash, length = value.partition("/")
    if not slash or not _PREFIX_LENGTH.fullmatch(length) or parse_address(address) is None:
        return None
    try:
        prefix = IPv6Network(value) if ":" in address else IPv4Network(value)
    except (AddressValueError, NetmaskValueError, ValueError):
        return None
    if isinstance(prefix, IPv6Network) and prefix.subnet_of(_MAPPED):
        return None
    return prefix


def _explain_prefix(value: object, place: Place) -> Prefix:
    """Always raises; the return type lets it stand where a prefix is expected."""
    if not isinstance(value, str):
        raise place.wrong(value, _PREFIX_ALLOWED)
    address, slash, length = value.partition("/")
    parsed = parse_address(address)
    if parsed is None:
        raise place.wrong(value, _PREFIX_ALLOWED)
    bits = parsed.max_prefixlen
    if not slash:
        raise place.error(
            f"{parsed} has no prefix length", allowed=f"{parsed}/{bits}; a configured peer belongs into peers"
        )
    if not _PREFIX_LENGTH.fullmatch(length) or int(length) > bits:
        raise place.error(f'found prefix length "{escape(length)}"', allowed=f"a number from 0 to {bits}")
    if isinstance(parsed, IPv6Address):
        prefix6 = IPv6Network(value, strict=False)
        if prefix6.subnet_of(_MAPPED):
            inner = IPv4Network((prefix6.network_address.packed[12:], prefix6.prefixlen - 96))
            raise place.error(f"{escape(value)} is IPv4 mapped into IPv6; write it as {inner}")
        raise place.error(f"{escape(value)} has bits set after its prefix", allowed=str(prefix6))
    corrected = IPv4Network(value, strict=False)
    raise place.error(f"{escape(value)} has bits set after its prefix", allowed=str(corrected))

# SPDX-License-Identifier: Apache-2.0
"""Sluice's own terms for what is in its maps.

BTF says where every field is; what it cannot say is here: that a struct is an address, that a byte is one of
``enum sluice_action``, that index 73,537 of "ports" is port 8001 of bank 1.  Names of structs, enums and maps
are those of bpf/include/abi.h, and every size is read from the compiled header.
"""

from __future__ import annotations

import sys
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, NamedTuple

from xdp._libbpf import ffi, lib
from xdp.abi import REASONS, pack_address, unpack_address
from xdp.codec import RangeError, Value, View
from xdp.errors import SluiceError
from xdp.names import Names, Term

_V4_BITS = 96  # an IPv4 prefix is ::ffff:0:0/96 and longer
_WORDS = 4

Fields = dict[str, Value]


def _enum(name: str, prefix: str) -> dict[int, str]:
    elements = sorted(ffi.typeof(name).elements.items())
    return {number: text.removeprefix(prefix).lower() for number, text in elements}


#: Bytes that hold an enum, by struct and member.
_ENUMS: dict[str, dict[str, dict[int, str]]] = {
    "sluice_rule": {
        "action": _enum("enum sluice_action", "SLUICE_ACTION_"),
        "over": _enum("enum sluice_over", "SLUICE_OVER_"),
    },
    "sluice_lane": {
        "end": _enum("enum sluice_lane_end", "SLUICE_END_"),
        "over": _enum("enum sluice_over", "SLUICE_OVER_"),
    },
}


def _object(value: Value) -> Fields:
    if not isinstance(value, dict):
        raise ValueError("an object of the struct's members")  # noqa: TRY004 - what a View raises
    return dict(value)


def _plain_view(struct: str) -> View:
    """Without "reserved", and with enums by name."""
    enums = _ENUMS.get(struct, {})

    def read(fields: Fields) -> Value:
        return {
            name: enums[name].get(value, value) if name in enums else value
            for name, value in fields.items()
            if name != "reserved"
        }

    def write(value: Value) -> Fields:
        fields = _object(value)
        for name, labels in enums.items():
            if isinstance(fields.get(name), str):
                numbers = {label: number for number, label in labels.items()}
                if fields[name] not in numbers:
                    raise ValueError(f"{name} {', '.join(numbers)}")
                fields[name] = numbers[fields[name]]
        return fields

    return View(read, write)


def _read_address(fields: Fields) -> Value:
    raw = b"".join(word.to_bytes(4, sys.byteorder) for word in fields["word"])
    return str(unpack_address(raw))


def _write_address(value: Value) -> Fields:
    try:
        raw = pack_address(ip_address(value if isinstance(value, str) else ""))
    except ValueError:
        raise ValueError("an IPv4 or IPv6 address") from None
    return {"word": [int.from_bytes(raw[i * 4 : i * 4 + 4], sys.byteorder) for i in range(_WORDS)]}


def _read_prefix(fields: Fields) -> Value:
    address, bits = ip_address(fields["address"]), int(fields["prefixlen"])
    if isinstance(address, IPv4Address) and bits >= _V4_BITS:
        return f"{address}/{bits - _V4_BITS}"
    wide = IPv6Address(pack_address(address))
    return f"{wide}/{bits}"


def _write_prefix(value: Value) -> Fields:
    try:
        network = ip_network(value if isinstance(value, str) else "")
    except ValueError as error:
        raise ValueError(f"a prefix such as 10.0.0.0/8 or 2001:db8::/32 ({error})") from None
    bits = network.prefixlen + (_V4_BITS if isinstance(network, IPv4Network) else 0)
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped and bits > _V4_BITS:
        raise ValueError("an IPv4 prefix in its own notation")
    return {"prefixlen": bits, "address": str(network.network_address)}


#: Where the numbers of a peer are in ``struct sluice_known``.  What is counted is there twice, by the peer's
#: home CPU and by all others.
PEER_PLACES: dict[str, tuple[tuple[str, str], ...]] = {
    "packets": (("peer", "packets"), ("away", "packets")),
    "bytes": (("peer", "bytes"), ("away", "bytes")),
    "drops": (("peer", "drops"), ("away", "drops")),
    "last_seen_ns": (("peer", "last_seen_ns"),),
    "tat_ns": (("peer", "tat_ns"),),
    "class": (("peer", "class_id"),),
    "generation": (("peer", "generation"),),
}


def _read_peer(fields: Fields) -> Value:
    found = {
        name: sum(fields[struct][member] for struct, member in places) for name, places in PEER_PLACES.items()
    }
    return found | {"id": fields["id"]}


def _write_peer(value: Value) -> Fields:
    fields = _object(value)
    if ("class" in fields) != ("generation" in fields):
        raise ValueError("class and generation together, for a class is that of one generation")
    found: Fields = {"peer": {}, "away": {}}
    for name, number in fields.items():
        places = PEER_PLACES.get(name)
        if places is None:
            found[name] = number
            continue
        for place, (struct, member) in enumerate(places):
            found[struct][member] = 0 if place else number  # what is given is the total
    return found


#: How the row of packets that no lane was chosen for is called.
NO_LANE = "none"


def _row_name(row: int) -> str:
    return NO_LANE if row == lib.SLUICE_NO_LANE else str(row)


def _read_counters(fields: Fields) -> Value:
    counts = fields["verdict"]
    if len(counts) != lib.SLUICE_VERDICTS_SIZE:
        return fields  # a program of another version: its rows can't be named
    verdict: Fields = {}
    for row in range(lib.SLUICE_COUNTER_ROWS):
        row_counts = counts[row * lib.SLUICE_REASONS : (row + 1) * lib.SLUICE_REASONS]
        named = {REASONS[reason]: count for reason, count in enumerate(row_counts) if count["packets"]}
        if named:
            verdict[_row_name(row)] = named
    return {name: value for name, value in fields.items() if name not in ("verdict", "reserved")} | {
        "verdict": verdict
    }


def _write_counters(value: Value) -> Fields:
    fields = _object(value)
    named = fields.get("verdict", [])
    if isinstance(named, dict):
        empty = {"packets": 0, "bytes": 0}
        counts = [dict(empty) for _ in range(lib.SLUICE_VERDICTS_SIZE)]
        rows = {_row_name(row): row for row in range(lib.SLUICE_COUNTER_ROWS)}
        for row_name, reasons in named.items():
            for reason, count in reasons.items() if isinstance(reasons, dict) else ():
                if row_name not in rows or reason not in REASONS:
                    raise ValueError(f"verdict by row ({', '.join(rows)}) and reason ({', '.join(REASONS)})")
                counts[rows[row_name] * lib.SLUICE_REASONS + REASONS.index(reason)] = empty | _object(count)
        fields["verdict"] = counts
    return fields


VIEWS: dict[str, View] = {
    "sluice_address": View(_read_address, _write_address),
    "sluice_prefix": View(_read_prefix, _write_prefix),
    "sluice_known": View(_read_peer, _write_peer),
    "sluice_counters": View(_read_counters, _write_counters),
} | {
    name: _plain_view(name)
    for name in ("sluice_port", "sluice_pattern", "sluice_rule", "sluice_lane", "sluice_policy")
}

#: Members whose number has a name in the policy.
TERMS: dict[str, Term] = {
    "class": "class",
    "class_id": "class",
    "demote_lane": "lane",
    "kind": "kind",
    "lane": "lane",
    "service": "service",
}

BANK = "bank"
CPU = "cpu"

#: What the index of an array stands for, the part that changes slowest first.
_INDEXED: dict[str, tuple[tuple[str, int], ...]] = {
    "policies": ((BANK, lib.SLUICE_BANKS),),
    "ports": ((BANK, lib.SLUICE_BANKS), ("port", lib.SLUICE_PORTS)),
    "patterns": ((BANK, lib.SLUICE_BANKS), ("service", lib.SLUICE_MAX_SERVICES)),
    "rules": (
        (BANK, lib.SLUICE_BANKS),
        ("service", lib.SLUICE_MAX_SERVICES),
        ("class", lib.SLUICE_MAX_CLASSES),
        ("kind", lib.SLUICE_MAX_KINDS),
    ),
    "known_filter": ((BANK, lib.SLUICE_BANKS), ("word", lib.SLUICE_FILTER_WORDS)),
    "peer_holds": (("peer", lib.SLUICE_MAX_KNOWN),),
    "hold_marks": (("line", lib.SLUICE_HOLD_LINES),),
    "lane_limits": (("lane", lib.SLUICE_MAX_LANES),),
    "prefix_limits": (("bucket", lib.SLUICE_PREFIX_BUCKETS),),
    "xsks": (("queue", lib.SLUICE_MAX_QUEUES), ("lane", lib.SLUICE_MAX_LANES)),
}
#: Arrays with a row for each CPU, and whether the rows are there to be added up.
_BY_CPU = {"counters": True, "scratch": False}


class KeyPart(NamedTuple):
    """One part of an array's index: it counts from 0 to ``size`` - 1."""

    name: str
    size: int


class IndexKey:
    """The codec of an array's key: ``{"bank": 1, "port": 8001}`` instead of 73537.

    Written, a key may also be the index itself's last parts joined by "/" ("8001", "dns/unknown/other"): what
    is left out in front is the bank that is in force.
    """

    size = 4
    leaves = 1

    def __init__(self, parts: tuple[KeyPart, ...], names: Names, bank: int) -> None:
        self.parts = parts
        self.names = names
        self.bank = bank

    def decode(self, raw: memoryview) -> Value:
        """The parts of an index, or the index where it has none."""
        index = int.from_bytes(raw[:4], sys.byteorder)
        if not self.parts:
            return index
        found: Fields = {}
        for part in reversed(self.parts):
            index, found[part.name] = divmod(index, part.size)
        return {part.name: found[part.name] for part in self.parts}

    def encode(self, value: Value, raw: memoryview, path: str) -> None:
        """As in `xdp.codec.Codec`."""
        parts = self.parts or (KeyPart("index", 1 << 32),)
        given = value if isinstance(value, dict) else self._split(value, parts, path)
        if unknown := set(given) - {part.name for part in parts}:
            raise RangeError(f"{path}: no part {min(unknown)!r}; allowed: {self.wanted()}")
        index = 0
        service: int | None = None
        for part in parts:
            word = given.get(part.name, self.bank if part.name == BANK else None)
            number = self._number(part, word, service, path)
            service = number if part.name == "service" else service
            index = index * part.size + number
        raw[:4] = index.to_bytes(4, sys.byteorder)

    def wanted(self) -> str:
        """What a key looks like, for messages."""
        return (
            "/".join(part.name.upper() for part in self.parts if part.name != BANK or len(self.parts) == 1)
            or "0"
        )

    def _split(self, value: Value, parts: tuple[KeyPart, ...], path: str) -> Fields:
        words = value.split("/") if isinstance(value, str) else [value]
        names = [part.name for part in parts]
        if len(words) == len(names) - 1 and names[0] == BANK:
            names = names[1:]
        if len(words) != len(names):
            raise RangeError(f"{path}: {value!r} does not fit; allowed: {self.wanted()}")
        return dict(zip(names, words, strict=True))

    def _number(self, part: KeyPart, word: Value, service: int | None, path: str) -> int:
        term = TERMS.get(part.name)
        if isinstance(word, str) and term is not None and word in self.names.of(term, service):
            return self.names.of(term, service).index(word)
        if isinstance(word, str) and word.isascii() and word.isdecimal():
            word = int(word)
        if isinstance(word, bool) or not isinstance(word, int) or not 0 <= word < part.size:
            shown = "nothing" if word is None else repr(word)
            raise RangeError(
                f"{path}: {shown} for {part.name}; allowed: 0 to {part.size - 1}, as in {self.wanted()}"
            )
        return word


def key_parts(name: str, key_size: int, max_entries: int) -> tuple[KeyPart, ...] | None:
    """The parts of a map's index; None when keys of that map are no index that we know."""
    if name in _BY_CPU:
        parts = [(CPU, max_entries)]
    elif name in _INDEXED:
        parts = list(_INDEXED[name])
    else:
        return None
    product = 1
    for _, size in parts:
        product *= size
    # Another version's program: show plain numbers rather than wrong names.
    if product != max_entries or key_size != IndexKey.size:
        return None
    return tuple(KeyPart(*part) for part in parts)


def is_summed(name: str) -> bool:
    """Whether the rows of that map are one value, spread over the CPUs."""
    return _BY_CPU.get(name, False)


#: Why an entry must not be changed by hand, by map; maps that are not here may be.
_DANGER = {
    "generation": "it switches every packet to the other bank's policy",
    "policies": "lanes would change under packets on their way; change the policy file instead",
    "ports": "its port's packets would be steered, or no longer be; change the policy file instead",
    "patterns": "packets would change their kind; change the policy file instead",
    "rules": "packets would change their lane; change the policy file instead",
    "prefixes_0": "addresses would change their class; change the policy file instead",
    "prefixes_1": "addresses would change their class; change the policy file instead",
    "known": "a configured peer would lose its place, which nobody else can take from it",
    "known_filter": "configured peers would be taken for strangers; change the policy file instead",
    "peer_holds": "peers would be held at another rate; `sluice peers hold ADDRESS` does it rightly",
    "hold_marks": "peers would be held, or no longer be; `sluice peers release ADDRESS` does it rightly",
    "counters": "the counters would no longer add up",
    "strangers_away": "packets of strangers would be counted wrongly",
    "stranger_sets": "strangers would be forgotten; `sluice map delete strangers ADDRESS` forgets one",
    "stranger_room": "strangers would share entries, or find none",
    "stranger_turns": "two CPUs could change the same strangers at once",
    "xsks": "packets of a lane would go to another socket, or to none",
}
_HARMLESS = {"strangers", "lane_limits", "prefix_limits"}


def danger(name: str) -> str:
    """Why changing that map needs --force; "" when all it does is forget a stranger, or a limit's past."""
    if name in _HARMLESS:
        return ""
    return _DANGER.get(name, "it is the program's own, and nothing says what depends on it")


def add_values(values: list[Value]) -> Value:
    """The sum of equal structures, number by number. Raises `SluiceError` where something is no number."""
    first = values[0]
    if all(isinstance(one, dict) for one in values):
        names = {name: None for one in values for name in one}
        return {name: add_values([one[name] for one in values if name in one]) for name in names}
    if all(isinstance(one, list) and len(one) == len(first) for one in values):
        return [add_values(list(column)) for column in zip(*values, strict=True)]
    if all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values):
        return sum(values)
    raise SluiceError("these values can't be added up", hint="--per-cpu shows each CPU's own")


def numbers(value: Any, path: str = "") -> dict[str, int | float]:
    """All numbers in a value by their path, times excepted (they are not counted)."""
    if isinstance(value, dict):
        parts = {f"{path}.{name}" if path else name: one for name, one in value.items()}
    elif isinstance(value, list):
        parts = {f"{path}[{i}]": one for i, one in enumerate(value)}
    else:
        counted = isinstance(value, (int, float)) and not isinstance(value, bool) and not path.endswith("_ns")
        return {path: value} if counted else {}
    return {where: number for name, one in parts.items() for where, number in numbers(one, name).items()}

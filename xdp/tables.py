# SPDX-License-Identifier: Apache-2.0
"""A policy as the kernel program's tables: cffi arrays of the structs in bpf/include/abi.h.

    tables = compile_policy(policy)
    maps["rules"].update_many(keys, tables.rules, len(tables.rules))

Tables know nothing of banks: the loader adds the bank's offset to keys.  Every
table is complete, entries that are not used are zero (and zero means: not ours,
pass, no limit), so writing a whole table also removes what an older policy left
in the bank.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any, Final

from xdp import policy_model as model
from xdp._libbpf import ffi, lib
from xdp.abi import pack_address
from xdp.errors import UsageError
from xdp.policy import Policy

CData = Any

_SECOND = 1_000_000_000  # ns

#: Of a hold, packets/s.  Intervals are whole nanoseconds: here it is 100, and rounding takes 1 % at most.
MAX_HOLD_RATE: Final = 10_000_000
#: Packets at once: what the fastest interface delivers in some milliseconds.
MAX_HOLD_BURST: Final = 1_000_000

_ACTION_NUMBERS = {
    "lane": lib.SLUICE_ACTION_LANE,
    "pass": lib.SLUICE_ACTION_PASS,
    "drop": lib.SLUICE_ACTION_DROP,
    "reply": lib.SLUICE_ACTION_REPLY,
}

# IPv4 in the tries is ::ffff:0:0/96 and longer.
_V4_BITS = 96
_V4_BASE = b"\x00" * 10 + b"\xff\xff"
_MAPPED = IPv6Network("::ffff:0:0/96")

# struct sluice_prefix: length in host order, address in network order.
_PREFIX_KEY = struct.Struct("=I16s")


@dataclass(frozen=True, slots=True)
class PrefixTable:
    """Entries of an LPM trie: ``struct sluice_prefix[count]``, ``struct sluice_prefix_class[count]``."""

    keys: CData
    values: CData
    count: int


@dataclass(frozen=True, slots=True)
class KnownTable:
    """Configured peers: ``struct sluice_address[count]``, ``uint32_t[count]`` of ids from 1."""

    keys: CData
    ids: CData
    count: int


@dataclass(frozen=True, slots=True)
class Tables:
    """One bank of a policy.

    policy    ``struct sluice_policy *``
    ports     port -> the bytes of its ``struct sluice_port``; a port not in it is not ours
    patterns  ``struct sluice_patterns[SLUICE_MAX_SERVICES]``
    rules     ``struct sluice_rule[]``, index (service * MAX_CLASSES + class) * MAX_KINDS + kind
    prefixes  for the trie of the bank; configured peers are in it as /32 and /128
    known     configured peers
    """

    policy: CData
    ports: dict[int, bytes]
    patterns: CData
    rules: CData
    prefixes: PrefixTable
    known: KnownTable


def compile_policy(policy: Policy) -> Tables:
    """The tables of ``policy``; 50,000 peers take about 0.1 s.

    The arrays own their memory; what the kernel has copied may be dropped.
    """
    lane_numbers = {lane.name: number for number, lane in enumerate(policy.lanes)}
    return Tables(
        policy=_policy(policy, lane_numbers),
        ports=_ports(policy),
        patterns=_patterns(policy),
        rules=_rules(policy, lane_numbers),
        prefixes=_prefixes(policy),
        known=_known(policy),
    )


def limit_ns(rate: int | None, burst: int | None) -> tuple[int, int]:
    """``interval_ns`` and ``burst_ns`` of a limit in packets per second and packets; (0, 0) is none.

    The interval is rounded up to whole nanoseconds, so a limit is never exceeded;
    at 1,000,000 packets/s what is lost by that is below 0.1 %.
    """
    if rate is None or burst is None:
        return 0, 0
    interval = -(-_SECOND // rate)
    return interval, (burst - 1) * interval


def check_times(until_ns: int, now_ns: int) -> None:
    """Raises UsageError for what is no time of a monotonic clock in nanoseconds."""
    for what, value in (("end", until_ns), ("time", now_ns)):
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise UsageError(f"{what} of a hold: {value!r}; allowed: nanoseconds from 0 to 2^63 - 1")


def hold_limit(packets_per_second: int, burst: int) -> tuple[int, int]:
    """``interval_ns`` and ``burst`` of ``struct sluice_hold``; the interval is rounded up, as all are.

    Raises UsageError for what is out of range.
    """
    for what, value, most in (
        ("rate", packets_per_second, MAX_HOLD_RATE),
        ("burst", burst, MAX_HOLD_BURST),
    ):
        if type(value) is not int or not 1 <= value <= most:
            raise UsageError(f"{what} of a hold: {value!r}; allowed: a whole number from 1 to {most:,}")
    return -(-_SECOND // packets_per_second), burst - 1


def _set_limit(limit: CData, rate: int | None, burst: int | None) -> None:
    limit.interval_ns, limit.burst_ns = limit_ns(rate, burst)


def _policy(policy: Policy, lane_numbers: dict[str, int]) -> CData:
    compiled = ffi.new("struct sluice_policy *")
    if policy.fragments == "drop":
        compiled.flags = lib.SLUICE_POLICY_DROP_FRAGMENTS
    compiled.stranger_bits_v4 = policy.stranger_prefix.v4
    compiled.stranger_bits_v6 = policy.stranger_prefix.v6
    for lane, entry in zip(policy.lanes, compiled.lane, strict=False):
        _set_limit(entry.limit, lane.rate, lane.burst)
        entry.end = lib.SLUICE_END_KERNEL if lane.end == "kernel" else lib.SLUICE_END_SOCKET
        entry.timestamps = lane.timestamps
        if lane.demote is not None:
            entry.over = lib.SLUICE_OVER_DEMOTE
            entry.demote_lane = lane_numbers[lane.demote]
    return compiled


def _ports(policy: Policy) -> dict[int, bytes]:
    ports: dict[int, bytes] = {}
    for number, service in enumerate(policy.services, start=1):
        entry = ffi.new("struct sluice_port *")
        entry.service = number
        entry.patterns = len(_service_patterns(service))
        ports.update(dict.fromkeys(service.ports, bytes(ffi.buffer(entry))))
    return ports


def _service_patterns(service: model.Service) -> list[tuple[int, model.Match]]:
    """Patterns in the order in which they are tried, with the kinds that they stand for.

    A probe is recognised before anything else, for the kinds of a protocol may be
    told apart by bytes in which a probe can look like any of them.
    """
    patterns = [(kind, match) for kind, entry in enumerate(service.kinds, start=1) for match in entry.match]
    if service.heartbeat:
        magic = lib.SLUICE_HEARTBEAT_MAGIC.to_bytes(4, "big")
        probe = model.Match(offset=0, mask=b"\xff" * len(magic), value=magic)
        patterns.insert(0, (len(service.kinds) + 1, probe))
    return patterns


def _patterns(policy: Policy) -> CData:
    table = ffi.new("struct sluice_patterns[]", lib.SLUICE_MAX_SERVICES)
    for number, service in enumerate(policy.services, start=1):
        for index, (kind, match) in enumerate(_service_patterns(service)):
            entry = table[number].pattern[index]
            entry.mask = int.from_bytes(match.mask, "big")
            entry.value = int.from_bytes(match.value, "big")
            entry.offset = match.offset
            entry.width = len(match.mask)
            entry.kind = kind
    return table


def _rules(policy: Policy, lane_numbers: dict[str, int]) -> CData:
    classes, kinds = lib.SLUICE_MAX_CLASSES, lib.SLUICE_MAX_KINDS
    table = ffi.new("struct sluice_rule[]", lib.SLUICE_MAX_SERVICES * classes * kinds)
    for service_number, service in enumerate(policy.services, start=1):
        for class_number, peer_class in enumerate(policy.classes):
            row = (service_number * classes + class_number) * kinds
            # Kinds that the service does not have are never looked up.
            for kind, name in enumerate(service.kind_names):
                if peer_class.deny:
                    table[row + kind].action = lib.SLUICE_ACTION_DENY
                    continue
                for rule in service.rules:
                    if _applies(rule, peer_class.name, name):
                        _set_rule(table[row + kind], rule, peer_class, lane_numbers)
                        break
    return table


def _applies(rule: model.Rule, peer_class: str, kind: str) -> bool:
    return (not rule.classes or peer_class in rule.classes) and (not rule.kinds or kind in rule.kinds)


def _set_rule(entry: CData, rule: model.Rule, peer_class: model.Class, lane_numbers: dict[str, int]) -> None:
    entry.action = _ACTION_NUMBERS[rule.action]
    if rule.lane is None:
        return
    entry.lane = lane_numbers[rule.lane]
    over, demote = (rule.over, rule.demote) if rule.over is not None else (peer_class.over, peer_class.demote)
    # A class may be demoted to a lane that some of its rules use (or one above it): there, drop.
    if over == "demote" and demote is not None and lane_numbers[demote] > entry.lane:
        entry.over = lib.SLUICE_OVER_DEMOTE
        entry.demote_lane = lane_numbers[demote]
    peer = rule if rule.peer_rate is not None else peer_class
    _set_limit(entry.peer, peer.peer_rate, peer.peer_burst)
    prefix = rule if rule.prefix_rate is not None else peer_class
    _set_limit(entry.prefix, prefix.prefix_rate, prefix.prefix_burst)


def _prefixes(policy: Policy) -> PrefixTable:
    keys: list[bytes] = []
    values = array("I")
    pack = _PREFIX_KEY.pack
    over_mapped = False
    all_of_v4 = False
    for number, peer_class in enumerate(policy.classes):
        for prefix in peer_class.prefixes:
            if isinstance(prefix, IPv4Network):
                keys.append(pack(_V4_BITS + prefix.prefixlen, _V4_BASE + prefix.network_address.packed))
                all_of_v4 |= prefix.prefixlen == 0
            else:
                keys.append(pack(prefix.prefixlen, prefix.network_address.packed))
                over_mapped |= _MAPPED.subnet_of(prefix)
        for peer in peer_class.peers:
            address = peer.address
            if isinstance(address, IPv4Address):
                keys.append(pack(128, _V4_BASE + address.packed))
            else:
                keys.append(pack(128, address.packed))
        values.extend([number] * (len(keys) - len(values)))
    if over_mapped and not all_of_v4:
        # ::/0 means all of IPv6.  In the trie it would also hold IPv4, which is mapped below it.
        keys.append(pack(_V4_BITS, _MAPPED.network_address.packed))
        values.append(0)
    return PrefixTable(
        keys=ffi.from_buffer("struct sluice_prefix[]", bytearray().join(keys)),
        values=ffi.from_buffer("struct sluice_prefix_class[]", values),
        count=len(keys),
    )


def _known(policy: Policy) -> KnownTable:
    peers = policy.peers
    return KnownTable(
        keys=ffi.from_buffer(
            "struct sluice_address[]", bytearray().join(pack_address(peer.address) for peer in peers)
        ),
        ids=ffi.from_buffer("uint32_t[]", array("I", (peer.id for peer in peers))),
        count=len(peers),
    )

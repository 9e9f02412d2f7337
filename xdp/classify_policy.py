# SPDX-License-Identifier: Apache-2.0
"""The policy half of the reference classifier: address -> class, payload -> kind, all three -> rule.

Made from the policy itself, not from the tables that the kernel gets, so that a
mistake in either shows as a difference.
"""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import NamedTuple

from xdp import policy_model as model
from xdp._libbpf import lib
from xdp.abi import pack_address
from xdp.classify_frame import MAPPED
from xdp.classify_limit import Limit
from xdp.policy import Policy
from xdp.tables import limit_ns

_HEARTBEAT_MAGIC = b"SLHB"  # SLUICE_HEARTBEAT_MAGIC as it stands in the packet

#: Addresses whose peer and class are remembered; about 10 MB.
_MAX_IDENTITIES = 65536


class LaneView(NamedTuple):
    """What happens in a lane; ``demote`` None: over the limit means drop."""

    limit: Limit | None
    demote: int | None
    in_kernel: bool


class Decision(NamedTuple):
    """A rule with everything filled in; without a lane (-1) ``reason`` is the verdict."""

    reason: int
    lane: int = -1
    reply: bool = False
    demote: int | None = None
    peer: Limit | None = None
    prefix: Limit | None = None


_DENY = Decision(lib.SLUICE_DROP_DENIED)
_DROP = Decision(lib.SLUICE_DROP_POLICY)
_PASS = Decision(lib.SLUICE_PASS_POLICY)


class PolicyView:
    """A policy arranged for looking things up."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.drop_fragments = policy.fragments == "drop"
        self.lanes = [
            LaneView(
                limit=_limit(lane.rate, lane.burst),
                demote=None if lane.demote is None else policy.lane_names.index(lane.demote),
                in_kernel=lane.end == "kernel",
            )
            for lane in policy.lanes
        ]
        self.service_of_port = {
            port: number for number, service in enumerate(policy.services, start=1) for port in service.ports
        }
        self._known = {pack_address(peer.address): peer.id for peer in policy.peers}
        # By family and prefix length, longest first: the first hit is the longest match.
        tables: dict[int, dict[int, dict[int, int]]] = {4: {}, 6: {}}
        for number, peer_class in enumerate(policy.classes):
            for prefix in peer_class.prefixes:
                shift = prefix.max_prefixlen - prefix.prefixlen
                bits = int(prefix.network_address) >> shift
                version = 4 if isinstance(prefix, IPv4Network) else 6
                tables[version].setdefault(shift, {})[bits] = number
            for peer in peer_class.peers:
                tables[peer.address.version].setdefault(0, {})[int(peer.address)] = number
        self._prefixes = {version: sorted(table.items()) for version, table in tables.items()}
        self._patterns = [_patterns(service) for service in policy.services]
        self._decisions: dict[tuple[int, int, int], Decision] = {}
        self._identities: dict[bytes, tuple[int, int]] = {}

    def identify(self, source: bytes) -> tuple[int, int]:
        """Peer and class of ``source`` (16 bytes, IPv4 mapped).

        The peer is 0 for a stranger, the class that of the longest prefix or 0.
        """
        identity = self._identities.get(source)
        if identity is None:
            identity = (self._known.get(source, 0), self._class_of(source))
            if len(self._identities) >= _MAX_IDENTITIES:
                self._identities.clear()
            self._identities[source] = identity
        return identity

    def _class_of(self, source: bytes) -> int:
        if source[:12] == MAPPED:
            address, tables = int.from_bytes(source[12:], "big"), self._prefixes[4]
        else:
            address, tables = int.from_bytes(source, "big"), self._prefixes[6]
        for shift, table in tables:
            number = table.get(address >> shift)
            if number is not None:
                return number
        return 0

    def stranger_prefix(self, source: bytes) -> tuple[int, int]:
        """IP version and leading bits of ``source``: strangers with the same share one limit."""
        widths = self.policy.stranger_prefix
        if source[:12] == MAPPED:
            return 4, int.from_bytes(source[12:], "big") >> (32 - widths.v4)
        return 6, int.from_bytes(source, "big") >> (128 - widths.v6)

    def kind_of(self, service_number: int, payload: bytes | memoryview) -> int:
        """The first kind one of whose patterns matches, 0 for none; heartbeats come before all."""
        length = len(payload)
        for start, end, mask, value, kind in self._patterns[service_number - 1]:
            if end <= length and int.from_bytes(payload[start:end], "big") & mask == value:
                return kind
        return 0

    def decide(self, service_number: int, class_number: int, kind: int) -> Decision:
        """What the first rule that applies says."""
        key = (service_number, class_number, kind)
        decision = self._decisions.get(key)
        if decision is None:
            decision = self._decisions[key] = self._look_up(*key)
        return decision

    def _look_up(self, service_number: int, class_number: int, kind: int) -> Decision:
        service = self.policy.services[service_number - 1]
        peer_class = self.policy.classes[class_number]
        if peer_class.deny:
            return _DENY
        name = service.kind_names[kind]
        for rule in service.rules:
            if rule.classes and peer_class.name not in rule.classes:
                continue
            if rule.kinds and name not in rule.kinds:
                continue
            return self._complete(rule, peer_class)
        return _PASS

    def _complete(self, rule: model.Rule, peer_class: model.Class) -> Decision:
        if rule.lane is None:
            return _PASS if rule.action == "pass" else _DROP
        names = self.policy.lane_names
        lane = names.index(rule.lane)
        demote: int | None = None
        target = rule.demote if rule.over is not None else peer_class.demote
        if target is not None and names.index(target) > lane:
            demote = names.index(target)
        return Decision(
            reason=lib.SLUICE_STEER,
            lane=lane,
            reply=rule.action == "reply",
            demote=demote,
            peer=_limit(rule.peer_rate, rule.peer_burst)
            or _limit(peer_class.peer_rate, peer_class.peer_burst),
            prefix=_limit(rule.prefix_rate, rule.prefix_burst)
            or _limit(peer_class.prefix_rate, peer_class.prefix_burst),
        )


def _limit(rate: int | None, burst: int | None) -> Limit | None:
    return None if rate is None else Limit(*limit_ns(rate, burst))


def _patterns(service: model.Service) -> list[tuple[int, int, int, int, int]]:
    """Start, end, mask, value and kind of each pattern, in the order in which they are tried."""
    patterns = []
    if service.heartbeat:
        magic = int.from_bytes(_HEARTBEAT_MAGIC, "big")
        patterns.append((0, len(_HEARTBEAT_MAGIC), 0xFFFFFFFF, magic, len(service.kinds) + 1))
    for kind, entry in enumerate(service.kinds, start=1):
        for match in entry.match:
            mask, value = int.from_bytes(match.mask, "big"), int.from_bytes(match.value, "big")
            patterns.append((match.offset, match.offset + len(match.mask), mask, value, kind))
    return patterns

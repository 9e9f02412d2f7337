# SPDX-License-Identifier: Apache-2.0
"""What has to fit together across the tables of a policy.

Indexes in messages are those of the file, so these functions see the lists in
file order.  Each raises the first :class:`~xdp.errors.PolicyError` it meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address

from xdp import policy_model as model
from xdp.errors import PolicyError
from xdp.policy_place import Place, show

#: Slack for sums of decimal fractions such as 0.1 + 0.2.
_ROUNDING = 1e-9


def check_lanes(top: Place, lanes: Sequence[model.Lane]) -> None:
    """Names differ, demotion goes down, shares fit into one batch."""
    _different_names(top.key("lane"), "lane", [lane.name for lane in lanes])
    names = [lane.name for lane in lanes]
    for index, lane in enumerate(lanes):
        if lane.demote is not None:
            _lower_lane(top.key("lane").item(index).key("demote"), names, index, lane.demote)
    total = sum(lane.share for lane in lanes)
    if total > 1 + _ROUNDING:
        raise top.key("lane").error(f"the lanes' shares add up to {total:g}", allowed="at most 1")


def _lower_lane(place: Place, names: Sequence[str], lane: int, demote: str) -> None:
    """``demote`` has to be a lane after number ``lane``: so demotion never goes round in a circle."""
    if demote not in names:
        raise place.unknown("lane", demote, names)
    if names.index(demote) <= lane:
        what = "itself" if names.index(demote) == lane else f"a higher lane than {show(names[lane])}"
        lower = ", ".join(names[lane + 1 :]) or f"none, {show(names[lane])} is the lowest lane"
        raise place.error(f"{show(demote)} is {what}", allowed=f"a lower lane: {lower}")


def _different_names(place: Place, what: str, names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        first = names.index(name)
        if first != index:
            raise (
                place.item(index)
                .key("name")
                .error(f"{show(name)} is the name of {what}[{first}] already", allowed="a name of its own")
            )


def check_classes(
    top: Place, classes: Sequence[model.Class], lanes: Sequence[model.Lane], default_class: str
) -> None:
    """Names differ, lanes exist, no address is in two classes."""
    _different_names(top.key("class"), "class", [entry.name for entry in classes])
    lane_names = [lane.name for lane in lanes]
    others = sum(entry.name != default_class for entry in classes)
    if others > model.MAX_CLASSES:
        raise top.key("class").error(
            f"{others} classes besides the default class", allowed=f"at most {model.MAX_CLASSES}"
        )
    for index, entry in enumerate(classes):
        if entry.demote is not None and entry.demote not in lane_names:
            raise top.key("class").item(index).key("demote").unknown("lane", entry.demote, lane_names)
    _different_addresses(top.key("class"), classes)


def _different_addresses(place: Place, classes: Sequence[model.Class]) -> None:
    """No prefix or peer twice, and no more of them than the kernel's tables hold."""
    # (version, integer, length): comparing ipaddress objects is several times slower.
    holder: dict[tuple[int, int, int], int] = {}
    for index, entry in enumerate(classes):
        for number, prefix in enumerate(entry.prefixes):
            key = (prefix.version, int(prefix.network_address), prefix.prefixlen)
            if key in holder:
                raise _twice(
                    place.item(index).key("prefixes").item(number), classes, index, prefix, holder[key]
                )
            holder[key] = index
    prefixes = len(holder)
    for index, entry in enumerate(classes):
        for number, peer in enumerate(entry.peers):
            address = peer.address
            key = (4, int(address), 32) if isinstance(address, IPv4Address) else (6, int(address), 128)
            if key in holder:
                at = place.item(index)
                # With a file there is no telling which of the two the peer stands in.
                at = at.key("peers").item(number) if entry.peers_file is None else at
                raise _twice(at, classes, index, address, holder[key])
            holder[key] = index
    peers = len(holder) - prefixes
    if peers > model.MAX_PEERS:
        raise place.error(f"{peers} peers in all classes together", allowed=f"at most {model.MAX_PEERS}")
    if len(holder) > model.MAX_PREFIXES:
        raise place.error(
            f"{len(holder)} prefixes and peers in all classes together",
            allowed=f"at most {model.MAX_PREFIXES}",
        )


def _twice(
    place: Place, classes: Sequence[model.Class], index: int, what: model.Prefix | model.Address, first: int
) -> PolicyError:
    holder = "this class" if first == index else f"class {show(classes[first].name)}"
    return place.error(f"{what} is in {holder} already", allowed="each prefix and peer once")


def check_services(
    top: Place,
    services: Sequence[model.Service],
    lanes: Sequence[model.Lane],
    classes: Sequence[model.Class],
    default_class: str,
) -> None:
    """Names and ports differ, rules name what exists and go where they may."""
    place = top.key("service")
    _different_names(place, "service", [service.name for service in services])
    taken: dict[int, str] = {}
    denied = {entry.name for entry in classes if entry.deny}
    class_names = list(dict.fromkeys((default_class, *(entry.name for entry in classes))))
    lane_names = [lane.name for lane in lanes]
    for index, service in enumerate(services):
        at = place.item(index)
        for port in service.ports:
            if port in taken:
                raise at.key("ports").error(
                    f"port {port} belongs to service {show(taken[port])} already", allowed="each port once"
                )
            taken[port] = service.name
        _check_kinds(at, service)
        for number, rule in enumerate(service.rules):
            _check_rule(at.key("rule").item(number), service, rule, lane_names, class_names, denied)


def _check_kinds(place: Place, service: model.Service) -> None:
    _different_names(place.key("kind"), "kind", [kind.name for kind in service.kinds])
    heartbeat = int(service.heartbeat)
    beside = ' (the kind "heartbeat" takes one of them)' if heartbeat else ""
    if len(service.kinds) + heartbeat > model.MAX_KINDS:
        raise place.key("kind").error(
            f"{len(service.kinds) + heartbeat} kinds{beside}", allowed=f"at most {model.MAX_KINDS}"
        )
    patterns = heartbeat + sum(len(kind.match) for kind in service.kinds)
    if patterns > model.MAX_PATTERNS:
        raise place.key("kind").error(
            f"{patterns} patterns in all kinds of this service{beside}",
            allowed=f"at most {model.MAX_PATTERNS}",
        )
    seen: dict[model.Match, str] = {}
    for index, kind in enumerate(service.kinds):
        for number, match in enumerate(kind.match):
            if match in seen:
                raise (
                    place.key("kind")
                    .item(index)
                    .key("match")
                    .item(number)
                    .error(f"the same pattern is in kind {show(seen[match])} already, which comes first")
                )
            seen[match] = kind.name


def _check_rule(
    place: Place,
    service: model.Service,
    rule: model.Rule,
    lanes: Sequence[str],
    classes: Sequence[str],
    denied: set[str],
) -> None:
    for name in rule.classes:
        if name not in classes:
            raise place.key("class").unknown("class", name, classes)
        if name in denied:
            raise place.key("class").error(
                f"class {show(name)} is denied, no rule ever sees its packets",
                allowed=", ".join(other for other in classes if other not in denied),
            )
    kinds = [kind.name for kind in service.kinds] + [model.HEARTBEAT, model.OTHER]
    for name in rule.kinds:
        if name not in kinds:
            raise place.key("kind").unknown("kind", name, kinds)
    if rule.lane is None:
        return
    if rule.lane not in lanes:
        raise place.key("lane").unknown("lane", rule.lane, lanes)
    if rule.demote is not None:
        _lower_lane(place.key("demote"), lanes, lanes.index(rule.lane), rule.demote)

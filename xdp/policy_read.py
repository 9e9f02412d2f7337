# SPDX-License-Identifier: Apache-2.0
"""From TOML's dicts and lists to the values of :mod:`xdp.policy_model`.

Each function reads one table and looks at nothing outside of it: types, ranges
and which keys need each other.  What has to fit together across tables is
checked in :mod:`xdp.policy_check`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from xdp import policy_model as model
from xdp.policy_peers import read_peers, read_peers_file, read_prefixes
from xdp.policy_place import Place, Table, show, whole

#: Without ``burst``: what the rate brings in 1/10 s, the time that a delayed sender may catch up.
_BURST_PER_RATE = 10
#: And never less than this: small rates come in small clumps, a burst of 1 would cut them.
_SMALLEST_DEFAULT_BURST = 16

#: Together the lanes must leave most of a batch to the order of priority.
DEFAULT_SHARE = 0.02

_SMALLEST_RING = 64
_LARGEST_RING = 32768
_LARGEST_QUOTA = 1 << 20  # frames; 4 GiB at the largest frame size
_LARGEST_BUDGET = 65536
_LARGEST_OFFSET = 9000  # bytes: no payload is longer, for no common interface's MTU is
_WIDTHS = (1, 2, 4, 8)
_MAX_RULES = 128  # 16 classes of 8 kinds: no further rule could ever be the first to match
_LARGEST_ID = (1 << 32) - 2  # (uid_t) -1 means none

_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)
_PORTS_ALLOWED = 'ports from 1 to 65535, as numbers or as ranges such as "8002-8010"'
_HEX = re.compile(r"(?:[0-9A-Fa-f]{2}){1,8}", re.ASCII)
_ACCOUNT = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,30}\$?", re.ASCII)

_OVERS = ("drop", "demote")


def read_lane(place: Place, value: object, rings: model.Rings) -> model.Lane:
    """One ``[[lane]]``; ``rings`` gives the defaults of its ring and quota."""
    table = Table(place, value, model.Lane)
    name = table.name("name")
    end = cast("model.End", table.choice("end", ("socket", "kernel"), "socket"))
    if end == "kernel":
        for key in ("timestamps", "share", "ring", "quota"):
            if key in table:
                raise table.at(key).error('a lane with end = "kernel" has no ring of its own; leave this out')
    rate, burst = _limit(table, "rate", "burst")
    over, demote = _over(table)
    if over is not None and rate is None:
        raise table.at("over").error(
            "a lane without rate has no limit to be over; add rate or leave this out"
        )
    socket = end == "socket"
    return model.Lane(
        name=name,
        rate=rate,
        burst=burst,
        over=over or "drop",
        demote=demote,
        end=end,
        timestamps=table.flag("timestamps", False) if socket else False,
        share=table.fraction("share", DEFAULT_SHARE) if socket else 0.0,
        ring=table.power_of_two("ring", _SMALLEST_RING, _LARGEST_RING, rings.rx) if socket else 0,
        quota=table.integer("quota", 1, _LARGEST_QUOTA, rings.quota) if socket else 0,
    )


def _limit(table: Table, rate_key: str, burst_key: str) -> tuple[int | None, int | None]:
    """Rate and burst, both or neither."""
    rate = table.integer(rate_key, 1, model.MAX_RATE)
    burst = table.integer(burst_key, 1, model.MAX_BURST)
    if rate is None:
        if burst is not None:
            raise table.at(burst_key).error(f"needs {rate_key} beside it")
        return None, None
    return rate, burst or max(_SMALLEST_DEFAULT_BURST, rate // _BURST_PER_RATE)


def _over(table: Table) -> tuple[model.Over | None, str | None]:
    """``over`` and ``demote``; naming a lane to demote to is saying over = "demote"."""
    over = cast("model.Over | None", table.choice("over", _OVERS))
    demote = table.reference("demote")
    if demote is not None:
        if over == "drop":
            raise table.at("demote").error('found a lane beside over = "drop"', allowed='over = "demote"')
        return "demote", demote
    if over == "demote":
        raise table.at("over").error('"demote" needs a lane', allowed='demote = "a lower lane" beside it')
    return over, None


def read_class(place: Place, value: object, directory: Path | None, first_id: int) -> model.Class:
    """A class whose peers are numbered from ``first_id``."""
    table = Table(place, value, model.Class)
    name = table.name("name")
    deny = table.flag("deny", False)
    limits = ("peer_rate", "peer_burst", "prefix_rate", "prefix_burst", "over", "demote")
    if deny:
        for key in limits:
            if key in table:
                raise table.at(key).error("a denied class has no limits; leave this out, or deny")
    peer_rate, peer_burst = _limit(table, "peer_rate", "peer_burst")
    prefix_rate, prefix_burst = _limit(table, "prefix_rate", "prefix_burst")
    over, demote = _over(table)
    found = read_peers(table, PeerTable) + read_peers_file(table, directory)
    return model.Class(
        name=name,
        prefixes=read_prefixes(table),
        peers=tuple(
            model.PeerEntry(id=number, address=address, name=peer)
            for number, (address, peer) in enumerate(found, start=first_id)
        ),
        peers_file=table.values.get("peers_file"),
        deny=deny,
        peer_rate=peer_rate,
        peer_burst=peer_burst,
        prefix_rate=prefix_rate,
        prefix_burst=prefix_burst,
        over=over or "drop",
        demote=demote,
    )


class PeerTable(model.Struct, frozen=True, kw_only=True):
    """The keys of a peer written as a table; ids are not the file's to give."""

    address: str
    name: str = ""


def read_service(place: Place, value: object) -> model.Service:
    """One ``[[service]]`` with its kinds and rules."""
    table = Table(place, value, model.Service)
    return model.Service(
        name=table.name("name"),
        ports=_ports(table),
        kinds=tuple(_kind(at, item) for at, item in table.items("kind", model.MAX_KINDS)),
        rules=tuple(_rule(at, item) for at, item in table.items("rule", _MAX_RULES)),
    )


def _ports(table: Table) -> tuple[int, ...]:
    """Different ports, ascending."""
    table.require("ports", _PORTS_ALLOWED)
    seen: set[int] = set()
    for place, item in table.items("ports", 65535):
        if isinstance(item, str):
            match = _PORTS.fullmatch(item)
            if match is None:
                raise place.wrong(item, _PORTS_ALLOWED)
            low, high = int(match[1]), int(match[2] or match[1])
            if not 1 <= low <= high <= 65535:
                raise place.wrong(item, _PORTS_ALLOWED)
        else:
            if isinstance(item, bool) or not isinstance(item, int) or not 1 <= item <= 65535:
                raise place.wrong(item, _PORTS_ALLOWED)
            low = high = item
        new = range(low, high + 1)
        twice = seen.intersection(new)
        if twice:
            raise place.error(f"port {min(twice)} is in this service already")
        seen.update(new)
    if not seen:
        raise table.at("ports").wrong([], _PORTS_ALLOWED)
    return tuple(sorted(seen))


def _kind(place: Place, value: object) -> model.Kind:
    table = Table(place, value, model.Kind)
    name = table.name("name")
    if name in (model.HEARTBEAT, model.OTHER):
        raise table.at("name").error(f'"{name}" is defined already', allowed="any other name")
    table.require("match", "an array of { offset, mask, value }")
    match = tuple(_match(at, item) for at, item in table.items("match", model.MAX_PATTERNS))
    if not match:
        raise table.at("match").wrong([], "at least one { offset, mask, value }")
    return model.Kind(name=name, match=match)


def _match(place: Place, value: object) -> model.Match:
    table = Table(place, value, model.Match)
    table.require("value", "hex digits of 1, 2, 4 or 8 bytes")
    wanted = _hex(table, "value")
    mask = _hex(table, "mask") if "mask" in table else b"\xff" * len(wanted)
    if len(mask) != len(wanted):
        raise table.at("mask").error(
            f"mask has {len(mask)} bytes, value has {len(wanted)}", allowed="the same number of bytes"
        )
    if not any(mask):
        raise table.at("mask").error("a mask of zeros matches everything", allowed="at least one bit set")
    if any(v & ~m & 0xFF for v, m in zip(wanted, mask, strict=True)):
        within = bytes(v & m for v, m in zip(wanted, mask, strict=True))
        raise table.at("value").error(
            f'"{wanted.hex()}" has bits outside of the mask "{mask.hex()}" and would never match',
            allowed=f'bits of the mask, such as "{within.hex()}"',
        )
    table.require("offset", f"a whole number from 0 to {_LARGEST_OFFSET - len(wanted)}")
    offset = whole(table.at("offset"), table.values["offset"], 0, _LARGEST_OFFSET - len(wanted))
    return model.Match(offset=offset, mask=mask, value=wanted)


def _hex(table: Table, key: str) -> bytes:
    text = table.values[key]
    if not isinstance(text, str) or not _HEX.fullmatch(text) or len(text) // 2 not in _WIDTHS:
        raise table.at(key).wrong(text, 'hex digits of 1, 2, 4 or 8 bytes in a string, such as "f0"')
    return bytes.fromhex(text)


_RULE_LIMITS = ("peer_rate", "peer_burst", "prefix_rate", "prefix_burst", "over", "demote")


def _rule(place: Place, value: object) -> model.Rule:
    table = Table(place, value, model.Rule)
    actions = ("lane", "pass", "drop", "reply")
    table.require("action", ", ".join(f'"{action}"' for action in actions))
    action = cast("model.Action", table.choice("action", actions))
    lane = table.reference("lane")
    kinds = table.references("kind")
    if action in ("pass", "drop"):
        for key in ("lane", *_RULE_LIMITS):
            if key in table:
                raise table.at(key).error(
                    f'action = "{action}" has no {key}', allowed='only with action = "lane"'
                )
    elif lane is None:
        raise table.at("lane").error(f'is missing, and action = "{action}" needs it', allowed="a lane's name")
    if action == "reply":
        if kinds != (model.HEARTBEAT,):
            found = ", ".join(show(kind) for kind in kinds) or "any kind"
            raise table.at("kind").error(
                f"found {found}, but only a heartbeat can be answered",
                allowed=f'kind = "{model.HEARTBEAT}"',
            )
        for key in ("over", "demote"):
            if key in table:
                raise table.at(key).error("a heartbeat over its limit is always dropped; leave this out")
    peer_rate, peer_burst = _limit(table, "peer_rate", "peer_burst")
    prefix_rate, prefix_burst = _limit(table, "prefix_rate", "prefix_burst")
    over, demote = _over(table)
    return model.Rule(
        classes=table.references("class"),
        kinds=kinds,
        action=action,
        lane=lane,
        peer_rate=peer_rate,
        peer_burst=peer_burst,
        prefix_rate=prefix_rate,
        prefix_burst=prefix_burst,
        over=over,
        demote=demote,
    )


def read_stranger_prefix(place: Place, value: object) -> model.StrangerPrefix:
    """The table ``stranger_prefix``."""
    table = Table(place, value, model.StrangerPrefix)
    default = model.StrangerPrefix()
    return model.StrangerPrefix(
        v4=table.integer("v4", 1, 32, default.v4), v6=table.integer("v6", 1, 64, default.v6)
    )


def read_rings(place: Place, value: object) -> model.Rings:
    """The table ``[rings]``."""
    table = Table(place, value, model.Rings)
    default = model.Rings()
    size = table.integer("frame_size", 2048, 4096, default.frame_size)
    if size not in (2048, 4096):
        raise table.at("frame_size").wrong(size, "2048 or 4096")
    return model.Rings(
        rx=table.power_of_two("rx", _SMALLEST_RING, _LARGEST_RING, default.rx),
        tx=table.power_of_two("tx", _SMALLEST_RING, _LARGEST_RING, default.tx),
        frame_size=size,
        jumbo=_jumbo(table, default.jumbo),
        quota=table.integer("quota", 1, _LARGEST_QUOTA, default.quota),
        reserve=table.integer("reserve", 1, _LARGEST_QUOTA, default.reserve),
    )


def _jumbo(table: Table, default: model.Jumbo) -> model.Jumbo:
    value = table.values.get("jumbo", default)
    if value == "auto" and isinstance(value, str):
        return "auto"
    if isinstance(value, bool):
        return value
    raise table.at("jumbo").wrong(value, '"auto", true or false')


def read_companion(place: Place, value: object) -> model.Companion:
    """The table ``[companion]``."""
    table = Table(place, value, model.Companion)
    default = model.Companion()
    return model.Companion(
        enabled=table.flag("enabled", default.enabled),
        budget=table.integer("budget", 1, _LARGEST_BUDGET, default.budget),
    )


def read_owner(place: Place, value: object) -> model.Owner:
    """The table ``[owner]``; whether the accounts exist is not asked, a policy may be checked elsewhere."""
    table = Table(place, value, model.Owner)
    return model.Owner(users=_accounts(table, "users", "user"), groups=_accounts(table, "groups", "group"))


def _accounts(table: Table, key: str, what: str) -> tuple[str | int, ...]:
    found: list[str | int] = []
    for place, item in table.items(key, 256):
        if isinstance(item, bool) or not isinstance(item, str | int):
            raise place.wrong(item, f"a {what}'s name or number")
        if isinstance(item, int):
            whole(place, item, 0, _LARGEST_ID)
        elif not _ACCOUNT.fullmatch(item):
            raise place.wrong(item, f"a {what}'s name (letters, digits, '_', '-', '.') or number")
        if item in found:
            raise place.error(f"{show(item)} is named twice")
        found.append(item)
    return tuple(found)


_MODES = ("auto", "native", "generic")
#: Best first.
RUNGS = ("native-zero-copy", "native-copy", "generic-copy", "mmsg", "portable")


def read_interface(place: Place, value: object) -> model.Interface:
    """The table ``[interface]``."""
    table = Table(place, value, model.Interface)
    default = model.Interface()
    mode = cast("model.InterfaceMode", table.choice("mode", _MODES, default.mode))
    minimum = cast("model.Rung", table.choice("minimum_mode", RUNGS, default.minimum_mode))
    if mode == "generic" and minimum.startswith("native"):
        raise table.at("minimum_mode").error(
            f'"{minimum}" cannot be reached with mode = "generic"', allowed=", ".join(RUNGS[2:])
        )
    return model.Interface(mode=mode, minimum_mode=minimum)

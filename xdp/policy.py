# SPDX-License-Identifier: Apache-2.0
"""What should happen to packets: the policy, read from a TOML file.

    policy = Policy.load("validator.toml")
    policy.lanes[0].name, policy.service_names, len(policy.peers)

docs/configuration.md explains the file.  A file is read as if an enemy had
written it: whatever is in it, the outcome is a :class:`Policy` that the kernel
program can follow or one :class:`~xdp.errors.PolicyError` of the form
``FILE: service[2].rule[0].lane: what is wrong; allowed: ...``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec

from xdp import policy_model as model
from xdp.policy_check import check_classes, check_lanes, check_services
from xdp.policy_model import (
    Class,
    Companion,
    Interface,
    Lane,
    Owner,
    PeerEntry,
    Rings,
    Service,
    StrangerPrefix,
    Tuning,
)
from xdp.policy_peers import read_text
from xdp.policy_place import Place, Table
from xdp.policy_read import (
    read_class,
    read_companion,
    read_interface,
    read_lane,
    read_owner,
    read_rings,
    read_service,
    read_stranger_prefix,
)
from xdp.policy_tuning import read_tuning

__all__ = ["Class", "Lane", "PeerEntry", "Policy", "Service"]

VERSION = 1

#: Room for some 40,000 inline prefixes; more peers than that belong into a peers_file.
MAX_FILE = 1 << 20
#: Keys here have two parts at most.  tomllib takes quadratic time for keys with many.
_MAX_KEY_DOTS = 64


class Policy(model.Struct, frozen=True, kw_only=True):
    """A whole policy; immutable, compared by value.

    ``lanes`` are in order of priority, ``classes[i]`` is the class that the program
    reports as ``i`` (``classes[0]`` is the default class), and ``services[i]`` is
    reported as ``i + 1``.
    """

    version: int = VERSION
    fragments: model.Fragments = "pass"
    default_class: str = model.UNKNOWN
    stranger_prefix: StrangerPrefix = StrangerPrefix()
    lanes: tuple[Lane, ...] = msgspec.field(name="lane")
    classes: tuple[Class, ...] = msgspec.field(name="class")
    services: tuple[Service, ...] = msgspec.field(name="service")
    rings: Rings = Rings()
    companion: Companion = Companion()
    owner: Owner = Owner()
    interface: Interface = Interface()
    tuning: Tuning = Tuning()

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """The policy in a file (at most 1 MiB); ``peers_file`` is relative to its folder."""
        path = Path(path)
        source = str(path)
        return cls.parse(read_text(path, Place(source), MAX_FILE), source, directory=path.parent)

    @classmethod
    def parse(cls, text: str, source: str = "policy", *, directory: Path | None = None) -> Policy:
        """The policy in ``text``; ``source`` is its name in messages.

        Without ``directory`` a ``peers_file`` has to be an absolute path.
        """
        place = Place(source)
        return _read_policy(Table(place, _toml(text, place), cls), directory)

    @property
    def peers(self) -> tuple[PeerEntry, ...]:
        """All configured peers in the order of their ids, which count from 1."""
        entries = [peer for entry in self.classes for peer in entry.peers]
        entries.sort(key=lambda peer: peer.id)
        return tuple(entries)

    @property
    def mode(self) -> model.InterfaceMode:
        """How to attach to the interface."""
        return self.interface.mode

    @property
    def minimum_mode(self) -> model.Rung:
        """The worst mode that is still acceptable."""
        return self.interface.minimum_mode

    @property
    def lane_names(self) -> tuple[str, ...]:
        """Indexed by lane number."""
        return tuple(lane.name for lane in self.lanes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Indexed by class number."""
        return tuple(entry.name for entry in self.classes)

    @property
    def service_names(self) -> tuple[str, ...]:
        """Indexed by service number; number 0, not ours, is "-"."""
        return ("-", *(service.name for service in self.services))


def _toml(text: str, place: Place) -> dict[str, Any]:
    """The TOML tables in ``text``, in bounded time and stack."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > _MAX_KEY_DOTS and _dots_outside_strings(line) > _MAX_KEY_DOTS:
            raise place.error(
                f"line {number} has more than {_MAX_KEY_DOTS} dots outside of strings",
                allowed="keys with one dot",
            )
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise place.error(f"is not TOML: {error}") from None
    except RecursionError:
        raise place.error("is nested too deeply", allowed="the tables of docs/configuration.md") from None
    except ValueError:
        # From int(), which refuses thousands of digits.
        raise place.error("holds a number with too many digits") from None


def _dots_outside_strings(line: str) -> int:
    dots = 0
    quote = ""
    escaped = False
    for character in line:
        if quote:
            if character == quote and not escaped:
                quote = ""
            escaped = character == "\\" and quote == '"' and not escaped
        elif character in "\"'":
            quote = character
        elif character == "#":
            break
        elif character == ".":
            dots += 1
    return dots


def _read_policy(table: Table, directory: Path | None) -> Policy:
    place = table.place
    table.require("version", str(VERSION))
    if table.values["version"] != VERSION or isinstance(table.values["version"], bool | float):
        raise table.at("version").wrong(table.values["version"], f"{VERSION}")
    for key in ("lane", "service"):
        table.require(key, f"at least one [[{key}]]")
    rings = read_rings(table.at("rings"), table.values.get("rings", {}))
    lanes = _read_list(table, "lane", model.MAX_LANES, partial(read_lane, rings=rings))
    classes: list[Class] = []
    next_id = 1
    for at, value in table.items("class", model.MAX_CLASSES + 1):
        classes.append(read_class(at, value, directory, next_id))
        next_id += len(classes[-1].peers)
    services = _read_list(table, "service", model.MAX_SERVICES, read_service)

    default_class = table.reference("default_class") or model.UNKNOWN
    names = [entry.name for entry in classes]
    if default_class not in (*names, model.UNKNOWN):
        raise table.at("default_class").unknown("class", default_class, [*names, model.UNKNOWN])
    check_lanes(place, lanes)
    check_classes(place, classes, lanes, default_class)
    check_services(place, services, lanes, classes, default_class)
    return Policy(
        fragments=cast("model.Fragments", table.choice("fragments", ("pass", "drop"), "pass")),
        default_class=default_class,
        stranger_prefix=read_stranger_prefix(
            table.at("stranger_prefix"), table.values.get("stranger_prefix", {})
        ),
        lanes=tuple(lanes),
        classes=_default_first(classes, default_class),
        services=tuple(services),
        rings=rings,
        companion=read_companion(table.at("companion"), table.values.get("companion", {})),
        owner=read_owner(table.at("owner"), table.values.get("owner", {})),
        interface=read_interface(table.at("interface"), table.values.get("interface", {})),
        tuning=read_tuning(table.at("tuning"), table.values.get("tuning", {})),
    )


def _read_list(table: Table, key: str, limit: int, read: Any) -> list[Any]:
    """The ``[[key]]`` tables, at least one."""
    items = table.items(key, limit)
    if not items:
        raise table.at(key).wrong([], f"at least one [[{key}]]")
    return [read(place, value) for place, value in items]


def _default_first(classes: Sequence[Class], default_class: str) -> tuple[Class, ...]:
    named = [entry for entry in classes if entry.name == default_class] or [Class(name=default_class)]
    return (*named, *(entry for entry in classes if entry.name != default_class))

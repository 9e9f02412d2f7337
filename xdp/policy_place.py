# SPDX-License-Identifier: Apache-2.0
"""Where in a policy file something stands, and reading typed values from there.

Every message has one form: ``FILE: service[2].rule[0].lane: what is wrong;
allowed: what may stand there``.  Indexes count from 0, as tomllib's lists do.
What was found is quoted shortened and escaped, since a file may hold anything.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, overload

import msgspec

from xdp.errors import PolicyError

T = TypeVar("T")

#: Names end up in tables, metric labels and file names, so they stay plain.
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,30}", re.ASCII)
NAME_ALLOWED = "a letter, then up to 30 letters, digits, '_', '-' or '.'"

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,40}", re.ASCII)
_SHOWN_CHARACTERS = 60
_SHOWN_INTEGER_BITS = 128
_HINT = "correct the file and run `sluice check` on it; docs/configuration.md explains every key"


def show(value: object) -> str:
    """``value`` as it looks in TOML, on one line, harmless and short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if value.bit_length() <= _SHOWN_INTEGER_BITS else "a huge number"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return f'"{escape(value)}"'
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return "an array" if value else "an empty array"
    return "a date or time"  # all that TOML has besides


def escape(text: str) -> str:
    """``text`` without control, format or line characters, cut to a readable length."""
    shown = text[:_SHOWN_CHARACTERS]
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
    return clean if len(text) <= _SHOWN_CHARACTERS else clean + "..."


def closest(word: str, allowed: Iterable[str]) -> str:
    """``; did you mean "votes"?``, or nothing when no allowed word is near."""
    near = difflib.get_close_matches(word[:_SHOWN_CHARACTERS], list(allowed), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


class Place:
    """A position in a policy file: the file's name and a key path."""

    __slots__ = ("path", "source")

    def __init__(self, source: str, path: str = "") -> None:
        self.source = source
        self.path = path

    def key(self, name: str) -> Place:
        """The place of a key of the table here."""
        shown = name if _BARE_KEY.fullmatch(name) else show(name)
        return Place(self.source, f"{self.path}.{shown}" if self.path else shown)

    def item(self, index: int) -> Place:
        """The place of an element of the array here."""
        return Place(self.source, f"{self.path}[{index}]")

    def error(self, what: str, *, allowed: str = "") -> PolicyError:
        """The exception to raise for what stands here."""
        parts = [escape_source(self.source), self.path, what]
        message = ": ".join(part for part in parts if part)
        return PolicyError(f"{message}; allowed: {allowed}" if allowed else message, hint=_HINT)

    def wrong(self, value: object, allowed: str) -> PolicyError:
        """The exception for a value that is none of ``allowed``."""
        return self.error(f"found {show(value)}", allowed=allowed)

    def unknown(self, what: str, name: str, allowed: Sequence[str]) -> PolicyError:
        """The exception for a name that is not among ``allowed``."""
        listed = ", ".join(allowed) if allowed else "none is defined"
        return self.error(f"no {what} named {show(name)}", allowed=listed + closest(name, allowed))


def escape_source(source: str) -> str:
    """A file's name for a message: whole, for people copy it, but on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in source)


def keys_of(model: type[msgspec.Struct]) -> tuple[str, ...]:
    """The TOML keys of a policy struct, in the order in which it declares them."""
    return tuple(field.encode_name for field in msgspec.structs.fields(model))


class Table:
    """A TOML table whose keys are the fields of ``model``; any other key is an error."""

    __slots__ = ("place", "values")

    def __init__(self, place: Place, value: object, model: type[msgspec.Struct]) -> None:
        if not isinstance(value, dict):
            raise place.wrong(value, "a table")
        allowed = keys_of(model)
        for key in value:
            if key not in allowed:
                raise place.key(key).error("unknown key", allowed=", ".join(allowed) + closest(key, allowed))
        self.place = place
        self.values: dict[str, Any] = value

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def at(self, key: str) -> Place:
        """The place of ``key``, whether it is there or not."""
        return self.place.key(key)

    def require(self, key: str, allowed: str) -> None:
        """Raises unless ``key`` is there."""
        if key not in self.values:
            raise self.at(key).error("is missing", allowed=allowed)

    @overload
    def integer(self, key: str, low: int, high: int, default: int) -> int: ...
    @overload
    def integer(self, key: str, low: int, high: int, default: None = None) -> int | None: ...
    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number from ``low`` to ``high``."""
        if key not in self.values:
            return default
        return whole(self.at(key), self.values[key], low, high)

    def power_of_two(self, key: str, low: int, high: int, default: int) -> int:
        """A power of two from ``low`` to ``high``."""
        number = self.integer(key, low, high, default)
        if number & (number - 1):
            raise self.at(key).wrong(number, f"a power of two from {low} to {high}")
        return number

    def fraction(self, key: str, default: float) -> float:
        """A number from 0 to 1."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise self.at(key).wrong(value, "a number from 0 to 1")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; 0 and 1 are none."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.at(key).wrong(value, "true or false")
        return value

    def choice(self, key: str, allowed: Sequence[str], default: str | None = None) -> str | None:
        """One of the words in ``allowed``."""
        if key not in self.values:
            return default
        value = self.values[key]
        if not isinstance(value, str) or value not in allowed:
            near = closest(value, allowed) if isinstance(value, str) else ""
            raise self.at(key).wrong(value, ", ".join(f'"{word}"' for word in allowed) + near)
        return value

    def name(self, key: str) -> str:
        """A required name of something that this file defines."""
        self.require(key, NAME_ALLOWED)
        return plain_name(self.at(key), self.values[key])

    def reference(self, key: str) -> str | None:
        """The name of something that is defined elsewhere in this file."""
        return plain_name(self.at(key), self.values[key]) if key in self.values else None

    def references(self, key: str) -> tuple[str, ...]:
        """One name or an array of different names; () when the key is not there."""
        value = self.values.get(key, [])
        if isinstance(value, str):
            return (plain_name(self.at(key), value),)
        if key in self.values and value == []:
            raise self.at(key).wrong(value, "a name or an array of names; leave the key out for any")
        names: list[str] = []
        for place, item in self.items(key):
            name = plain_name(place, item)
            if name in names:
                raise place.error(f"{show(name)} is named twice")
            names.append(name)
        return tuple(names)

    def items(self, key: str, limit: int | None = None) -> list[tuple[Place, Any]]:
        """The elements of an array with their places; an absent array is an empty one.

        Not for arrays of tens of thousands: use :meth:`array` there.
        """
        place = self.at(key)
        values = self.array(key)
        if limit is not None and len(values) > limit:
            raise place.error(f"{len(values)} entries", allowed=f"at most {limit}")
        return [(place.item(index), value) for index, value in enumerate(values)]

    def array(self, key: str) -> list[Any]:
        """An array; [] when the key is not there."""
        value = self.values.get(key, [])
        if not isinstance(value, list):
            raise self.at(key).wrong(value, "an array")
        return value


def whole(place: Place, value: object, low: int, high: int) -> int:
    """``value`` as a whole number from ``low`` to ``high``; true and 1.0 are none."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise place.wrong(value, f"a whole number from {low} to {high}")
    return value


def plain_name(place: Place, value: object) -> str:
    """``value`` as a name, see :data:`NAME`."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise place.wrong(value, NAME_ALLOWED)
    return value

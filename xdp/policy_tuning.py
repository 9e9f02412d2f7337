# SPDX-License-Identifier: Apache-2.0
"""The table ``[tuning]``: reading it, and what it costs.

Sources: Documentation/networking/napi.rst (busy polling, software interrupt coalescing),
Documentation/networking/af_xdp.rst (SO_PREFER_BUSY_POLL).
"""

from __future__ import annotations

import re

from xdp import policy_model as model
from xdp.policy_place import Place, Table, whole

#: Microseconds.  A receive call looks that long before it sleeps, and neither hears of a signal nor
#: of other descriptors meanwhile; the kernel's documents speak of 50.
MAX_BUSY_POLL = 10_000
#: Packets; SO_BUSY_POLL_BUDGET has 16 bits (net/core/sock.c).
MAX_BUDGET = 65_535
#: Interrupts to leave out one after the other.  The kernel takes any s32; each costs a
#: ``gro_flush_timeout`` of polling by timer.
MAX_DEFERRED = 1_000
#: Nanoseconds.  A packet waits so long for the next look where nobody polls: a tenth of a second
#: is longer than any receive ring lasts, and still lets an operator in by SSH.
MAX_FLUSH_TIMEOUT = 100_000_000
#: Nanoseconds of delay that are worth a word.
LONG_DELAY = 1_000_000
#: CONFIG_NR_CPUS is at most 8,192 on x86 (arch/x86/Kconfig).
_LARGEST_CPU = 8_191

_TIME = re.compile(r"([0-9]{1,12})(ns|us|ms)", re.ASCII)
_NANOSECONDS = {"ns": 1, "us": 1_000, "ms": 1_000_000}


def read_tuning(place: Place, value: object) -> model.Tuning:
    """What ``[tuning]`` says; whether kernel and interface can do it is not asked here."""
    table = Table(place, value, model.Tuning)
    busy_poll = _time(table, "busy_poll", "us", MAX_BUSY_POLL) or 0
    prefer = table.flag("prefer_busy_poll", False)
    budget = table.integer("busy_poll_budget", 1, MAX_BUDGET)
    for key, given in (("prefer_busy_poll", prefer), ("busy_poll_budget", budget is not None)):
        if given and not busy_poll:
            raise table.at(key).error("needs busy_poll beside it", allowed='busy_poll = "20us", say')
    defer = table.integer("napi_defer_hard_irqs", 0, MAX_DEFERRED)
    flush = _time(table, "gro_flush_timeout", "ns", MAX_FLUSH_TIMEOUT)
    if defer and not flush:
        raise table.at("napi_defer_hard_irqs").error(
            "needs gro_flush_timeout beside it: no timer, no interrupt left out",
            allowed='gro_flush_timeout = "200us", say',
        )
    return model.Tuning(
        busy_poll=busy_poll,
        busy_poll_budget=budget,
        prefer_busy_poll=prefer,
        napi_defer_hard_irqs=defer,
        gro_flush_timeout=flush,
        pin=_pin(table),
    )


def _time(table: Table, key: str, unit: str, most: int) -> int | None:
    """A time in ``unit``, as a number or as text with its own unit; whole, at most ``most``."""
    value = table.values.get(key)
    if value is None:
        return None
    allowed = f'a time up to {most} {unit}, as a number of {unit} or as text such as "20us"'
    scale = _NANOSECONDS[unit]
    if isinstance(value, str):
        match = _TIME.fullmatch(value)
        if match is None:
            raise table.at(key).wrong(value, allowed)
        nanoseconds = int(match[1]) * _NANOSECONDS[match[2]]
        if nanoseconds % scale or nanoseconds > most * scale:
            raise table.at(key).wrong(value, allowed)
        return nanoseconds // scale
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise table.at(key).wrong(value, allowed)
    return value


def _pin(table: Table) -> model.Pin | None:
    value = table.values.get("pin")
    if value is None or value == "auto":
        return value
    if not isinstance(value, list) or not value:
        raise table.at("pin").wrong(value, '"auto" or an array of CPUs, that of queue 0 first')
    return tuple(whole(place, item, 0, _LARGEST_CPU) for place, item in table.items("pin", 64))


def remarks(tuning: model.Tuning, mode: str = "", release: str = "") -> list[str]:
    """What is allowed but costs more, or does less, than it looks; one line each.

    With the ``mode`` of the lanes and the kernel's ``release``, also what only those decide.
    """
    found = []
    polls = bool(tuning.busy_poll and tuning.prefer_busy_poll)
    flush = tuning.gro_flush_timeout or 0
    if flush > LONG_DELAY and tuning.napi_defer_hard_irqs and not polls:
        found.append(
            f"gro_flush_timeout: without busy_poll and prefer_busy_poll a packet may wait {flush / 1e6:g} ms"
        )
    if flush and not tuning.napi_defer_hard_irqs:
        found.append(
            "gro_flush_timeout: without napi_defer_hard_irqs no interrupt is left out, GRO only waits longer"
        )
    if polls and not (flush and tuning.napi_defer_hard_irqs):
        found.append(
            "prefer_busy_poll: interrupts go on without napi_defer_hard_irqs and gro_flush_timeout beside it"
        )
    if polls and flush and mode in {"native-copy", "generic-copy"} and _unpolled(mode, release):
        found.append(
            f"prefer_busy_poll: the kernel has no queue to poll for {mode} sockets here, so packets may wait "
            f"{flush / 1e6:g} ms for the timer: take gro_flush_timeout out"
        )
    return found


def _unpolled(mode: str, release: str) -> bool:
    """Whether AF_XDP sockets in copy mode have no NAPI instance, for which the kernel could poll.

    In generic mode they never had one; since Linux 6.13 only zero-copy ones do (xsk_bind, net/xdp/xsk.c).
    """
    match = re.match(r"(\d+)\.(\d+)", release)
    return mode == "generic-copy" or (match is not None and (int(match[1]), int(match[2])) >= (6, 13))

# SPDX-License-Identifier: Apache-2.0
"""The parts of a policy, as plain frozen values.

Fields are named after the TOML keys (docs/configuration.md explains each), with
defaults filled in, so readers need no second look: ``rate`` None means no limit,
``burst`` is set whenever ``rate`` is.  Rates are packets per second, bursts
packets, offsets and sizes bytes.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal

import msgspec

from xdp._libbpf import lib

Address = IPv4Address | IPv6Address
Prefix = IPv4Network | IPv6Network
Over = Literal["drop", "demote"]
End = Literal["socket", "kernel"]
Action = Literal["lane", "pass", "drop", "reply"]
Fragments = Literal["pass", "drop"]

#: The kind of a probe (docs/configuration.md, "Heartbeats"); every policy has it.
HEARTBEAT = "heartbeat"
#: The kind of a payload that no pattern of its service matches: kind 0.
OTHER = "other"
#: The class of an address in no prefix, unless the file names another.
UNKNOWN = "unknown"

# Class 0, service 0 and kind 0 stand for "none of them", hence the - 1.
MAX_LANES = lib.SLUICE_MAX_LANES
MAX_CLASSES = lib.SLUICE_MAX_CLASSES - 1
MAX_SERVICES = lib.SLUICE_MAX_SERVICES - 1
MAX_KINDS = lib.SLUICE_MAX_KINDS - 1
MAX_PATTERNS = lib.SLUICE_MAX_PATTERNS
MAX_PEERS = lib.SLUICE_MAX_KNOWN
MAX_PREFIXES = lib.SLUICE_MAX_PREFIXES - 1  # one may be needed to keep ::/0 off IPv4

#: Packets per second.  The kernel counts in whole nanoseconds: above 1e8 the error would be gross.
MAX_RATE = 100_000_000
MAX_BURST = 100_000_000

#: Packets in several frames: always, never, or where the MTU does not fit a frame and the kernel has them.
Jumbo = bool | Literal["auto"]
InterfaceMode = Literal["auto", "native", "generic"]
#: From best to worst: what ``minimum_mode`` may demand.
Rung = Literal["native-zero-copy", "native-copy", "generic-copy", "mmsg", "portable"]


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all: immutable and compared by value."""


class Lane(Struct, frozen=True, kw_only=True):
    """A priority; the first lane of a policy is the highest."""

    name: str
    rate: int | None = None
    burst: int | None = None
    over: Over = "drop"
    demote: str | None = None
    end: End = "socket"
    timestamps: bool = False
    share: float
    ring: int
    quota: int


class PeerEntry(Struct, frozen=True, kw_only=True):
    """A configured peer; ``id`` counts from 1 in the order of the file."""

    id: int
    address: Address
    name: str = ""


class Class(Struct, frozen=True, kw_only=True):
    """A peer class: addresses with one treatment.

    ``peers`` holds those of ``peers_file`` too.  ``over`` and ``demote`` say what
    becomes of packets over the peer's or the prefix's limit; in a rule whose lane
    is not above ``demote`` they are dropped.
    """

    name: str
    prefixes: tuple[Prefix, ...] = ()
    peers: tuple[PeerEntry, ...] = ()
    peers_file: str | None = None
    deny: bool = False
    peer_rate: int | None = None
    peer_burst: int | None = None
    prefix_rate: int | None = None
    prefix_burst: int | None = None
    over: Over = "drop"
    demote: str | None = None


class Match(Struct, frozen=True, kw_only=True):
    """``payload[offset:offset + len(mask)] & mask == value``; 1, 2, 4 or 8 bytes."""

    offset: int
    mask: bytes
    value: bytes


class Kind(Struct, frozen=True, kw_only=True):
    """A sort of payload: any of its patterns matches."""

    name: str
    match: tuple[Match, ...]


class Rule(Struct, frozen=True, kw_only=True):
    """What happens to packets of some classes and kinds; an empty tuple means any.

    A limit that is None, and ``over`` when it is None, are the class's.
    """

    classes: tuple[str, ...] = msgspec.field(name="class", default=())
    kinds: tuple[str, ...] = msgspec.field(name="kind", default=())
    action: Action
    lane: str | None = None
    peer_rate: int | None = None
    peer_burst: int | None = None
    prefix_rate: int | None = None
    prefix_burst: int | None = None
    over: Over | None = None
    demote: str | None = None


class Service(Struct, frozen=True, kw_only=True):
    """A set of destination ports with its rules, the first match of which wins.

    ``kinds`` are those that the file defines.  :attr:`kind_names` is indexed by
    the number that the program reports.
    """

    name: str
    ports: tuple[int, ...]
    kinds: tuple[Kind, ...] = msgspec.field(name="kind", default=())
    rules: tuple[Rule, ...] = msgspec.field(name="rule", default=())

    @property
    def heartbeat(self) -> bool:
        """Whether a rule names the kind "heartbeat"; only then is it looked for."""
        return any(HEARTBEAT in rule.kinds for rule in self.rules)

    @property
    def kind_names(self) -> tuple[str, ...]:
        """The kind "other", those of the file in order and, where looked for, "heartbeat"."""
        own = (OTHER, *(kind.name for kind in self.kinds))
        return (*own, HEARTBEAT) if self.heartbeat else own


class StrangerPrefix(Struct, frozen=True, kw_only=True):
    """How many leading bits of an unconfigured peer's address share one prefix limit."""

    v4: int = 24
    v6: int = 48


class Rings(Struct, frozen=True, kw_only=True):
    """Sizes for each queue: rings in descriptors, quota and reserve in frames."""

    rx: int = 4096
    tx: int = 2048
    frame_size: int = 2048
    jumbo: Jumbo = "auto"
    quota: int = 4096
    reserve: int = 1024


class Companion(Struct, frozen=True, kw_only=True):
    """Kernel sockets on the same ports, for what the program passes."""

    enabled: bool = True
    budget: int = 256


class Owner(Struct, frozen=True, kw_only=True):
    """Who, besides root, may ask the owner for descriptors: names or numbers."""

    users: tuple[str | int, ...] = ()
    groups: tuple[str | int, ...] = ()


#: Which CPU the thread of each queue runs on: by queue, or near the queue's interrupts.
Pin = Literal["auto"] | tuple[int, ...]


class Tuning(Struct, frozen=True, kw_only=True):
    """What is changed of sockets and interface for speed; nothing by default.

    ``busy_poll`` is in microseconds, ``gro_flush_timeout`` in nanoseconds.  None leaves a
    setting of the interface as it is.
    """

    busy_poll: int = 0
    busy_poll_budget: int | None = None
    prefer_busy_poll: bool = False
    napi_defer_hard_irqs: int | None = None
    gro_flush_timeout: int | None = None
    pin: Pin | None = None


class Interface(Struct, frozen=True, kw_only=True):
    """How to attach, and the mode below which starting fails."""

    mode: InterfaceMode = "auto"
    minimum_mode: Rung = "portable"

# SPDX-License-Identifier: Apache-2.0
"""Random valid policies, and random packets that have something to do with them."""

from __future__ import annotations

import random
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from tests.kernel import frames
from xdp._libbpf import ffi, lib
from xdp.policy import Policy

PORTS = tuple(range(8000, 8016))
#: Nested on purpose: the longest prefix decides.
PREFIXES = (
    "0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.128/25", "198.18.0.0/15",
    "203.0.113.7/32", "::/0", "2001:db8::/32", "2001:db8:1::/48", "2001:db8:1:2::/64",
    "2001:db8:1:2::8/125", "fe80::/10", "::/8",
)  # fmt: skip
PEERS = ("10.1.2.3", "10.9.9.9", "192.0.2.7", "203.0.113.9", "2001:db8::7", "2001:db8:1:2::9", "fe80::1")
SOURCES = (
    *PEERS, "10.200.1.1", "10.1.77.1", "10.1.2.200", "198.19.1.1", "203.0.113.7", "8.8.8.8", "0.1.2.3",
    "127.0.0.1", "224.0.0.5", "240.0.0.1", "255.255.255.255", "::", "::1", "::2", "ff02::1",
    "::ffff:10.1.2.3", "::10.1.2.3", "2001:db8:1::5", "2001:db8:1:2::5", "2001:db8:1:2::f", "2001:db8:2::1",
    "2002::1", "fe80::2", "64:ff9b::10.1.2.3",
)  # fmt: skip
_PROTOCOLS = (frames.UDP,) * 8 + (frames.AH, frames.NO_NEXT, 6, 58)
# Bytes that patterns look for and payloads are made of: few, so that they meet.
_BYTES = (0x00, 0x01, 0x53, 0x90, 0xFF)
_MASKS = (0xFF, 0xF0, 0x0F, 0x80, 0x01)
# No packet of a test exceeds these within its time, so limits take part without deciding by the clock.
_GENEROUS = "1000000"


def random_policy(rng: random.Random, offsets: tuple[int, ...] = (0, 0, 1, 4)) -> str:
    """The text of a policy that is valid whatever ``rng`` says; patterns are at ``offsets``, or up to 64."""
    lanes = [f"lane{number}" for number in range(rng.randint(1, lib.SLUICE_MAX_LANES))]
    classes = [f"class{number}" for number in range(rng.randint(0, 6))]
    parts = ["version = 1", f'fragments = "{rng.choice(("pass", "drop"))}"']
    parts.append(f"stranger_prefix = {{ v4 = {rng.randint(1, 32)}, v6 = {rng.randint(1, 64)} }}")
    default = rng.choice(classes) if classes and rng.random() < 0.3 else "unknown"
    parts.append(f'default_class = "{default}"')
    for number, name in enumerate(lanes):
        end = rng.choice(("socket", "kernel"))
        parts.append(f'[[lane]]\nname = "{name}"\nend = "{end}"')
        if end == "socket" and rng.random() < 0.5:
            parts.append("timestamps = true")
        if rng.random() < 0.4:
            parts.append(f"rate = {_GENEROUS}\nburst = {_GENEROUS}")
            parts.append(_demotion(rng, lanes, number))
    prefixes, peers = rng.sample(PREFIXES, len(PREFIXES)), rng.sample(PEERS, len(PEERS))
    denied = set()
    for name in classes:
        mine = [prefixes.pop() for _ in range(rng.randint(0, 2))]
        theirs = [peers.pop() for _ in range(rng.randint(0, 1))]
        parts.append(f'[[class]]\nname = "{name}"\nprefixes = {mine!r}\npeers = {theirs!r}'.replace("'", '"'))
        if rng.random() < 0.15:
            denied.add(name)
            parts.append("deny = true")
        elif rng.random() < 0.4:
            parts.append(f"peer_rate = {_GENEROUS}\npeer_burst = {_GENEROUS}")
            parts.append(f"prefix_rate = {_GENEROUS}\nprefix_burst = {_GENEROUS}")
    ports = rng.sample(PORTS, len(PORTS))
    for number in range(rng.randint(1, 4)):
        taken = sorted(ports.pop() for _ in range(rng.randint(1, 3)))
        parts.append(f'[[service]]\nname = "service{number}"\nports = {taken}')
        parts.extend(_service_body(rng, lanes, [name for name in classes if name not in denied], offsets))
    return "\n".join(part for part in parts if part) + "\n"


def _demotion(rng: random.Random, lanes: list[str], number: int) -> str:
    lower = lanes[number + 1 :]
    return f'demote = "{rng.choice(lower)}"' if lower and rng.random() < 0.5 else ""


def _service_body(
    rng: random.Random, lanes: list[str], classes: list[str], offsets: tuple[int, ...]
) -> list[str]:
    parts = []
    kinds = [f"kind{number}" for number in range(rng.randint(0, 4))]
    used: set[str] = set()
    for name in kinds:
        patterns = [_pattern(rng, offsets) for _ in range(rng.randint(1, 3))]
        fresh = [pattern for pattern in dict.fromkeys(patterns) if pattern not in used]
        used.update(fresh)
        # An offset of its own where all patterns were taken.
        text = ", ".join(fresh) or f'{{ offset = {900 + len(used)}, value = "00" }}'
        parts.append(f'[[service.kind]]\nname = "{name}"\nmatch = [{text}]')
    for _ in range(rng.choice((0, 2, 3, 4, 5, 6))):
        action = rng.choice(("lane", "lane", "lane", "pass", "drop", "reply"))
        parts.append(f'[[service.rule]]\naction = "{action}"')
        if classes and rng.random() < 0.6:
            parts.append(
                f"class = {rng.sample(classes, rng.randint(1, min(2, len(classes))))!r}".replace("'", '"')
            )
        if action == "reply":
            parts.append('kind = "heartbeat"')
        elif rng.random() < 0.6:
            parts.append(f'kind = "{rng.choice([*kinds, "other", "heartbeat"])}"')
        if action in ("lane", "reply"):
            parts.append(f'lane = "{rng.choice(lanes)}"')
            if rng.random() < 0.3:
                parts.append(f"peer_rate = {_GENEROUS}\npeer_burst = {_GENEROUS}")
            if rng.random() < 0.3:
                parts.append(f"prefix_rate = {_GENEROUS}\nprefix_burst = {_GENEROUS}")
    return parts


def _pattern(rng: random.Random, offsets: tuple[int, ...]) -> str:
    width = rng.choice((1, 2, 4, 8))
    mask = bytes(rng.choice(_MASKS) for _ in range(width))
    value = bytes(rng.choice(_BYTES) & byte for byte in mask)
    offset = rng.choice((*offsets, rng.randint(0, 64)))
    return f'{{ offset = {offset}, mask = "{mask.hex()}", value = "{value.hex()}" }}'


def heartbeat(rng: random.Random, kind: int = lib.SLUICE_HEARTBEAT_PROBE) -> bytes:
    probe = ffi.new("struct sluice_heartbeat *")
    probe.type = kind
    head = bytearray(ffi.buffer(probe))
    head[0:4] = lib.SLUICE_HEARTBEAT_MAGIC.to_bytes(4, "big")
    head[5:] = rng.randbytes(len(head) - 5)
    return bytes(head)


def random_payload(rng: random.Random) -> bytes:
    choice = rng.random()
    if choice < 0.25:
        payload = heartbeat(rng, rng.choice((1, 1, 1, 2, 0)))
        return payload if rng.random() < 0.8 else (payload + b"x")[: rng.randint(0, 33)]
    if choice < 0.3:
        return rng.randbytes(rng.randint(0, 1400))
    return bytes(rng.choice(_BYTES) for _ in range(rng.choice((0, 1, 2, 7, 8, 9, 16, 64, 100))))


def random_frame(rng: random.Random, policy: Policy, longest: int = 0) -> bytes:
    """Mostly a datagram that some service takes; often with one of its fields changed.

    ``longest``: bytes that its payload may be longer by.
    """
    source = rng.choice(SOURCES if rng.random() < 0.4 else PEERS)
    if rng.random() < 0.4:
        source = _near(rng, policy) or source
    ports = [port for service in policy.services for port in service.ports]
    port = rng.choice(ports) if rng.random() < 0.9 else rng.choice((*PORTS, 0, 65535))
    payload = random_payload(rng)
    if longest and rng.random() < 0.8:
        payload += bytes([rng.choice(_BYTES)]) * rng.randint(0, longest)
    datagram = frames.udp(port, payload, source_port=rng.randrange(65536))
    if rng.random() < 0.5:
        datagram = datagram[:6] + rng.randbytes(2) + datagram[8:]
    tags = [rng.choice((frames.VLAN, frames.QINQ)) for _ in range(rng.choice((0,) * 8 + (1, 1, 2, 2, 3)))]
    to = rng.choice((frames.MAC_TO, frames.MAC_TO, frames.MAC_TO, b"\xff" * 6, bytes.fromhex("01005e000001")))
    if ":" in source:
        kinds = [
            rng.choice((frames.HOP_BY_HOP, frames.ROUTING, frames.DESTINATION, frames.FRAGMENT))
            for _ in range(rng.choice((0,) * 8 + (1, 2, 8, 9)))
        ]
        first, headers = frames.chain(kinds, rng.choice(_PROTOCOLS))
        packet = frames.ipv6(headers + datagram, source=source, next_header=first)
        frame = frames.ethernet(frames.IPV6, packet, tags, to=to)
    else:
        options = bytes(4 * rng.choice((0, 0, 0, 1, 10)))
        packet = frames.ipv4(datagram, source=source, options=options, ttl=rng.randrange(256))
        frame = frames.ethernet(frames.IPV4, packet, tags, to=to)
    return _mutated(rng, frame + bytes(rng.choice((0, 0, 0, 1, 18))))


def _near(rng: random.Random, policy: Policy) -> str | None:
    """An address in, or just beside, one of the policy's prefixes."""
    prefixes = [prefix for entry in policy.classes for prefix in entry.prefixes]
    if not prefixes:
        return None
    prefix: IPv4Network | IPv6Network = rng.choice(prefixes)
    span = prefix.num_addresses
    number = int(prefix.network_address) + rng.choice((-1, 0, 1, span - 1, span, rng.randrange(span)))
    number %= 1 << prefix.max_prefixlen
    return str(IPv4Address(number) if prefix.version == 4 else IPv6Address(number))


def _mutated(rng: random.Random, frame: bytes) -> bytes:
    choice = rng.random()
    if choice < 0.55:
        return frame
    changed = bytearray(frame)
    if choice < 0.7:  # a byte of the headers
        changed[rng.randrange(12, min(len(frame), 120))] = rng.choice((0, 1, 0xFF, rng.randrange(256)))
    elif choice < 0.8:  # a bit anywhere
        changed[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
    elif choice < 0.9:  # cut short
        return frame[: rng.randint(14, len(frame))]
    elif choice < 0.95:  # a word of the headers
        at = rng.randrange(12, min(len(frame) - 1, 80))
        struct.pack_into("!H", changed, at, rng.randrange(65536))
    else:  # a run of bytes taken out
        at = rng.randrange(14, len(frame))
        del changed[at : at + rng.randint(1, 20)]
    return bytes(changed) if len(changed) >= 14 else frame

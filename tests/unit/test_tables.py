# SPDX-License-Identifier: Apache-2.0
"""What compile_policy() writes into the structs that the kernel program reads."""

from __future__ import annotations

import struct
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.policy_texts import peer_class, policy
from xdp._libbpf import ffi, lib
from xdp.abi import pack_address, unpack_address
from xdp.errors import UsageError
from xdp.policy import Policy
from xdp.tables import MAX_HOLD_BURST, MAX_HOLD_RATE, Tables, compile_policy, hold_limit, limit_ns

FULL = """
version = 1
fragments = "drop"
default_class = "guests"
stranger_prefix = { v4 = 20, v6 = 56 }
[[lane]]
name = "high"
rate = 1000
burst = 11
demote = "low"
[[lane]]
name = "middle"
[[lane]]
name = "low"
end = "kernel"
rate = 3
[[class]]
name = "staked"
prefixes = ["192.0.2.0/24", "2001:db8::/32"]
peers = ["198.51.100.7", "2001:db8:1::7"]
peer_rate = 100
prefix_rate = 200
prefix_burst = 5
demote = "middle"
[[class]]
name = "banned"
prefixes = ["203.0.113.0/24"]
deny = true
[[class]]
name = "guests"
[[service]]
name = "first"
ports = [1]
[[service]]
name = "second"
ports = [8000, "65534-65535"]
[[service.kind]]
name = "data"
match = [{ offset = 64, mask = "f0", value = "90" }, { offset = 2, value = "0102030405060708" }]
[[service.kind]]
name = "code"
match = [{ offset = 0, mask = "00ff", value = "0001" }]
[[service.rule]]
kind = "heartbeat"
action = "reply"
lane = "low"
[[service.rule]]
class = "staked"
kind = "data"
action = "lane"
lane = "high"
peer_rate = 1000000
over = "drop"
[[service.rule]]
class = "staked"
kind = "code"
action = "lane"
lane = "middle"
[[service.rule]]
class = "staked"
action = "lane"
lane = "high"
[[service.rule]]
kind = "other"
action = "drop"
"""


@pytest.fixture(scope="module")
def tables() -> Tables:
    return compile_policy(Policy.parse(FULL))


def rule_of(tables: Tables, service: int, class_id: int, kind: int) -> tuple[int, ...]:
    entry = tables.rules[(service * lib.SLUICE_MAX_CLASSES + class_id) * lib.SLUICE_MAX_KINDS + kind]
    return (
        entry.action,
        entry.lane,
        entry.over,
        entry.demote_lane,
        entry.peer.interval_ns,
        entry.peer.burst_ns,
        entry.prefix.interval_ns,
        entry.prefix.burst_ns,
    )


def test_policy_and_lanes(tables: Tables) -> None:
    compiled = tables.policy
    assert compiled.flags == lib.SLUICE_POLICY_DROP_FRAGMENTS
    assert (compiled.stranger_bits_v4, compiled.stranger_bits_v6) == (20, 56)
    high, middle, low = compiled.lane[0], compiled.lane[1], compiled.lane[2]
    assert (high.limit.interval_ns, high.limit.burst_ns) == (1_000_000, 10_000_000)
    assert (high.end, high.over, high.demote_lane) == (lib.SLUICE_END_SOCKET, lib.SLUICE_OVER_DEMOTE, 2)
    assert (middle.limit.interval_ns, middle.end, middle.over) == (
        0,
        lib.SLUICE_END_SOCKET,
        lib.SLUICE_OVER_DROP,
    )
    assert (low.limit.interval_ns, low.limit.burst_ns) == (333_333_334, 15 * 333_333_334)
    assert (low.end, low.over) == (lib.SLUICE_END_KERNEL, lib.SLUICE_OVER_DROP)
    assert compile_policy(Policy.parse(policy())).policy.flags == 0


def test_ports(tables: Tables) -> None:
    assert set(tables.ports) == {1, 8000, 65534, 65535}
    entry = struct.Struct("=BB2x")
    assert entry.size == ffi.sizeof("struct sluice_port")
    assert entry.unpack(tables.ports[1]) == (1, 0)
    assert entry.unpack(tables.ports[8000]) == entry.unpack(tables.ports[65535]) == (2, 4)


def test_patterns_begin_with_the_heartbeat_where_a_rule_names_it(tables: Tables) -> None:
    assert len(tables.patterns) == lib.SLUICE_MAX_SERVICES
    found = [
        (pattern.mask, pattern.value, pattern.offset, pattern.width, pattern.kind)
        for pattern in tables.patterns[2].pattern
    ]
    assert found[:4] == [
        (0xFFFFFFFF, lib.SLUICE_HEARTBEAT_MAGIC, 0, 4, 3),
        (0xF0, 0x90, 64, 1, 1),
        (2**64 - 1, 0x0102030405060708, 2, 8, 1),
        (0x00FF, 0x0001, 0, 2, 2),
    ]
    assert set(found[4:]) == {(0, 0, 0, 0, 0)}
    assert not any(bytes(ffi.buffer(ffi.addressof(tables.patterns[1]))))


def test_rules(tables: Tables) -> None:
    assert len(tables.rules) * lib.SLUICE_BANKS == lib.SLUICE_RULES_SIZE
    guests, staked, banned = 0, 1, 2
    other, data, code, heartbeat = range(4)
    peer = (10_000_000, 15 * 10_000_000)
    prefix = (5_000_000, 4 * 5_000_000)
    drop, demote = lib.SLUICE_OVER_DROP, lib.SLUICE_OVER_DEMOTE
    # the rule's own peer limit and over, the class's prefix limit
    million = (1000, 99_999 * 1000)
    assert rule_of(tables, 2, staked, data) == (lib.SLUICE_ACTION_LANE, 0, drop, 0, *million, *prefix)
    # the class would demote to this very lane: drop
    assert rule_of(tables, 2, staked, code) == (lib.SLUICE_ACTION_LANE, 1, drop, 0, *peer, *prefix)
    assert rule_of(tables, 2, staked, other) == (lib.SLUICE_ACTION_LANE, 0, demote, 1, *peer, *prefix)
    assert rule_of(tables, 2, staked, heartbeat) == (lib.SLUICE_ACTION_REPLY, 2, drop, 0, *peer, *prefix)
    nothing = (0,) * 7
    assert rule_of(tables, 2, guests, heartbeat) == (lib.SLUICE_ACTION_REPLY, 2, 0, 0, 0, 0, 0, 0)
    assert rule_of(tables, 2, guests, other) == (lib.SLUICE_ACTION_DROP, *nothing)
    assert rule_of(tables, 2, guests, data) == (lib.SLUICE_ACTION_PASS, *nothing)
    for kind in range(4):
        assert rule_of(tables, 2, banned, kind) == (lib.SLUICE_ACTION_DENY, *nothing)
    assert rule_of(tables, 1, banned, 0) == (lib.SLUICE_ACTION_DENY, *nothing)
    assert rule_of(tables, 1, staked, 0) == (lib.SLUICE_ACTION_PASS, *nothing)
    not_ours = lib.SLUICE_MAX_CLASSES * lib.SLUICE_MAX_KINDS * ffi.sizeof("struct sluice_rule")
    assert bytes(ffi.buffer(tables.rules, not_ours)) == bytes(not_ours)


def trie(tables: Tables) -> dict[tuple[int, str], int]:
    table = tables.prefixes
    raw = bytes(ffi.buffer(table.keys, table.count * ffi.sizeof("struct sluice_prefix")))
    values = list(table.values[0 : table.count])
    keys = [raw[start : start + 20] for start in range(0, len(raw), 20)]
    return {
        (int.from_bytes(key[:4], "little"), str(unpack_address(key[4:]))): value.class_id
        for key, value in zip(keys, values, strict=True)
    }


def test_prefixes_and_configured_peers_are_in_the_trie(tables: Tables) -> None:
    assert ffi.sizeof("struct sluice_prefix") == 20
    assert trie(tables) == {
        (96 + 24, "192.0.2.0"): 1,
        (32, "2001:db8::"): 1,
        (128, "198.51.100.7"): 1,
        (128, "2001:db8:1::7"): 1,
        (96 + 24, "203.0.113.0"): 2,
    }


def test_known_peers(tables: Tables) -> None:
    known = tables.known
    assert known.count == 2
    assert list(known.ids[0:2]) == [1, 2]
    assert bytes(ffi.buffer(known.keys, 32)) == pack_address(ip_address("198.51.100.7")) + pack_address(
        ip_address("2001:db8:1::7")
    )


def test_no_prefixes_and_no_peers() -> None:
    tables = compile_policy(Policy.parse(policy(classes="")))
    assert (tables.prefixes.count, tables.known.count) == (0, 0)


@pytest.mark.parametrize(
    ("prefixes", "classes"),
    [
        ('["::/0"]', {(0, "::"): 1, (96, "0.0.0.0"): 0}),
        ('["::/0", "0.0.0.0/0"]', {(0, "::"): 1, (96, "0.0.0.0"): 1}),
        ('["::/80"]', {(80, "::"): 1, (96, "0.0.0.0"): 0}),
        ('["::/96"]', {(96, "::"): 1}),
        ('["0.0.0.0/0"]', {(96, "0.0.0.0"): 1}),
    ],
)
def test_all_of_ipv6_is_not_ipv4(prefixes: str, classes: dict[tuple[int, str], int]) -> None:
    assert trie(compile_policy(Policy.parse(peer_class(f"prefixes = {prefixes}")))) == classes


@given(st.integers(1, 100_000_000), st.integers(1, 100_000_000))
def test_limits_fit_and_are_never_above_the_rate(rate: int, burst: int) -> None:
    interval, tolerance = limit_ns(rate, burst)
    assert 0 < interval < 2**63
    assert tolerance < 2**63
    assert 1_000_000_000 / interval <= rate
    assert (interval - 1) * rate < 1_000_000_000
    assert tolerance == (burst - 1) * interval


@given(st.integers(1, MAX_HOLD_RATE), st.integers(1, MAX_HOLD_BURST))
def test_holds_fit_and_are_the_same_limit(rate: int, burst: int) -> None:
    interval, more = hold_limit(rate, burst)
    assert (interval, more * interval) == limit_ns(rate, burst)
    made = ffi.new("struct sluice_hold *", {"interval_ns": interval, "burst": more})
    assert (made.interval_ns, made.burst) == (interval, more)
    # A timestamp that is as far ahead as the limit allows does not run over, 200 years after boot.
    assert 200 * 365 * 86_400 * 10**9 + (more + 1) * interval < 1 << 64


@pytest.mark.parametrize("rate", [0, -1, MAX_HOLD_RATE + 1, 1.0, True, None, "1"])
def test_rates_that_nobody_is_held_at(rate: int) -> None:
    with pytest.raises(UsageError, match=r"rate of a hold: .*; allowed: a whole number from 1 to 10,000,000"):
        hold_limit(rate, 1)
    with pytest.raises(UsageError, match=r"burst of a hold: .*; allowed: a whole number from 1 to 1,000,000"):
        hold_limit(1, rate)


def test_no_limit_is_zero() -> None:
    assert limit_ns(None, None) == (0, 0)


@given(st.ip_addresses())
def test_every_prefix_length_of_both_families_lands_where_it_belongs(address: object) -> None:
    host = ip_address(str(address))
    if host.version == 6 and host.ipv4_mapped is not None:
        return
    for bits in (1, host.max_prefixlen // 2, host.max_prefixlen):
        prefix = ip_network((host, bits), strict=False)
        entries = trie(compile_policy(Policy.parse(peer_class(f'prefixes = ["{prefix}"]'))))
        offset = 96 if host.version == 4 else 0
        assert entries[offset + bits, str(prefix.network_address)] == 1

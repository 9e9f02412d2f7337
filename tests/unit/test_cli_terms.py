# SPDX-License-Identifier: Apache-2.0
"""Sluice's terms for entries of maps, texts for people, names and the owner's state file."""

from __future__ import annotations

import json
import os
from ipaddress import IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_cli import map_terms
from sluice_cli.map_terms import VIEWS, IndexKey, add_values, danger, key_parts, numbers
from sluice_cli.map_text import duration_text, key_text, limit_text, moment_text, rate_text, tables
from sluice_cli.map_view import Row, parse_json, parse_key
from xdp._libbpf import lib
from xdp.codec import RangeError, decode, encode
from xdp.errors import SluiceError, UsageError
from xdp.names import Names
from xdp.owner_state import MAX_SIZE, OwnerState, Refusal, read_state, start_time, state_path, write_state
from xdp.policy import Policy

NAMES = Names(
    lanes=("votes", "bulk"),
    services=("-", "turbine"),
    classes=("unknown", "staked"),
    kinds=((), ("other", "vote")),
    peers={1: "bob"},
)


# --- views -------------------------------------------------------------------------------------------------


@given(st.ip_addresses())
def test_addresses_round_trip(address: Any) -> None:
    view = VIEWS["sluice_address"]
    shown = view.read(view.write(str(address)))
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    assert ip_address(shown) == (mapped or address)


@given(st.ip_addresses(), st.integers(0, 128))
def test_prefixes_round_trip(address: Any, bits: int) -> None:
    network = ip_network(f"{address}/{min(bits, address.max_prefixlen)}", strict=False)
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped and network.prefixlen >= 96:
        return  # the same key as the IPv4 prefix
    view = VIEWS["sluice_prefix"]
    assert view.read(view.write(str(network))) == str(network)


@pytest.mark.parametrize(
    ("struct", "value", "allowed"),
    [
        ("sluice_address", "10.0.0.256", "an IPv4 or IPv6 address"),
        ("sluice_address", 5, "an IPv4 or IPv6 address"),
        ("sluice_prefix", "10.0.0.1/8", "a prefix such as"),
        ("sluice_prefix", None, "a prefix such as"),
        ("sluice_prefix", "::ffff:10.0.0.0/104", "in its own notation"),
        ("sluice_rule", {"action": "fly"}, "action pass, lane, drop, deny, reply"),
        ("sluice_rule", 1, "an object"),
        ("sluice_lane", {"end": "air"}, "end socket, kernel"),
        ("sluice_known", {"class": 1}, "class and generation together"),
        ("sluice_known", 7, "an object"),
        ("sluice_counters", {"verdict": {"9": {"steer": {}}}}, "verdict by row"),
        ("sluice_counters", {"verdict": {"0": {"fly": {}}}}, "verdict by row"),
    ],
)
def test_views_say_what_is_allowed(struct: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=allowed):
        VIEWS[struct].write(value)


def test_enums_have_names_both_ways() -> None:
    rule = VIEWS["sluice_rule"]
    assert rule.read({"action": 3, "over": 1, "lane": 2, "reserved": [0] * 4}) == {
        "action": "deny", "over": "demote", "lane": 2,
    }  # fmt: skip
    assert rule.write({"action": "deny", "over": 0}) == {"action": lib.SLUICE_ACTION_DENY, "over": 0}
    assert rule.read({"action": 77})["action"] == 77


def test_a_peer_is_one_object_and_its_counts_are_totals() -> None:
    """The program counts in two places; who reads or writes sees one number."""
    view = VIEWS["sluice_known"]
    peer = {
        "tat_ns": 9, "generation": 5, "home": 2, "class_id": 2, "shared": 1,
        "packets": 5, "bytes": 500, "drops": 1, "last_seen_ns": 77,
    }  # fmt: skip
    away = {"packets": 3, "bytes": 300, "drops": 2}
    assert view.read({"peer": peer, "id": 7, "reserved": [0] * 3, "away": away}) == {
        "id": 7, "class": 2, "generation": 5, "packets": 8, "bytes": 800, "drops": 3, "last_seen_ns": 77,
        "tat_ns": 9,
    }  # fmt: skip
    assert view.write({"class": 2, "generation": 5, "id": 7}) == {
        "peer": {"class_id": 2, "generation": 5}, "away": {}, "id": 7,
    }  # fmt: skip
    assert view.write({"packets": 8}) == {"peer": {"packets": 8}, "away": {"packets": 0}}


def test_verdicts_have_rows_and_reasons() -> None:
    empty = {"packets": 0, "bytes": 0}
    counts = [dict(empty) for _ in range(lib.SLUICE_VERDICTS_SIZE)]
    counts[2 * lib.SLUICE_REASONS + lib.SLUICE_STEER] = {"packets": 4, "bytes": 400}
    counts[lib.SLUICE_NO_LANE * lib.SLUICE_REASONS + lib.SLUICE_PASS_NOT_IP] = {"packets": 1, "bytes": 60}
    view = VIEWS["sluice_counters"]
    shown = view.read({"seen": {"packets": 5, "bytes": 460}, "verdict": counts, "reserved": [0]})
    assert shown["verdict"] == {
        "2": {"steer": {"packets": 4, "bytes": 400}},
        "none": {"pass_not_ip": {"packets": 1, "bytes": 60}},
    }
    assert view.write(shown)["verdict"] == counts
    other_version = {"verdict": [dict(empty)]}
    assert view.read(other_version) == other_version


# --- keys --------------------------------------------------------------------------------------------------


def index_key(name: str, entries: int, names: Names = NAMES) -> IndexKey:
    parts = key_parts(name, 4, entries)
    assert parts is not None
    return IndexKey(parts, names, bank=1)


RULES = index_key("rules", lib.SLUICE_RULES_SIZE)
PORTS = index_key("ports", lib.SLUICE_PORTS_SIZE)


@given(st.integers(0, lib.SLUICE_RULES_SIZE - 1))
def test_every_index_round_trips(index: int) -> None:
    raw = index.to_bytes(4, "little")
    assert encode(RULES, decode(RULES, raw)) == raw


@pytest.mark.parametrize(
    ("key", "written", "parts"),
    [
        (PORTS, 8001, {"bank": 1, "port": 8001}),
        (PORTS, "8001", {"bank": 1, "port": 8001}),
        (PORTS, {"port": 1}, {"bank": 1, "port": 1}),
        (PORTS, "0/53", {"bank": 0, "port": 53}),
        (RULES, "turbine/staked/vote", {"bank": 1, "service": 1, "class": 1, "kind": 1}),
        (RULES, "1/staked/0", {"bank": 1, "service": 1, "class": 1, "kind": 0}),
        (RULES, "0/1/1/1", {"bank": 0, "service": 1, "class": 1, "kind": 1}),
        (index_key("lane_limits", 8), "votes", {"lane": 0}),
        (index_key("xsks", 512), "3/bulk", {"queue": 3, "lane": 1}),
        (index_key("policies", 2), 0, {"bank": 0}),
    ],
)
def test_keys_as_people_write_them(key: IndexKey, written: Any, parts: dict[str, int]) -> None:
    assert decode(key, encode(key, written)) == parts


@pytest.mark.parametrize(
    ("key", "written", "message"),
    [
        (PORTS, 65536, "allowed: 0 to 65535"),
        (PORTS, True, "True for port"),
        (PORTS, "1/2/3", "allowed: PORT"),
        (PORTS, [8001], r"\[8001\] for port"),
        (PORTS, {"bank": 2, "port": 1}, "2 for bank; allowed: 0 to 1"),
        (RULES, "vote/staked/vote", "'vote' for service"),
        (RULES, "0/staked/vote", "'vote' for kind"),  # service 0 has no kinds
        (RULES, {}, "nothing for service"),
    ],
)
def test_keys_that_are_none(key: IndexKey, written: Any, message: str) -> None:
    with pytest.raises(RangeError, match=message):
        encode(key, written)


def test_arrays_of_another_version_keep_their_plain_index() -> None:
    assert key_parts("ports", 4, 1000) is None
    assert key_parts("strangers", 16, 65536) is None
    assert [part.name for part in key_parts("counters", 4, 2) or ()] == ["cpu"]
    plain = IndexKey((), NAMES, 0)
    assert decode(plain, encode(plain, 7)) == 7


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("8001", 8001),
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("a/b/0", "a/b/0"),
        ('{"port": 1}', {"port": 1}),
        ("[1, 2]", [1, 2]),
        ('"8001"', "8001"),
        ("", ""),
        ("²", "²"),  # a digit to Unicode, no number to JSON
    ],
)
def test_keys_from_the_command_line(text: str, key: Any) -> None:
    assert parse_key(text) == key


def test_json_from_the_command_line() -> None:
    assert parse_json("[1]", "value") == [1]
    for text in ("{", "[" * 100_000, "'x'"):
        with pytest.raises(UsageError, match="the value is not JSON"):
            parse_json(text, "value")


# --- sums and danger ---------------------------------------------------------------------------------------


def test_sums() -> None:
    assert add_values([{"a": 1, "b": [1, 2]}, {"a": 2, "b": [3, 4], "c": 5}]) == {"a": 3, "b": [4, 6], "c": 5}
    with pytest.raises(SluiceError, match="can't be added up"):
        add_values(["GREEN", "RED"])
    with pytest.raises(SluiceError, match="can't be added up"):
        add_values([[1], [1, 2]])


def test_numbers_by_path() -> None:
    value = {"a": 1, "b": [{"c": 2}, 3.5], "tat_ns": 4, "name": "x", "flag": True}
    assert numbers(value) == {"a": 1, "b[0].c": 2, "b[1]": 3.5}


def test_only_what_forgets_may_be_changed() -> None:
    assert [name for name in ("strangers", "lane_limits", "prefix_limits") if danger(name)] == []
    for name in ("ports", "rules", "known", "generation", "counters", "xsks", "something else"):
        assert danger(name)


# --- texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(5, "5 ns"), (1500, "1.5 µs"), (2_500_000, "2.5 ms"), (3_200_000_000, "3.2 s"), (600e9, "10 min"),
     (7_200e9 * 3, "6 h"), (86_400e9 * 9, "9 days")],
)  # fmt: skip
def test_durations(nanoseconds: float, text: str) -> None:
    assert duration_text(nanoseconds) == text


def test_moments_limits_and_rates() -> None:
    assert moment_text(0, 10) == "never"
    assert moment_text(1_000, 2_001_000) == "2 ms ago"
    assert moment_text(2_001_000, 1_000) == "in 2 ms"
    assert limit_text({"interval_ns": 0, "burst_ns": 0}) == "-"
    assert limit_text({"interval_ns": 1_000_000, "burst_ns": 15_000_000}) == "1000/s, burst 16"
    assert [rate_text(n) for n in (0, 0.5, 42.4, 9999, 12_345, 2.5e6, 3e9)] == [
        "0/s", "0.5/s", "42/s", "9999/s", "12.3k/s", "2.5M/s", "3G/s",
    ]  # fmt: skip


def test_rows_become_a_table_or_blocks() -> None:
    rows = [
        Row({"service": 1, "class": 1}, {"lane": 1, "reserved": [0]}),
        Row({"service": 1, "class": 9}, {"lane": 0}),
    ]
    (table,) = tables(rows, NAMES)
    assert list(table.columns) == ["service", "class", "lane"]
    assert table.rows == [["turbine", "staked", "bulk"], ["turbine", "9", "votes"]]
    wide = Row({"bank": 0}, {"lane": 1, "limits": [{"interval_ns": 0, "burst_ns": 0}] * 12, "x": 7})
    (block,) = tables([wide], NAMES, title="policies")
    assert block.title == "policies bank 0"
    assert block.rows == [["lane", "bulk"], ["x", "7"]]
    (everything,) = tables([wide], NAMES, everything=True)
    assert len(everything.rows) == 14
    cpus = Row("10.0.0.1", None, [{"packets": 1}, {"packets": 2}])
    (table,) = tables([cpus], NAMES)
    assert table.rows == [["10.0.0.1", "0", "1"], ["10.0.0.1", "1", "2"]]
    assert cpus.document()["values"][1] == {"cpu": 1, "value": {"packets": 2}}
    assert key_text({"bank": 1, "service": 1}, NAMES) == "bank 1, service turbine"
    assert key_text("10.0.0.1", NAMES) == "10.0.0.1"


# --- names and the owner's state ---------------------------------------------------------------------------


def test_names_of_every_example_agree_with_the_policy() -> None:
    for path in sorted((Path(__file__).resolve().parents[2] / "docs" / "examples").glob("*.toml")):
        policy = Policy.load(path)
        names = Names.from_policy(policy)
        for number, lane in enumerate(policy.lanes):
            assert names.show("lane", number) == lane.name
        for number, service in enumerate(policy.services, start=1):
            assert names.show("service", number) == service.name
            for kind, name in enumerate(service.kind_names):
                assert names.number("kind", name, 8, number) == kind
        assert names.show("lane", 99) == "99"


def test_numbers_behind_names() -> None:
    assert NAMES.number("class", "staked", 16) == 1
    assert NAMES.number("class", "7", 16) == 7
    assert Names(lanes=("1", "0")).number("lane", "0", 8) == 1  # a name wins
    for text in ("16", "-1", "x", "²", ""):
        with pytest.raises(UsageError, match=f"no class '{text}'"):
            NAMES.number("class", text, 16)


def state(**more: Any) -> OwnerState:
    mine = start_time(os.getpid())
    assert mine is not None
    fields: dict[str, Any] = {
        "pid": os.getpid(),
        "started": mine,
        "program_id": 5,
        "interface": "eth1",
        "mode": "m",
    }
    return OwnerState(**(fields | more))


def test_state_round_trips(tmp_path: Path) -> None:
    path = state_path("eth1", 4_026_531_840, tmp_path / "sluice")
    assert path.name == "4026531840-eth1.json"
    written = state(refused=(Refusal("native", "why"),), names=NAMES, persisted=True)
    write_state(path, written)
    assert read_state(path) == written
    assert written.alive
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_recycled_process_id_is_not_the_owner() -> None:
    mine = start_time(os.getpid())
    assert mine is not None
    assert not state(started=mine + 1).alive
    assert not state(pid=2**22 + 1).alive  # above the kernel's highest
    assert start_time(2**22 + 1) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"version": 1}', b"\xff\xfe", b"[" * 100_000,
     b'{"version":1,"pid":"x","started":1,"program_id":1,"interface":"a","mode":"b"}',
     b'{"version":2,"pid":1,"started":1,"program_id":1,"interface":"a","mode":"b"}'],
)  # fmt: skip
def test_state_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    assert read_state(path) is None


def test_state_that_others_could_have_written_is_none(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert read_state(path) is None
    write_state(path, state())
    assert read_state(path) is not None
    path.chmod(0o666)
    assert read_state(path) is None
    path.chmod(0o644)
    with path.open("ab") as file:
        file.truncate(MAX_SIZE + 1)
    assert read_state(path) is None
    assert read_state(tmp_path) is None


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda one: st.lists(one) | st.dictionaries(st.text(), one)
    )
)
def test_views_never_do_worse_than_value_error(value: Any) -> None:
    for view in VIEWS.values():
        try:
            view.write(json.loads(json.dumps(value)))
        except ValueError:
            continue
    assert map_terms.NO_LANE == "none"

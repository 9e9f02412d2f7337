# SPDX-License-Identifier: Apache-2.0
"""Reading good policies: defaults, numbering, and what is written comes back."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.policy_texts import lane, peer_class, policy, rule
from xdp import policy_model
from xdp._libbpf import ffi, lib
from xdp.errors import PolicyError
from xdp.policy import Policy
from xdp.policy_model import Companion, Interface, Match, Owner, PeerEntry, Rings, StrangerPrefix
from xdp.policy_place import keys_of
from xdp.tables import compile_policy


def test_defaults_are_safe() -> None:
    read = Policy.parse(policy())
    assert read.fragments == "pass"
    assert read.stranger_prefix == StrangerPrefix(v4=24, v6=48)
    assert read.rings == Rings(rx=4096, tx=2048, frame_size=2048, quota=4096, reserve=1024)
    assert read.companion == Companion(enabled=True, budget=256)
    assert read.owner == Owner()
    assert read.interface == Interface(mode="auto", minimum_mode="portable")
    assert (read.mode, read.minimum_mode) == ("auto", "portable")
    for entry in read.lanes:
        assert (entry.rate, entry.burst, entry.over, entry.demote, entry.end) == (
            None,
            None,
            "drop",
            None,
            "socket",
        )
        assert (entry.share, entry.ring, entry.quota) == (0.02, 4096, 4096)


def test_every_lane_has_a_share_by_default_so_that_the_lowest_is_not_dead() -> None:
    lanes = "".join(f'[[lane]]\nname = "n{number}"\n' for number in range(8))
    read = Policy.parse(policy(lanes=lanes))
    assert all(entry.share > 0 for entry in read.lanes)
    assert sum(entry.share for entry in read.lanes) < 0.5


def test_lanes_take_ring_and_quota_from_rings() -> None:
    read = Policy.parse(
        policy(
            "[rings]\nrx = 512\nquota = 100\n",
            lanes='[[lane]]\nname = "a"\n[[lane]]\nname = "b"\nring = 64\n',
        )
    )
    assert [(entry.ring, entry.quota) for entry in read.lanes] == [(512, 100), (64, 100)]


def test_a_lane_that_ends_in_the_kernel_has_no_ring() -> None:
    first = Policy.parse(lane('end = "kernel"')).lanes[0]
    assert (first.end, first.ring, first.quota, first.share) == ("kernel", 0, 0, 0.0)
    assert not first.timestamps


def test_timestamps_are_wanted_lane_by_lane() -> None:
    first, second = Policy.parse(lane("timestamps = true")).lanes
    assert (first.timestamps, second.timestamps) == (True, False)


@pytest.mark.parametrize(
    ("rate", "burst"), [(1, 16), (159, 16), (160, 16), (170, 17), (100_000_000, 10_000_000)]
)
def test_burst_defaults_to_a_tenth_of_a_second(rate: int, burst: int) -> None:
    assert Policy.parse(lane(f"rate = {rate}")).lanes[0].burst == burst
    assert Policy.parse(peer_class(f"peer_rate = {rate}")).classes[1].peer_burst == burst


def test_naming_a_lane_to_demote_to_says_over_demote() -> None:
    assert Policy.parse(lane('rate = 1\ndemote = "bulk"')).lanes[0].over == "demote"


def test_default_class_is_number_0_wherever_it_stands() -> None:
    classes = '[[class]]\nname = "a"\n[[class]]\nname = "unknown"\npeer_rate = 5\n[[class]]\nname = "b"\n'
    assert Policy.parse(policy(classes=classes)).class_names == ("unknown", "a", "b")
    assert Policy.parse(policy(classes=classes)).classes[0].peer_rate == 5
    assert Policy.parse(policy('default_class = "b"', classes=classes)).class_names == ("b", "a", "unknown")
    assert Policy.parse(policy(classes="")).class_names == ("unknown",)


def test_services_are_numbered_from_1_and_kinds_too() -> None:
    read = Policy.parse(
        policy(services='[[service]]\nname="a"\nports=[1]\n[[service]]\nname="b"\nports=[2]\n')
    )
    assert read.service_names == ("-", "a", "b")
    assert read.services[0].kind_names == ("other",)
    assert Policy.parse(rule('kind = "heartbeat"\naction = "pass"')).services[0].kind_names == (
        "other",
        "heartbeat",
    )


def test_ports_are_sorted_and_ranges_filled_in() -> None:
    services = '[[service]]\nname = "a"\nports = ["8002-8004", 53, "9000", "65535-65535"]\n'
    assert Policy.parse(policy(services=services)).services[0].ports == (53, 8002, 8003, 8004, 9000, 65535)


def test_mask_defaults_to_all_ones() -> None:
    services = (
        '[[service]]\nname="a"\nports=[1]\n[[service.kind]]\nname="k"\nmatch=[{offset=3, value="0A0b"}]\n'
    )
    pattern = Policy.parse(policy(services=services)).services[0].kinds[0].match[0]
    assert pattern == Match(offset=3, mask=b"\xff\xff", value=b"\x0a\x0b")


def test_peers_are_numbered_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text(
        "# ours\n\n192.0.2.9 nine  # moved\r\n\t2001:db8::1\n198.51.100.1 a b c\n"
    )
    classes = (
        '[[class]]\nname="a"\npeers_file="more.txt"\n'
        'peers=["192.0.2.1", {address="2001:db8::2", name="two"}]\n'
        '[[class]]\nname="unknown"\npeers=["203.0.113.1"]\n'
    )
    path = tmp_path / "p.toml"
    path.write_text(policy(classes=classes))
    read = Policy.load(path)
    assert read.peers == (
        PeerEntry(id=1, address=IPv4Address("192.0.2.1"), name=""),
        PeerEntry(id=2, address=IPv6Address("2001:db8::2"), name="two"),
        PeerEntry(id=3, address=IPv4Address("192.0.2.9"), name="nine"),
        PeerEntry(id=4, address=IPv6Address("2001:db8::1"), name=""),
        PeerEntry(id=5, address=IPv4Address("198.51.100.1"), name="a b c"),
        PeerEntry(id=6, address=IPv4Address("203.0.113.1"), name=""),
    )
    assert read.class_names == ("unknown", "a")
    assert read.classes[1].peers_file == "more.txt"


def test_fifty_thousand_peers_load_and_compile(tmp_path: Path) -> None:
    lines = [f"10.{i >> 16}.{i >> 8 & 255}.{i & 255} node-{i}" for i in range(25_000)]
    lines += [f"2001:db8::{i:x} node-{i}" for i in range(25_000)]
    (tmp_path / "peers.txt").write_text("\n".join(lines))
    path = tmp_path / "p.toml"
    path.write_text(peer_class('peers_file = "peers.txt"'))
    read = Policy.load(path)
    tables = compile_policy(read)
    assert tables.known.count == len(read.peers) == tables.prefixes.count == 50_000
    assert len({bytes(ffi.buffer(tables.known.keys + index)) for index in range(50_000)}) == 50_000


def test_too_many_peers_are_counted_over_all_classes(tmp_path: Path) -> None:
    halves = []
    for half in range(2):
        path = tmp_path / f"{half}.txt"
        path.write_text("\n".join(f"2001:db8:{half}::{i >> 8:x}:{i & 255:x}" for i in range(65_537)))
        halves.append(f'[[class]]\nname = "c{half}"\npeers_file = "{path}"\n')
    with pytest.raises(
        PolicyError, match="class: 131074 peers in all classes together; allowed: at most 131072"
    ):
        Policy.parse(policy(classes="".join(halves)))


def test_prefixes_and_peers_together_fit_the_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    # The real number would take seconds to read; that the limit is the kernel's is the first line here.
    assert policy_model.MAX_PREFIXES < lib.SLUICE_MAX_PREFIXES
    monkeypatch.setattr(policy_model, "MAX_PREFIXES", 3)
    text = 'prefixes = ["10.0.0.0/8", "2001:db8::/32"]\npeers = ["192.0.2.1"%s]'
    assert len(Policy.parse(peer_class(text % "")).peers) == 1
    with pytest.raises(
        PolicyError, match="class: 4 prefixes and peers in all classes together; allowed: at most 3"
    ):
        Policy.parse(peer_class(text % ', "192.0.2.2"'))


def test_the_model_and_the_policy_are_immutable() -> None:
    read = Policy.parse(policy())
    with pytest.raises(AttributeError):
        read.fragments = "drop"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        read.lanes[0].rate = 5  # type: ignore[misc]


# Round trip: any policy that this writes is read back as what was written.

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,8}", fullmatch=True).filter(
    lambda n: n not in {"heartbeat", "other", "unknown"}
)
RATES = st.integers(1, 100_000_000)


def maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


@st.composite
def limits(draw: st.DrawFn, prefix: str) -> dict[str, Any]:
    if not draw(st.booleans()):
        return {}
    return {f"{prefix}rate": draw(RATES)} | draw(maybe(**{f"{prefix}burst": RATES}))


PREFIXES = st.one_of(
    st.builds(
        lambda n, bits: str(ip_network((n >> (32 - bits) << (32 - bits), bits))),
        st.integers(0, 2**32 - 1),
        st.integers(0, 32),
    ),
    st.builds(
        lambda n, bits: str(IPv6Network(((n | 1 << 125) >> (128 - bits) << (128 - bits), bits))),
        st.integers(0, 2**125 - 1),
        st.integers(3, 128),
    ),
)


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    lanes = draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    classes = draw(st.lists(NAMES, max_size=15, unique=True))
    prefixes = draw(st.lists(PREFIXES, max_size=20, unique=True))
    written: dict[str, Any] = {"version": 1} | draw(
        maybe(
            fragments=st.sampled_from(["pass", "drop"]),
            rings=maybe(
                rx=st.sampled_from([64, 1024, 32768]),
                frame_size=st.sampled_from([2048, 4096]),
                quota=st.integers(1, 9999),
            ),
            companion=maybe(enabled=st.booleans(), budget=st.integers(1, 65536)),
            owner=maybe(users=st.lists(st.one_of(st.just("sol"), st.integers(0, 70_000)), unique=True)),
            stranger_prefix=maybe(v4=st.integers(1, 32), v6=st.integers(1, 64)),
        )
    )
    written["lane"] = []
    for index, name in enumerate(lanes):
        entry = (
            {"name": name}
            | draw(limits(""))
            | draw(
                maybe(share=st.floats(0, 0.125), ring=st.sampled_from([64, 8192]), timestamps=st.booleans())
            )
        )
        if "rate" in entry and lanes[index + 1 :] and draw(st.booleans()):
            entry["demote"] = draw(st.sampled_from(lanes[index + 1 :]))
        written["lane"].append(entry)
    written["class"] = [
        {"name": name, "prefixes": prefixes[number :: len(classes)]}
        | draw(limits("peer_"))
        | draw(limits("prefix_"))
        for number, name in enumerate(classes)
    ]
    ports = draw(st.lists(st.integers(1, 65535), min_size=1, max_size=12, unique=True))
    services = draw(st.lists(NAMES, min_size=1, max_size=min(4, len(ports)), unique=True))
    written["service"] = [
        {
            "name": name,
            "ports": ports[number :: len(services)],
            "rule": draw(st.lists(rules(lanes, classes), max_size=5)),
        }
        for number, name in enumerate(services)
    ]
    return written


def rules(lanes: list[str], classes: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    some = (
        {"class": st.lists(st.sampled_from(classes), min_size=1, max_size=3, unique=True)} if classes else {}
    )
    plain = st.fixed_dictionaries({"action": st.sampled_from(["pass", "drop"])}, optional=some)
    into = st.fixed_dictionaries(
        {"action": st.just("lane"), "lane": st.sampled_from(lanes)},
        optional=some | {"peer_rate": RATES, "prefix_rate": RATES},
    )
    return st.one_of(plain, into)


def toml(value: Any) -> str:
    """``value`` as an inline TOML value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {toml(item)}' for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def assert_holds(read: Any, written: Any) -> None:
    """``read`` says what ``written`` said; what was not written may be anything."""
    if isinstance(written, dict):
        fields = {field.encode_name: field.name for field in msgspec.structs.fields(read)}
        for key, value in written.items():
            assert_holds(getattr(read, fields[key]), value)
    elif isinstance(written, list) and read and isinstance(read[0], IPv4Network | IPv6Network):
        assert [str(item) for item in read] == written
    elif isinstance(written, list):
        assert len(read) == len(written)
        for got, wanted in zip(read, written, strict=True):
            assert_holds(got, wanted)
    else:
        assert read == written


@given(policies())
def test_what_is_written_is_read(written: dict[str, Any]) -> None:
    text = "\n".join(f"{key} = {toml(value)}" for key, value in written.items())
    read = Policy.parse(text)
    for entry in written["service"]:
        entry["ports"].sort()
    if written["class"]:
        assert read.classes[0].name == "unknown"
    assert_holds(read.classes[1:], written.pop("class"))
    assert_holds(read, written)
    assert Policy.parse(text) == read
    compile_policy(read)


@given(st.text())
def test_any_text_is_a_policy_or_a_one_line_error(text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.parse(text, "x.toml")
    assert str(caught.value).startswith("x.toml: ")
    assert str(caught.value).isprintable()


TOML_VALUES = st.recursive(
    st.one_of(
        st.integers(),
        st.floats(),
        st.booleans(),
        st.sampled_from(["votes", "::/0", "8000-9000", "lane", "00"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["name", "ports", "match", "offset", "x"]), inner, max_size=3),
    ),
    max_leaves=5,
)


@given(st.data())
def test_any_value_anywhere_is_read_or_refused(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(keys_of(Policy)))
    model = {"lane": "lane", "class": "class", "service": "service"}
    value = data.draw(TOML_VALUES)
    text = (
        policy(f"{key} = {toml(value)}", lanes="", classes="", services="")
        if key in model
        else policy(f"{key} = {toml(value)}")
    )
    refusal = ""
    try:
        compile_policy(Policy.parse(text, "x.toml"))
    except PolicyError as error:
        refusal = str(error)
    assert not refusal or refusal.startswith("x.toml: ")
    assert not refusal or refusal.isprintable()

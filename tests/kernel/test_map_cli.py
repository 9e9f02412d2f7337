# SPDX-License-Identifier: Apache-2.0
"""`sluice map` on the real steer program, and BTF decoding beside bpftool's on maps of all shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sluice_cli.map_terms import BANK
from tests.kernel.steered import FAR, NEAR, Steered, in_namespace, namespace, udp_frame, until
from xdp import inventory
from xdp.btf import Btf
from xdp.codec import decode, encode, make_codec
from xdp.headers import kernel_source
from xdp.maps import PER_CPU_TYPES, BpfMap
from xdp.owner_state import state_path

pytestmark = [pytest.mark.root, pytest.mark.bpf]

#: Every shape that BTF can describe and bpftool can print.
SHAPES = r"""
#include <linux/types.h>
#include "abi.h"

enum colour { RED, GREEN = 7, BLUE = -3 };
typedef __u16 port_number;
struct inner { __u8 bytes[2]; port_number port; };
struct shapes {
    __u64 wide;
    __s64 signed_wide;
    __s32 signed_word;
    __s16 small;
    enum colour colour;
    struct inner inner[2];
    union { __u32 word; __u8 octets[4]; } both;
    struct { __u16 merged_first; __u16 merged_second; };
    __u32 grid[2][3];
    unsigned int low : 3;
    unsigned int middle : 9;
    unsigned int high : 20;
};
BPF_TABLE("array", u32, struct shapes, shapes, 4);
BPF_TABLE("hash", struct inner, struct shapes, by_struct, 16);
BPF_PERCPU_ARRAY(per_cpu, struct shapes, 2);
BPF_TABLE("lru_hash", struct sluice_address, struct sluice_peer, addresses, 16);
BPF_F_TABLE("lpm_trie", struct sluice_prefix, struct sluice_prefix_class, prefixes, 16, BPF_F_NO_PREALLOC);
int pass(struct xdp_md *ctx) {
    u32 zero = 0;
    struct inner key = {};
    struct sluice_address address = {};
    struct sluice_prefix prefix = {};
    shapes.lookup(&zero); per_cpu.lookup(&zero); by_struct.lookup(&key);
    addresses.lookup(&address); prefixes.lookup(&prefix);
    return XDP_PASS;
}
"""


@pytest.fixture(scope="module")
def shapes() -> Iterator[dict[str, BpfMap]]:
    """Maps made by bcc, filled with bytes from 0 up."""
    os.environ["BCC_KERNEL_SOURCE"] = str(kernel_source())
    from bcc import BPF

    include = Path(__file__).resolve().parents[2] / "bpf" / "include"
    # bytes for text and names: this bcc warns of anything else
    module = BPF(text=SHAPES.encode(), cflags=[f"-I{include}"])
    module.load_func(b"pass", BPF.XDP)
    names = ("shapes", "by_struct", "per_cpu", "addresses", "prefixes")
    maps = {name: BpfMap(os.dup(module[name.encode()].map_fd)) for name in names}
    for one in maps.values():
        for number in range(2):
            key = bytes((number + i) % 256 for i in range(one.info.key_size))
            if one.info.type in PER_CPU_TYPES or one.info.name == "shapes":
                key = number.to_bytes(4, "little")
            if one.info.name == "prefixes":
                key = (32 + number).to_bytes(4, "little") + key[4:]
            one.update(key, bytes((number * 31 + i * 7) % 256 for i in range(one.entry_size)))
    yield maps
    for one in maps.values():
        one.close()
    module.cleanup()


def from_bpftool(map_id: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["bpftool", "-j", "map", "dump", "id", str(map_id)], capture_output=True, check=True
    )
    return list(json.loads(done.stdout))


def plain(value: Any) -> Any:
    """bpftool writes bit fields as hexadecimal text."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return int(value, 16) if isinstance(value, str) and value.startswith("0x") else value


@pytest.mark.parametrize("name", ["shapes", "by_struct", "per_cpu", "addresses", "prefixes"])
def test_values_are_those_that_bpftool_prints(shapes: dict[str, BpfMap], name: str) -> None:
    one = shapes[name]
    btf = Btf.parse(inventory.btf_blob(one.info.btf_id))
    key_codec = make_codec(btf, one.info.btf_key_type_id)
    value_codec = make_codec(btf, one.info.btf_value_type_id)
    ours = {}
    step = -(-one.info.value_size // 8) * 8
    for raw_key, raw in one.items():
        parts = [raw[i : i + one.info.value_size] for i in range(0, len(raw), step)]
        ours[raw_key] = (decode(key_codec, raw_key), [decode(value_codec, part) for part in parts])
        assert encode(key_codec, ours[raw_key][0]) == raw_key
        for part, value in zip(parts, ours[raw_key][1], strict=True):
            assert encode(value_codec, value, base=part) == part
    rows = from_bpftool(one.info.id)
    assert len(rows) == len(ours) >= 2
    for row in rows:
        key, values = ours[bytes(int(octet, 16) for octet in row["key"])]
        formatted = row["formatted"]
        assert plain(formatted["key"]) == merge_plain(key)
        theirs = (
            [one["value"] for one in formatted["values"]] if "values" in formatted else [formatted["value"]]
        )
        assert [flat(plain(value)) for value in theirs] == [flat(merge_plain(value)) for value in values]


def merge_plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def flat(value: Any) -> Any:
    """bpftool nests anonymous members under an empty or placeholder name; the leaves are the same."""
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for name, one in value.items():
        found |= flat(one) if name in ("", "(anon)") and isinstance(one, dict) else {name: flat(one)}
    return found


# --- the steer program -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    """The program with a policy, after some packets, without the policy's names."""
    with namespace(tmp_path_factory.mktemp("map")) as made:
        made.hold()
        send_some(made)
        yield made


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    """The same with an owner that left its state."""
    with namespace(tmp_path_factory.mktemp("named")) as made:
        made.hold(state=state_path(NEAR, in_namespace(made.name, inventory.namespace_inode)))
        send_some(made)
        yield made


def send_some(made: Steered) -> None:
    frames = [udp_frame("10.1.2.3", 8001)] * 5 + [udp_frame("203.0.113.9", 8001)] * 3
    frames += [udp_frame("192.0.2.8", 8003, b"x")] * 2 + [udp_frame("198.51.100.3", 8001)]
    made.send(frames)
    until(lambda: counted(made) == len(frames), "all packets counted")


def counted(made: Steered) -> int:
    document = made.json("map", "dump", "counters")
    return sum(row["value"]["seen"]["packets"] for row in document["rows"])


def test_list_and_show(steered: Steered) -> None:
    document = steered.json("map", "list")
    by_name = {one["name"]: one for one in document["maps"]}
    assert by_name["ports"]["max_entries"] == 131_072
    assert by_name["strangers"]["type"] == "set-associative"
    assert by_name["known"]["memory"] > 1 << 20
    assert all(one["btf_id"] for name, one in by_name.items() if name != "xsks")
    assert steered.json("map", "show", "strangers")["map"]["entries"] == 3
    assert steered.json("map", "show", "strangers")["map"]["may_be_changed"] is True
    assert "policy" in steered.json("map", "show", "rules")["map"]["why_not"]
    text = steered.sluice("map", "list").stdout
    assert text.splitlines()[0].split() == ["name", "id", "type", "key", "value", "room", "memory"]


def test_ports_show_what_is_ours(steered: Steered) -> None:
    document = steered.json("map", "dump", "ports")
    assert [row["key"]["port"] for row in document["rows"]] == [8001, 8003, 8004]
    assert {row["key"][BANK] for row in document["rows"]} == {document["active_bank"]}
    assert all(row["value"] == {"service": 1, "patterns": 1} for row in document["rows"])
    assert document["hidden"] == 131_072 - 3
    everything = steered.json("map", "dump", "ports", "--all")
    assert len(everything["rows"]) == 131_072
    assert everything["hidden"] == 0


def test_addresses_prefixes_and_peers(steered: Steered) -> None:
    strangers = {row["key"]: row["value"] for row in steered.json("map", "dump", "strangers")["rows"]}
    assert {address: one["packets"] for address, one in strangers.items()} == {
        "10.1.2.3": 5, "203.0.113.9": 3, "198.51.100.3": 1,
    }  # fmt: skip
    assert strangers["10.1.2.3"]["class"] == 1
    assert strangers["198.51.100.3"]["drops"] == 1
    bank = steered.json("map", "dump", "generation")["rows"][0]["value"]["number"] % 2
    prefixes = {
        row["key"]: row["value"]["class_id"]
        for row in steered.json("map", "dump", f"prefixes_{bank}")["rows"]
    }
    assert prefixes == {
        "10.1.0.0/16": 1, "2001:db8::/32": 1, "192.0.2.7/32": 1, "192.0.2.8/32": 1, "198.51.100.0/24": 2,
    }  # fmt: skip


def test_one_entry_by_its_own_words(steered: Steered) -> None:
    assert steered.json("map", "get", "known", "192.0.2.8")["value"]["packets"] == 2
    assert steered.json("map", "get", "ports", "8001")["value"]["service"] == 1
    bank = steered.json("map", "get", "ports", "8001")["active_bank"]
    other = json.dumps({BANK: 1 - bank, "port": 8001})
    assert steered.json("map", "get", "ports", other)["value"]["service"] == 0
    assert steered.json("map", "get", "rules", "1/1/1")["value"]["action"] == "lane"
    assert steered.json("map", "get", "rules", "1/2/0")["value"]["action"] == "deny"
    assert (
        steered.json("map", "get", "policies", str(bank))["value"]["lane"][1]["limit"]["interval_ns"]
        == 1_000_000
    )
    assert steered.json("map", "get", "counters", "0")["value"]["seen"]["packets"] == 11
    assert steered.json("map", "get", "prefixes_0" if bank == 0 else "prefixes_1", "10.1.0.0/16")[
        "value"
    ] == {"class_id": 1}


def test_counters_add_up_over_cpus(steered: Steered) -> None:
    total = steered.json("map", "dump", "counters")["rows"][0]["value"]
    assert total["verdict"]["0"]["pass_no_socket"]["packets"] == 5
    assert total["verdict"]["none"] == {
        "drop_denied": {"packets": 1, "bytes": 50},
        "drop_policy": {"packets": 3, "bytes": 150},
    }
    rows = steered.json("map", "dump", "counters", "--per-cpu", "--all")["rows"]
    assert len(rows) == os.cpu_count()
    assert [row["key"]["cpu"] for row in rows] == list(range(len(rows)))
    assert sum(row["value"]["seen"]["packets"] for row in rows) == total["seen"]["packets"] == 11


def test_names_of_the_policy_where_the_owner_left_them(named: Steered, steered: Steered) -> None:
    text = named.sluice("map", "dump", "rules").stdout
    assert any(
        line.split()[1:6] == ["turbine", "staked", "vote", "lane", "votes"] for line in text.splitlines()
    )
    assert named.json("map", "get", "rules", "turbine/staked/vote")["key"] == {
        BANK: 1, "service": 1, "class": 1, "kind": 1,
    }  # fmt: skip
    assert named.json("map", "dump", "rules")["names"]["lanes"] == ["votes", "bulk"]
    bare = steered.sluice("map", "dump", "rules").stdout
    assert any(line.split()[1:6] == ["1", "1", "1", "lane", "0"] for line in bare.splitlines())
    assert "names" not in steered.json("map", "dump", "rules")


def test_what_is_dangerous_is_refused(steered: Steered) -> None:
    before = steered.json("map", "dump", "ports")["rows"]
    for name, key, value in (
        ("ports", "8001", '{"service": 0}'),
        ("generation", "0", '{"number": 9}'),
        ("known", "192.0.2.8", '{"id": 0}'),
        ("counters", '{"cpu": 0}', "{}"),
    ):
        done = steered.sluice("map", "set", name, key, value)
        assert done.returncode == 2
        assert done.stderr.startswith(f"sluice: error: not changing {name}: ")
        assert "--force" in done.stderr
    assert steered.sluice("map", "delete", "known", "192.0.2.8").returncode == 2
    assert steered.json("map", "dump", "ports")["rows"] == before


def test_force_writes_and_the_program_follows(steered: Steered) -> None:
    assert steered.json("map", "set", "ports", "9000", '{"service": 1}', "--force")["value"] == {
        "service": 1, "patterns": 0,
    }  # fmt: skip
    before = denied(steered)
    steered.send([udp_frame("198.51.100.3", 9000)])
    until(lambda: denied(steered) == before + 1, "the packet for the new port denied")
    # what is left out keeps its value
    assert steered.json("map", "set", "ports", "9000", '{"patterns": 0}', "--force")["value"]["service"] == 1
    steered.json("map", "set", "ports", "9000", '{"service": 0}', "--force")


def denied(made: Steered) -> int:
    value = made.json("map", "dump", "counters")["rows"][0]["value"]
    return int(value["verdict"]["none"]["drop_denied"]["packets"])


def test_limits_and_strangers_may_be_reset(steered: Steered) -> None:
    assert steered.json("map", "set", "lane_limits", "1", '{"tat_ns": 5}')["value"] == {"tat_ns": 5}
    assert steered.json("map", "get", "lane_limits", "1")["value"] == {"tat_ns": 5}
    frame = udp_frame("192.0.2.99", 8001)
    steered.send([frame])
    until(lambda: steered.sluice("map", "get", "strangers", "192.0.2.99").returncode == 0, "a stranger more")
    steered.json("map", "set", "strangers", "192.0.2.99", '{"class": 2, "generation": 1, "packets": 7}')
    entry = steered.json("map", "get", "strangers", "192.0.2.99")["value"]
    assert (entry["class"], entry["generation"], entry["packets"], entry["bytes"]) == (2, 1, 7, len(frame))
    assert steered.json("map", "delete", "strangers", "192.0.2.99")["deleted"] == "192.0.2.99"
    assert steered.sluice("map", "delete", "strangers", "192.0.2.99").returncode == 7
    done = steered.sluice("map", "set", "strangers", "192.0.2.99", '{"packets": 0}')
    assert done.returncode == 7
    assert "only the program adds one" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["get", "nothing", "1"], 2, "no map 'nothing'"),
        (["get", "known", "10.9.9.9"], 7, "no entry '10.9.9.9' in known"),
        (["get", "known", "no address"], 2, "allowed: an IPv4 or IPv6 address"),
        (["get", "ports", "65536"], 2, "65536 for port; allowed: 0 to 65535"),
        (["get", "ports", "http"], 2, "'http' for port; allowed: 0 to 65535"),
        (["get", "rules", "1/2"], 2, "allowed: SERVICE/CLASS/KIND"),
        (["get", "rules", "1/99/0"], 2, "for class; allowed: 0 to 15"),
        (["get", "ports", '{"bank": 0}'], 2, "nothing for port"),
        (["get", "ports", '{"prot": 1}'], 2, "no part 'prot'"),
        (["get", "ports", "{"], 2, "the key is not JSON"),
        (["get", "prefixes_0", "10.0.0.1/8"], 2, "has host bits set"),
        (["set", "lane_limits", "0", "{"], 2, "the value is not JSON"),
        (["set", "lane_limits", "0", '{"tat_ns": -1}'], 2, "value.tat_ns: -1 does not fit"),
        (["set", "lane_limits", "0", '{"tat": 1}'], 2, "no member 'tat'; allowed: tat_ns"),
        (["set", "strangers", "10.0.0.1", '{"class": 1}'], 2, "class and generation together"),
        (["delete", "lane_limits", "0"], 5, "is an array"),
        (["dump", "xsks"], 5, "the kernel doesn't show"),
        (["watch", "ports", "--interval", "0"], 2, "invalid value for '--interval'"),
    ],
)
def test_wrong_arguments(steered: Steered, words: list[str], code: int, message: str) -> None:
    done = steered.sluice("map", *words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr.splitlines()[0]
    assert done.stderr.startswith("sluice: error: ")
    document = json.loads(steered.sluice("map", *words, "--json").stdout)
    assert document["error"]["exit_code"] == code


def test_watch_shows_rates(steered: Steered) -> None:
    done = steered.sluice("map", "watch", "counters", "--interval", "0.05", "--count", "2", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["version"] for line in lines] == [1, 1]
    assert all(line["rows"] == [] for line in lines)  # nobody sends
    words = [sys.executable, "-m", "sluice_cli", "map", "watch", "counters", "--interval", "0.1", "--json"]
    watch = subprocess.Popen(
        steered.command(*words), stdout=subprocess.PIPE, text=True, env=steered.environment()
    )
    steered.processes.append(watch)
    assert watch.stdout is not None
    try:
        seen = None
        for line in watch.stdout:
            steered.send([udp_frame("10.1.2.3", 8001)] * 20)
            rows = json.loads(line)["rows"]
            if rows:
                seen = rows[0]["per_second"]
                break
        assert seen is not None
        assert seen["seen.packets"] > 0
        assert seen["seen.bytes"] == pytest.approx(seen["seen.packets"] * 50)
        assert not any(name.endswith("_ns") for name in seen)
    finally:
        steered.stop(watch)


def test_interfaces_to_choose_from(tmp_path: Path) -> None:
    with namespace(tmp_path) as made:
        assert made.sluice("map", "list").returncode == 7
        made.hold()
        made.hold(interface=FAR, mode="generic")
        done = made.sluice("map", "list")
        assert done.returncode == 2
        assert f"Sluice runs on {FAR}, {NEAR}" in done.stderr
        assert made.json("map", "list", "-i", FAR)["interface"] == FAR
        assert made.json("map", "list", "--interface", NEAR)["interface"] == NEAR

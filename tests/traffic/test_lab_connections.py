# SPDX-License-Identifier: Apache-2.0
"""`sluice lab connections`: a pool whose network and peers fail.

What became of connections is judged, not how fast a busy machine was.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from sluice_cli.lab_connections import USERS, VICTIMS
from tests.traffic.commands import interrupt, killed, refused, run

pytestmark = [pytest.mark.root, pytest.mark.bpf]

FEW = ("--quick", "--udp", "30", "--quic", "1")
PEERS = 30 + sum(VICTIMS.values())


def lab(*words: str) -> dict[str, Any]:
    """The document; on a busy machine thresholds may be missed, and the exit code says so."""
    done = run("lab", "connections", *FEW, *words, "--json")
    assert done.stderr == ""
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["version"] == 1
    assert done.returncode == (0 if document["ok"] else 1)
    for trial in document["trials"]:
        assert trial["ok"] == all(one["holds"] for one in trial["thresholds"])
    assert document["ok"] == all(trial["ok"] for trial in document["trials"])
    return document


def all_back(trial: dict[str, Any]) -> None:
    """Every connection carried a message again, and none of QUIC's had to be made anew."""
    udp, quic = trial["kinds"]["udp"], trial["kinds"]["quic"]
    assert (udp["connections"], udp["back"]) == (PEERS, PEERS), trial
    assert (quic["connections"], quic["back"], quic["reconnected"]) == (1, 1, 0), trial
    assert 0 < udp["p50"] <= udp["p99"] <= udp["max"]


@pytest.mark.slow
def test_over_af_xdp() -> None:
    document = lab("--trial", "cut", "--trial", "blackhole", "--trial", "flood", "--trial", "spoil",
                   "--trial", "kill")  # fmt: skip
    assert document["mode"] == "native-copy"
    cut, blackhole, flood, spoil, kill = document["trials"]
    all_back(cut)
    all_back(blackhole)
    all_back(flood)
    assert flood["kinds"]["udp"]["reconnected"] == flood["lost"] == 0, "strangers end no connection"
    assert flood["flood"]["sent"] > 10_000
    assert 0 <= flood["flood"]["refused"] <= flood["flood"]["sent"]
    assert flood["flood"]["rounds"] > 0
    all_back(spoil)
    assert spoil["kinds"]["udp"]["reconnected"] == spoil["lost"] == 0, "what is spoilt ends no connection"
    assert spoil["spoil"]["dropped"] > 0 < spoil["spoil"]["changed"]
    # A message of UDP has no more protection than the checksum, which the network has made right again.
    assert spoil["spoil"]["wrong"]["udp"] > 0 == spoil["spoil"]["wrong"]["quic"]
    assert cut["seconds"] > 2
    assert cut["netlink_late"] < 5
    assert blackhole["lost"] == cut["lost"] == 0, "two seconds are no reason to give a connection up"
    assert kill["failover"]["users"] == kill["failover"]["served"] == USERS
    assert document["asked"] > document["probes"] > PEERS


@pytest.mark.slow
def test_over_kernel_sockets() -> None:
    document = lab("--mode", "mmsg", "--trial", "arp", "--trial", "move", "--trial", "die")
    assert document["mode"] == "mmsg"
    arp, move, die = document["trials"]
    all_back(arp)
    all_back(move)
    assert die["death"]["peers"] == die["death"]["known"] == VICTIMS["die"]


@pytest.mark.slow
def test_over_ipv6() -> None:
    document = lab("--ipv6", "--trial", "cut", "--trial", "arp", "--trial", "move", "--trial", "spoil")
    assert document["ip"] == 6
    for trial in document["trials"]:
        all_back(trial)


@pytest.mark.slow
def test_a_peer_that_hangs_is_passed_over() -> None:
    document = lab("--mode", "mmsg", "--quic", "0", "--trial", "hang")
    (hang,) = document["trials"]
    assert hang["failover"]["served"] == USERS
    assert document["quic"] == 0


def test_interrupted() -> None:
    interrupt("lab", "connections", *FEW, "--json", whom="terminal", when="program")


def test_killed() -> None:
    killed("lab", "connections", *FEW, "--json")


def test_without_privileges() -> None:
    assert refused("lab", "connections", nobody=True)[0] == 4


def test_what_cannot_be_had_is_refused() -> None:
    code, error = refused("lab", "connections", *FEW, "--mode", "native-zero-copy")
    assert code == 5  # UnsupportedError: a veth has none
    assert "zero-copy" in error["message"]

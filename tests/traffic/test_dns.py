# SPDX-License-Identifier: Apache-2.0
"""`sluice lab dns`: with Sluice every question of the known resolver is answered, whatever the flood."""

from __future__ import annotations

import json
import shutil

import pytest

from sluice_cli import lab_dns
from sluice_cli.lab import Lab
from sluice_cli.lab_dns import STAMP, ZONE, Answers, query
from sluice_cli.output import Output
from sluice_cli.traffic import STAMP_BYTES
from tests.traffic.commands import interrupt, refused, report

pytestmark = [pytest.mark.root, pytest.mark.bpf]

#: Debian's package nsd, which the launcher installs for the tests.
SERVER = shutil.which("nsd", path="/usr/sbin:/usr/bin:/sbin:/bin")
KEYS = {"sluice", "queries", "answered", "lost", "flood", "flood_per_second", "refused"}


def test_query_is_a_query() -> None:
    """As another implementation reads it (RFC 1035); the stamp has a label of its own."""
    from scapy.layers.dns import DNS

    read = DNS(query())
    assert (read.qr, read.qdcount, read.ancount) == (0, 1, 0)
    name = read.qd[0].qname
    assert name.startswith(b"qq.")
    assert name.endswith(f".{ZONE}.".encode())
    assert read.qd[0].qtype == 1
    assert query()[STAMP - 1] == STAMP_BYTES
    assert query()[STAMP : STAMP + STAMP_BYTES] == bytes(STAMP_BYTES)


@pytest.mark.skipif(SERVER is None, reason="needs nsd (apt-get install nsd)")
class TestFlood:
    def test_with_and_without(self) -> None:
        document = report("lab", "dns", "--seconds", "1.5")
        without, protected = document["runs"]
        for run in (without, protected):
            assert set(run) == KEYS
            assert run["queries"] > 0
            assert run["flood"] > 0
            assert run["flood_per_second"] > 0
            assert run["lost"] == run["queries"] - run["answered"] >= 0
        assert (without["sluice"], protected["sluice"]) == (False, True)
        assert protected["lost"] == 0
        assert document["ok"] is True

    def test_the_neighbour_table_is_not_filled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All namespaces of the machine share its places: looking for each stranger stops others."""
        entries: list[dict[str, object]] = []
        made: list[Lab] = []

        class Watched(Answers):
            def __init__(self, lab: Lab) -> None:
                made.append(lab)
                super().__init__(lab)

            def settle(self) -> None:
                super().settle()
                entries.extend(json.loads(made[0].server.run(["ip", "-4", "-j", "neigh", "show"]).stdout))

        monkeypatch.setattr(lab_dns, "Answers", Watched)
        done = lab_dns.run_once(Output(), sluice=False, seconds=1.0, flood=50_000)
        assert done.flood > 10_000
        assert [entry["dst"] for entry in entries] == [str(made[0].client.ipv4)]

    def test_interrupted(self) -> None:
        interrupt(
            "lab", "dns", "--only", "with", "--seconds", "60", "--json", whom="terminal", when="program"
        )


def test_options_out_of_range() -> None:
    assert refused("lab", "dns", "--seconds", "0")[0] == 2
    assert refused("lab", "dns", "--only", "sometimes")[0] == 2


def test_without_privileges() -> None:
    assert refused("lab", "dns", nobody=True)[0] == 4

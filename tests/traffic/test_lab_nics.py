# SPDX-License-Identifier: Apache-2.0
"""Labs of network cards, as far as a machine without idle ones can show; `sluice lab vm` shows the rest."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sluice_cli import lab_nics, vm_machine
from sluice_cli.lab import Lab
from xdp.errors import BusyError, UnsupportedError, UsageError

pytestmark = [pytest.mark.root]


def namespace() -> str:
    return str(Path("/proc/thread-self/ns/net").readlink())


@pytest.mark.parametrize("text", ["one", "a,", "a,a", "a,b,c", ","])
def test_two_names_are_wanted(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lab_nics.VARIABLE, text)
    with pytest.raises(UsageError, match="SLUICE_LAB_NICS is"):
        Lab()


def test_named_cards_become_the_hosts_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lab_nics.VARIABLE, "eth7, eth8")
    made = Lab("cards")
    assert (made.server.interface, made.client.interface) == ("eth7", "eth8")


def test_a_card_that_is_not_there(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lab_nics.VARIABLE, "none7,none8")
    cards = Lab()
    with pytest.raises(UsageError, match="no interface 'none7'"):
        cards.up()
    assert not cards.server.path.exists()


def test_one_in_use_is_not_taken(lab: Lab) -> None:
    """Whoever names the interface that a machine is reached by has made a mistake."""
    with lab.server.path.open("rb") as there, lab.client.enter():
        for what in ("up", "down"):  # an address alone is reason enough
            subprocess.run(["ip", "link", "set", lab.client.interface, what], check=True)
            with pytest.raises(BusyError, match="is up or has an address"):
                lab_nics.borrow(lab.client.interface, there.fileno(), 1, 1500)
        subprocess.run(["ip", "address", "flush", "dev", lab.client.interface], check=True)
        with pytest.raises(UnsupportedError, match="can't have 7 queues"):
            lab_nics.borrow(lab.client.interface, there.fileno(), 7, 1500)


def test_a_machines_network_is_its_own() -> None:
    """Bridge and taps are seen by what is started there, and gone with it."""
    home = namespace()
    with vm_machine._own_network("virtio"):
        inside = namespace()
        assert inside != home
        child = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True)
        names = {line.split()[0] for line in child.stdout.splitlines()}
        assert names == {"lo", "bridge0", "tap0", "tap1"}
    assert namespace() == home
    known = subprocess.run(
        ["lsns", "-t", "net", "-n", "-o", "NS"], capture_output=True, text=True, check=True
    )
    assert inside.strip("net:[]") not in known.stdout.split()

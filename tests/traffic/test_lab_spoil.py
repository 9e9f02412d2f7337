# SPDX-License-Identifier: Apache-2.0
"""An interface that loses and changes datagrams, in both directions, and counts what it did."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from sluice_cli.lab import Lab
from sluice_cli.lab_spoil import Spoiler, Spoilt
from xdp.errors import UsageError

pytestmark = [pytest.mark.root, pytest.mark.bpf]

PORT = 5000
COUNT = 100
PAYLOAD = bytes(41)  # an odd length: its last byte has no pair


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


def carry(lab: Lab, version: int, *, to_client: bool) -> list[bytes]:
    """What arrives of COUNT datagrams; one without a payload, which nothing is done to, ends them."""
    source, target = (lab.server, lab.client) if to_client else (lab.client, lab.server)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    address = str(target.ipv4 if version == 4 else target.ipv6)
    with target.enter():
        receiver = socket.socket(family, socket.SOCK_DGRAM)
    with source.enter():
        sender = socket.socket(family, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.settimeout(60)
        receiver.bind((address, PORT))
        for _ in range(COUNT):
            sender.sendto(PAYLOAD, (address, PORT))
        sender.sendto(b"", (address, PORT))
        return list(iter(lambda: receiver.recv(100), b""))


@pytest.mark.parametrize("to_client", [True, False])
@pytest.mark.parametrize("version", [4, 6])
def test_datagrams_are_changed(lab: Lab, version: int, to_client: bool) -> None:
    """All of them, in one pair of bytes; the checksum is right, or the kernel would drop them."""
    with Spoiler(lab.client, drop=0.0, change=1.0) as spoiler:
        found = carry(lab, version, to_client=to_client)
    assert len(found) == COUNT
    for payload in found:
        places = [place for place, byte in enumerate(payload) if byte]
        assert len(payload) == len(PAYLOAD)
        assert places
        assert len({place // 2 for place in places}) == 1
    assert spoiler.counts() == Spoilt(COUNT, 0, COUNT)
    assert len({bytes(payload) for payload in found}) > COUNT // 2


def test_datagrams_are_lost(lab: Lab) -> None:
    with Spoiler(lab.client, drop=1.0, change=1.0) as spoiler:
        assert carry(lab, 4, to_client=True) == []
    assert spoiler.counts() == Spoilt(COUNT, COUNT, 0)


def test_a_part_of_them(lab: Lab) -> None:
    """Half are lost, half of the others changed: 100 of 100 never are, by chance once in 2**100."""
    with Spoiler(lab.client, drop=0.5, change=0.5) as spoiler:
        found = carry(lab, 4, to_client=False)
        counts = spoiler.counts()
    assert counts.seen == COUNT
    assert len(found) == COUNT - counts.dropped
    assert sum(payload != PAYLOAD for payload in found) == counts.changed
    assert 0 < counts.dropped < COUNT
    assert 0 < counts.changed < COUNT - counts.dropped


def test_it_leaves_nothing_behind(lab: Lab) -> None:
    spoiler = Spoiler(lab.client, drop=0.0, change=1.0)
    assert "clsact" in lab.client.run(["tc", "qdisc", "show", "dev", lab.client.interface]).stdout
    spoiler.close()
    spoiler.close()
    assert "clsact" not in lab.client.run(["tc", "qdisc", "show", "dev", lab.client.interface]).stdout
    assert carry(lab, 4, to_client=True) == [PAYLOAD] * COUNT
    assert spoiler.counts() == Spoilt(0, 0, 0)


@pytest.mark.parametrize("part", [-0.1, 1.1, float("nan")])
def test_parts_out_of_range(lab: Lab, part: float) -> None:
    with pytest.raises(UsageError, match="change is a part"):
        Spoiler(lab.client, drop=0.0, change=part)

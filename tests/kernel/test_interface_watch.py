# SPDX-License-Identifier: Apache-2.0
"""The watch on an interface: deleted, made again, renamed, down and up, and too many messages."""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Iterator

import pytest

from sluice_cli.lab import Lab
from xdp.errors import UsageError
from xdp.watch import Change, InterfaceWatch, interface_index, is_up

pytestmark = pytest.mark.root

SECONDS = 60.0


class Watched:
    """An interface ``w0`` of the server's namespace, and what is told about it."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._numbers = itertools.count()
        self.add("w0")
        self.alive = True
        self.watch = InterfaceWatch("w0", lambda: self.alive)

    def ip(self, *words: str) -> None:
        self._lab.server.run(["ip", *words])

    def add(self, name: str, *options: str) -> None:
        self.ip("link", "add", name, *options, "type", "veth", "peer", "name", f"peer{next(self._numbers)}")

    def told(self) -> list[str]:
        """Waits until netlink has something, and for the changes that it is about."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if select.select([self.watch], [], [], SECONDS)[0]:
                changes = self.watch.poll()
                if changes:
                    return [change.state for change in changes]
        return []


@pytest.fixture
def watched(lab: Lab) -> Iterator[Watched]:
    with lab.server.enter():
        made = Watched(lab)
        yield made
        made.watch.close()


def test_up_and_down(watched: Watched) -> None:
    assert not watched.watch.up
    watched.ip("link", "set", "w0", "up")
    assert watched.told() == ["up"]
    assert is_up("w0")
    watched.ip("link", "set", "w0", "down")
    assert watched.told() == ["down"]
    assert watched.watch.poll() == []


def test_renamed(watched: Watched) -> None:
    index = watched.watch.ifindex
    watched.ip("link", "set", "w0", "name", "w1")
    assert watched.told() == ["renamed"]
    assert (watched.watch.interface, watched.watch.ifindex) == ("w1", index)
    watched.add("w0")
    assert watched.watch.poll() == [], "another interface has the old name"


def test_deleted_and_made_again(watched: Watched) -> None:
    before = watched.watch.ifindex
    watched.ip("link", "del", "w0")
    assert watched.told() == ["gone"]
    assert not watched.watch.present
    watched.add("other")
    assert watched.watch.poll() == []
    watched.add("w0")
    assert watched.told() == ["back"]
    assert watched.watch.ifindex == interface_index("w0") != before


def test_deleted_and_made_again_between_two_looks(watched: Watched) -> None:
    watched.ip("link", "del", "w0")
    watched.add("w0")
    assert watched.told() == ["gone", "back"]


def test_the_same_index_is_not_the_same_interface(watched: Watched) -> None:
    """Whoever holds a link on it knows better than the index."""
    index = watched.watch.ifindex
    watched.ip("link", "del", "w0")
    watched.alive = False
    watched.add("w0", "index", str(index))
    assert watched.told() == ["gone", "back"]


def test_moved_to_another_namespace(watched: Watched, lab: Lab) -> None:
    watched.ip("link", "set", "w0", "netns", lab.client.namespace)
    assert watched.told() == ["gone"]


def test_more_messages_than_fit(watched: Watched) -> None:
    """What is lost in an overrun does not matter: the last state is what is told."""
    script = "".join(f"link set w0 mtu {1300 + i % 2}\n" for i in range(6000))
    watched._lab.server.run(["ip", "-batch", "-"], input=script + "link del w0\n")
    assert watched.watch.poll() == [Change("gone", "w0", watched.watch.ifindex)]


def test_no_such_interface(lab: Lab) -> None:
    with lab.server.enter(), pytest.raises(UsageError, match="no interface 'w9'"):
        InterfaceWatch("w9")
    with pytest.raises(UsageError):
        interface_index("a\0b")

# SPDX-License-Identifier: Apache-2.0
"""Waiting for sockets, and a descriptor that says that something is queued.

On Linux epoll and an eventfd, elsewhere kqueue or poll (:mod:`selectors`) and a pipe.
"""

from __future__ import annotations

import os
import select
import selectors
import sys
from typing import Protocol

from xdp.errors import UnsupportedError


class HasDescriptor(Protocol):
    """A socket, or a :class:`Flag`."""

    def fileno(self) -> int:
        """The descriptor."""


class Flag:
    """A descriptor that is readable while the flag is up."""

    def __init__(self) -> None:
        self._pair: tuple[int, int]
        if sys.platform == "linux":
            both = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._pair = both, both
        else:
            self._pair = os.pipe()
            for end in self._pair:
                os.set_blocking(end, False)

    def fileno(self) -> int:
        """For a poller."""
        return self._pair[0]

    def raise_up(self) -> None:
        """Only when it is down."""
        os.write(self._pair[1], (1).to_bytes(8, sys.byteorder))  # what an eventfd wants

    def take_down(self) -> None:
        """Only when it is up."""
        os.read(self._pair[0], 8)

    def close(self) -> None:
        """Once."""
        for descriptor in set(self._pair):
            os.close(descriptor)


class EpollPoller:
    """Level-triggered, as both are."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        #: of the last poll, those with an error to be read (POLLERR)
        self.erred: list[int] = []

    def add(self, one: HasDescriptor) -> None:
        """Wait for it too."""
        self._epoll.register(one.fileno(), select.EPOLLIN)

    def poll(self, seconds: float) -> list[int]:
        """Descriptors that are readable, waiting for the first."""
        found = self._epoll.poll(seconds)
        self.erred = [descriptor for descriptor, events in found if events & select.EPOLLERR]
        return [descriptor for descriptor, _ in found]

    def fileno(self) -> int:
        """Readable while ``poll`` would return at once."""
        return self._epoll.fileno()

    def close(self) -> None:
        """May be called again."""
        self._epoll.close()


class SelectorPoller:
    """The same with what :mod:`selectors` finds here."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        #: empty: there are no queues of errors
        self.erred: list[int] = []

    def add(self, one: HasDescriptor) -> None:
        """As EpollPoller.add."""
        self._selector.register(one.fileno(), selectors.EVENT_READ)

    def poll(self, seconds: float) -> list[int]:
        """As EpollPoller.poll."""
        return [key.fd for key, _ in self._selector.select(seconds)]

    def fileno(self) -> int:
        """As EpollPoller.fileno; poll and select have none, kqueue has."""
        if not hasattr(self._selector, "fileno"):
            raise UnsupportedError("this system's way of waiting has no descriptor for an event loop")
        found: int = self._selector.fileno()
        return found

    def close(self) -> None:
        """As EpollPoller.close."""
        self._selector.close()


Poller = EpollPoller | SelectorPoller


def make_poller() -> Poller:
    """What this system has."""
    return EpollPoller() if sys.platform == "linux" else SelectorPoller()

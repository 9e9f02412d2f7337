# SPDX-License-Identifier: Apache-2.0
"""A real UDP connection that tells the simulation when it opens and ends.

It has a descriptor from its making to its end, so one that is dropped without being closed is missed.
"""

from __future__ import annotations

from typing import Final, Protocol

from userspace.connection.transport import Ending, Phase
from userspace.connection.udp import UdpConnection

#: Of all cookies: who looks for what comes of a secret that is known looks elsewhere.
_SECRET: Final = b"the simulation's"


class Sockets(Protocol):
    """What it tells."""

    descriptors: int

    def opened(self, connection: int, endpoint: int) -> None:
        """Its peer has answered."""

    def ended(self, connection: int, endpoint: int) -> None:
        """Its descriptor is free."""


class SimulatedConnection(UdpConnection):
    """A UdpConnection with a descriptor, which it gives back when it ends; the world knows when it opens."""

    __slots__ = ("_connection", "_endpoint", "_world")

    def __init__(self, world: Sockets, connection: int, endpoint: int) -> None:
        super().__init__(secret=_SECRET, boot=1)
        self._world: Sockets | None = world
        self._connection, self._endpoint = connection, endpoint
        world.descriptors += 1

    def _answered(self, boot: int | None) -> None:
        opening = self.phase is Phase.OPENING
        super()._answered(boot)
        if opening and self._world is not None:
            self._world.opened(self._connection, self._endpoint)

    def _end(self, ending: Ending, code: int = 0, reason: str = "") -> None:
        super()._end(ending, code, reason)
        if self._world is not None:
            self._world.ended(self._connection, self._endpoint)
            self._world = None

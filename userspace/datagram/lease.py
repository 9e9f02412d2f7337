# SPDX-License-Identifier: Apache-2.0
"""Lanes lent to one application: its sockets, and their places in the program's map."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence
from typing import Literal

from userspace.datagram.companion import open_companion_sockets
from userspace.datagram.descriptors import LaneDescriptors, Refusal
from userspace.datagram.xsk import register
from xdp._libbpf import lib
from xdp.maps import BpfMap
from xdp.policy import Policy

#: Which companion sockets an application gets: all or an error, those whose ports are free, none.
Companions = Literal["all", "free", "none"]


class Lease:
    """What one application has; ``close`` takes the lanes back.

    ``descriptors`` may be attached in this process or sent to another one. Nothing is steered to
    the sockets before :meth:`start`.
    """

    def __init__(self, descriptors: LaneDescriptors, xsks: BpfMap, pid: int) -> None:
        self.descriptors = descriptors
        self.queues = frozenset(queue.queue for queue in descriptors.queues)
        self.ports = frozenset(port for port, _ in descriptors.companions)
        self.pid = pid
        self._xsks = xsks
        self._started = False

    def start(self) -> None:
        """Let the program steer; packets passed to the kernel until now."""
        register(self.descriptors, self._xsks)
        self._started = True

    def moved(self, xsks: BpfMap) -> None:
        """The program was replaced: the same map through the descriptor of the new one."""
        self._xsks = xsks

    def handed_over(self) -> None:
        """The application has its own copies of the descriptors: close ours.

        From now on its sockets go with it, however it ends, and leave the program's map by
        themselves: the kernel sees to that even while we are busy.
        """
        self.descriptors.close()

    def close(self) -> None:
        """Stop steering and close what is still ours; idempotent.

        An application that keeps the sockets gets nothing any more, but keeps the queues busy.
        """
        if self._started:
            self._started = False
            for queue in self.queues:
                for lane in self.descriptors.lanes:
                    key = queue * lib.SLUICE_MAX_LANES + lane.number
                    self._xsks.delete(struct.pack("=I", key))
        self.descriptors.close()


def complete(
    descriptors: LaneDescriptors,
    refused: Sequence[Refusal],
    counters: BpfMap,
    policy: Policy,
    companions: Companions,
) -> None:
    """Add the counters' map and companion sockets to the queues' sockets; all closed when that fails."""
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(descriptors.close)
        descriptors.refused = tuple(refused)
        descriptors.counters = os.dup(counters.fd)
        if companions != "none":
            opened = open_companion_sockets(policy, skip_busy=companions == "free")
            descriptors.companions = tuple((port, sock.detach()) for port, sock in opened)
        cleanup.pop_all()

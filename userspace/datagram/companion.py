# SPDX-License-Identifier: Apache-2.0
"""Companion sockets: kernel sockets on the ports that AF_XDP serves.

The XDP program passes what it can't or mustn't steer: fragments, packets with IP
options, loopback traffic.  The kernel puts it together and gives it to whoever
has the port bound: these sockets.  They use the same policy, so such a datagram
arrives in the same lane, with its class, kind and limits.  The limits are
counted apart from the program's: a peer may use each of them once.

A budget per receive call (``[companion] budget`` in the policy, datagrams) keeps
this slow path from taking the fast one's time: a flood of fragments fills the
socket buffers, and that is all.
"""

from __future__ import annotations

from collections.abc import Iterable

from userspace.datagram.batch import Batch
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.sockets import ServiceSocket, adopt, open_service_sockets, socket_ports
from xdp.policy import Policy

# Frames of a lane: enough for the batches of four calls, but no more than this unless one call needs it.
_QUOTA_BUDGETS = 4
_QUOTA = 8192


def open_companion_sockets(policy: Policy, *, skip_busy: bool = False) -> list[ServiceSocket]:
    """The sockets for a policy, opened; needs privileges where ports do.

    Empty when the policy has them disabled.  Their descriptors can be handed to
    another process, see :meth:`Companion.adopt`.  ``skip_busy`` goes on without
    ports that others hold.

    Raises BusyError, which names the process that has a port, and what
    open_service_sockets raises.
    """
    if not policy.companion.enabled:
        return []
    return open_service_sockets(socket_ports(policy), skip_busy=skip_busy)


class Companion:
    """Receives from companion sockets, at most a budget per call; belongs to one thread.

    ``sockets`` are closed with it.  There may be none, when all ports are busy or
    companions are disabled: then nothing ever arrives.
    """

    def __init__(self, policy: Policy, sockets: Iterable[ServiceSocket]) -> None:
        self.budget = policy.companion.budget
        quota = max(self.budget, min(_QUOTA_BUDGETS * self.budget, _QUOTA))
        sockets = list(sockets)
        self._lanes = (
            MmsgLanes(policy, sockets, quota=quota, drain=1, budget=self.budget) if sockets else None
        )

    @classmethod
    def open(cls, policy: Policy, *, skip_busy: bool = False) -> Companion:
        """Open the sockets here; see open_companion_sockets."""
        return cls(policy, open_companion_sockets(policy, skip_busy=skip_busy))

    @classmethod
    def adopt(cls, policy: Policy, descriptors: Iterable[tuple[int, int]]) -> Companion:
        """From (port, descriptor) pairs that another process opened; takes the descriptors over."""
        return cls(policy, adopt(descriptors))

    @property
    def lanes(self) -> MmsgLanes | None:
        """What is behind it: statistics(), swap(policy), send(...); None without sockets."""
        return self._lanes

    @property
    def ports(self) -> tuple[int, ...]:
        """Ports that have a companion socket."""
        return self._lanes.ports if self._lanes else ()

    def fileno(self) -> int:
        """Readable while something waits; -1 without sockets."""
        return self._lanes.fileno() if self._lanes else -1

    def try_receive(self, maximum: int | None = None) -> Batch | None:
        """What is there now, at most the budget and ``maximum``; None when nothing is."""
        if self._lanes is None:
            return None
        batch = self._lanes.try_receive(self.budget if maximum is None else min(maximum, self.budget))
        return batch or None

    def close(self) -> None:
        """Close the sockets; a batch still held stays readable."""
        if self._lanes:
            self._lanes.close()

# SPDX-License-Identifier: Apache-2.0
"""Lanes that an owner has opened: ``open_lanes(owner=PATH)``.

The lanes wait for packets and for the owner's words at the same time, through the place where
companion sockets are looked at: so the fast path pays nothing for it.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from userspace.datagram import messages
from userspace.datagram.batch import Batch
from userspace.datagram.companion import Companion
from userspace.datagram.handover import OwnerConnection
from userspace.datagram.lease import Companions
from userspace.datagram.sockets import ServiceSocket, adopt
from userspace.datagram.xsk_lanes import XskLanes
from xdp.errors import InterfaceGoneError, OwnerGoneError
from xdp.policy import Policy


class _Listening(Companion):
    """Companion sockets and the connection to the owner, waited for together."""

    def __init__(self, policy: Policy, sockets: Iterable[ServiceSocket], owner: OwnerConnection) -> None:
        super().__init__(policy, sockets)
        self._owner = owner
        self._both = select.epoll()
        self._both.register(owner, select.EPOLLIN)
        if super().fileno() >= 0:
            self._both.register(super().fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        return self._both.fileno()

    def try_receive(self, maximum: int | None = None) -> Batch | None:
        """What is there now; raises what the owner's words mean."""
        for event in self._owner.poll():
            if isinstance(event, messages.PolicyChanged):
                if self.lanes is not None and self._owner.policy is not None:
                    self.lanes.swap(self._owner.policy)
            elif event.state == "gone":
                # Said again at the next call: these lanes are of no use any more.
                raise self._interface_gone()
        if not self._owner.present:
            raise self._interface_gone()
        return super().try_receive(maximum)

    def close(self) -> None:
        super().close()
        self._both.close()

    def _interface_gone(self) -> InterfaceGoneError:
        return InterfaceGoneError(
            f"{self._owner.interface} is gone", hint="close these lanes and open them again with wait=SECONDS"
        )


class OwnedLanes(XskLanes):
    """Lanes from an owner; ``owner`` is the connection to it, with the policy in force.

    ``receive`` raises OwnerGoneError when the owner has ended (packets then pass to the kernel),
    InterfaceGoneError when the interface was deleted; close them then and open them again.
    """

    owner: OwnerConnection


def open_owned(
    path: str | Path,
    *,
    queues: Sequence[int] | None = None,
    companions: Companions = "all",
    wait: float = 0.0,
) -> OwnedLanes:
    """Lanes from the owner that serves at ``path`` (what `sluice up` prints); needs no privileges.

    With ``wait`` up to so many seconds until the owner has its interface again, if that is gone.

    Raises NotLoadedError (nobody serves there), PermissionsError (the policy's ``[owner]`` does not
    name this user), BusyError (names the process that has the lanes), InterfaceGoneError,
    OwnerGoneError, UnsupportedError.
    """
    owner = OwnerConnection(path)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(owner.close)
        deadline = time.monotonic() + wait
        while True:
            try:
                descriptors = owner.attach(queues=queues, companions=companions)
                break
            except InterfaceGoneError:
                owner.present = False
                if not owner.wait_for_interface(deadline - time.monotonic()):
                    raise
        cleanup.callback(descriptors.close)
        if owner.policy is None:
            raise OwnerGoneError("the owner gave lanes without their policy")
        owner.poll()  # the policy that came with the lanes is no news
        companion = _Listening(owner.policy, adopt(descriptors.take_companions()), owner)
        cleanup.callback(companion.close)
        lanes = OwnedLanes(descriptors, companion=companion, on_close=owner.close)
        lanes.owner = owner
        cleanup.pop_all()
    return lanes

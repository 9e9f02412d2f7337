# SPDX-License-Identifier: Apache-2.0
"""What an owner holds of an interface beside its program: lock, changed settings, state file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from userspace.datagram.pinned import sweep_pins
from xdp.connection_state import CONNECTIONS
from xdp.errors import SluiceError
from xdp.flow_state import FLOWS
from xdp.interface import Tuning
from xdp.inventory import namespace_inode
from xdp.journal import Journal
from xdp.owner_state import OwnerState, Tuned, state_path, write_state
from xdp.state import InterfaceLock, prepare, sweep


class Claim:
    """An interface that is ours until ``release``; in the network namespace of the calling thread."""

    def __init__(self, interface: str, ifindex: int, notify: Callable[[str], None]) -> None:
        """Take the lock, tidy up after killed owners, put back what one left on this interface.

        Raises BusyError with the pid of the owner, PermissionsError.
        """
        self._notify = notify
        self._state: Path | None = None
        run = prepare()
        sweep_pins()
        sweep(run)
        with contextlib.suppress(OSError):  # nothing depends on it
            FLOWS.make(run)
            CONNECTIONS.make(run)
        self._lock = InterfaceLock.take(interface, ifindex)
        try:
            self._journal = Journal.open(ifindex)
            for outcome in self._journal.put_back(interface):
                change = outcome.change
                notify(
                    f"{change.key} was changed by a killed owner and stays: {outcome.left}"
                    if outcome.left
                    else f"{change.key} put back to {change.before}: a killed owner had set {change.after}"
                )
        except BaseException:
            self._lock.release()
            raise

    def tune(self, interface: str, tuning: Tuning) -> None:
        """Change settings, each written down before; on failure those already changed stay written down."""
        for setting, value in tuning.values(interface):
            self._journal.set(interface, setting, value)

    @property
    def changed(self) -> tuple[Tuned, ...]:
        """What the journal has: changed by us, to be put back."""
        return tuple(Tuned(one.key, one.before, one.after) for one in self._journal.changes)

    def write(self, state: OwnerState) -> None:
        """Write the state file, under the interface's present name."""
        path = state_path(state.interface, namespace_inode())
        if self._state is not None and self._state != path:  # renamed
            self._state.unlink(missing_ok=True)
        try:
            write_state(path, state)
        except OSError as error:
            raise SluiceError.from_errno(
                f"writing {path}", error.errno or 0, hint="is there room in /run?"
            ) from error
        self._state = path

    def gone(self) -> None:
        """The interface was deleted, and its settings with it."""
        self._journal.forget()
        self._remove_state()
        self._lock.release()

    def release(self, interface: str) -> None:
        """Put settings back and give the interface up."""
        with contextlib.ExitStack() as rest:  # in reverse; whatever fails, the others are still done
            rest.callback(self._lock.release)
            rest.callback(self._remove_state)
            for outcome in self._journal.put_back(interface):
                if outcome.left:
                    self._notify(f"{outcome.change.key} was not put back: {outcome.left}")

    def leave(self) -> None:
        """Give the interface up, but leave state, settings and their journal to `sluice down`."""
        self._lock.release()

    def _remove_state(self) -> None:
        if self._state is not None:
            self._state.unlink(missing_ok=True)
            self._state = None


class Namespace:
    """The network namespace that the calling thread was in when this was made."""

    def __init__(self) -> None:
        self.inode = namespace_inode()
        self._descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread, and only it, is there again within the block."""
        if namespace_inode() == self.inode:
            yield
            return
        from pyroute2 import netns

        elsewhere = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            netns.setns(self._descriptor)
            try:
                yield
            finally:
                netns.setns(elsewhere)
        finally:
            os.close(elsewhere)

    def close(self) -> None:
        """Let go of it; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

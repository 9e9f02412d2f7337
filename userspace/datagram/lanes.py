# SPDX-License-Identifier: Apache-2.0
"""Lanes: UDP in batches, highest priority first, whatever carries them.

    with open_lanes("policy.toml", interface="eth1") as lanes:
        while True:
            with lanes.receive() as batch:
                ...

:func:`open_lanes` opens everything in this process, which needs root for AF_XDP, or gets lanes
from the owner of an interface, which does not;
:func:`attach_lanes` uses what somebody else has opened, and needs nothing.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from typing_extensions import Buffer

from userspace.datagram.batch import Batch
from userspace.datagram.companion import Companion
from userspace.datagram.descriptors import LaneDescriptors, Mode, Refusal
from userspace.datagram.destination import Endpoint
from userspace.datagram.fanout import Fanout
from userspace.datagram.lease import Companions
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.opening import Wanted, lane_specs, rungs
from userspace.datagram.owned_lanes import open_owned
from userspace.datagram.owner import Owner
from userspace.datagram.pin import Where
from userspace.datagram.portable import PortableLanes
from userspace.datagram.socket_errors import SocketError
from userspace.datagram.socket_statistics import SendFailure
from userspace.datagram.workers import open_selected_lanes
from userspace.datagram.xsk_lanes import XskLanes
from xdp.errors import PermissionsError, SluiceError, UnsupportedError, UsageError
from xdp.policy import Policy

__all__ = ["Lanes", "attach_lanes", "open_lanes"]


class Lane(Protocol):
    """One lane of some backend, which may say more about it."""

    @property
    def number(self) -> int:
        """The policy's, 0 is the highest; what a batch's ``lanes`` column has."""

    @property
    def name(self) -> str:
        """The policy's."""


@runtime_checkable
class Lanes(Protocol):
    """What all backends have in common; each says more in its own class."""

    @property
    def mode(self) -> str:
        """Which rung of the ladder this is."""

    @property
    def lanes(self) -> Sequence[Lane]:
        """Highest priority first.  Over AF_XDP without those that end in the kernel."""

    def receive(self, maximum: int = 256, timeout: float | None = None, *, linger: float = 0.0) -> Batch:
        """At most ``maximum`` packets, waiting up to ``timeout`` seconds for the first.

        With ``linger``, as long as packets come so fast that two are expected in that many seconds, each
        call first sleeps that long so that batches get larger.
        """

    def try_receive(self, maximum: int = 256) -> Batch:
        """What is there now, maybe nothing."""

    def fileno(self) -> int:
        """Readable when ``try_receive`` may have something; for event loops."""

    def send(
        self, destination: Endpoint, payloads: Sequence[Buffer] | Batch, *, port: int | None = None
    ) -> int:
        """Send each payload as one datagram from service port ``port``; how many were accepted."""

    def send_many(
        self, fanout: Fanout, payloads: Buffer | Sequence[Buffer], *, port: int | None = None
    ) -> int:
        """Send one payload to all destinations, or one to each; how many were accepted.

        ``failures`` says which were not, by index, and why.  Raises UsageError for a number of
        payloads that is not that of the destinations.
        """

    @property
    def failures(self) -> tuple[SendFailure, ...]:
        """What the last ``send_many`` did not get out (over kernel sockets, also ``send``), and why."""

    def send_back(self, batch: Batch) -> int:
        """Send every payload to where it came from, as it is now; how many were accepted.

        Each leaves from the port at which it arrived, by the way it came: through the
        kernel socket when it came through one.  The batch is used up, whatever becomes of
        its packets: as after ``release``, so its views and columns raise ValueError (and
        the end of its ``with`` does nothing).  Payloads keep their length.

        Nothing is sent and the batch stays held when the call is refused: UsageError
        (not received through these lanes), BufferError (a slice of a view or an array
        on top of it is still in use), ValueError (the batch was given back before).

        Used up all the same, with InterfaceGoneError or ValueError (lanes closed).
        """

    def socket_errors(self) -> tuple[SocketError, ...]:
        """Errors of sent datagrams that were reported since the last call, oldest first: a closed port, say.

        Over AF_XDP the companion sockets hear of them, also for frames; without those there are none.
        """

    def status(self) -> dict[str, object]:
        """What is in use and why nothing better, JSON-able."""

    def statistics(self) -> object:
        """Counters, of the backend's own kind."""

    def pin(self, where: Where = "policy") -> tuple[int, ...]:
        """Keep the calling thread on one CPU until the lanes are closed; the CPUs that it may use now.

        "policy": as ``[tuning] pin`` says, or "auto"; "auto": near the queue's interrupts; a
        CPU; or CPUs, that of queue 0 first.  Raises UsageError (no such CPU), UnsupportedError
        ("auto" where there are no interrupts: veth, kernel sockets).
        """

    def close(self) -> None:
        """Close everything; may be called again."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def attach_lanes(descriptors: LaneDescriptors, policy: Policy | None = None) -> XskLanes:
    """Use lanes that are open already; takes over the descriptors, also when it fails.

    Companion sockets among them need the policy (they classify in this process);
    without one they are closed.  Needs no privileges.

    Raises BusyError when another application has used these descriptors.
    """
    companion = None
    if policy is not None and descriptors.companions:
        companion = Companion.adopt(policy, descriptors.take_companions())
    try:
        return XskLanes(descriptors, companion=companion)
    except BaseException:
        if companion is not None:
            companion.close()
        raise


def open_lanes(
    policy: Policy | str | Path | None = None,
    *,
    interface: str | None = None,
    owner: str | Path | None = None,
    mode: Wanted = "auto",
    queues: Sequence[int] | None = None,
    skip_busy_ports: bool = False,
    wait: float = 0.0,
    pin: Where | None = None,
) -> Lanes:
    """Open the lanes of a policy in this process, in the best mode that can be had, or get an owner's.

    ``policy`` is one, or the path of its file.  The ladder is native zero-copy,
    native copy, generic copy, mmsg, portable; ``mode`` and the policy's ``[interface]``
    narrow it.  ``status()`` says which rung holds and why the better ones did not.
    Without an ``interface`` only kernel sockets (mmsg, portable) are possible.
    ``queues`` are the interface's receive queues to serve, all of them by default.
    ``skip_busy_ports`` goes on without companion sockets on ports that others have.

    ``owner`` is the path of the socket where `sluice up` serves; interface, policy and mode are
    then the owner's, and no privileges are needed.  What comes is an
    :class:`~userspace.datagram.owned_lanes.OwnedLanes`.  ``wait`` is how many seconds to wait
    for the owner's interface if that is gone.

    ``pin`` pins the calling thread, as ``lanes.pin`` does: "policy", "auto", a CPU, or CPUs by queue.

    Where the policy asks for busy polling and it can't be had, a RuntimeWarning says why.

    Raises UsageError, PolicyError, BusyError (another program on the interface, other
    sockets on a queue, a port taken), PermissionsError and UnsupportedError (no allowed mode works);
    with ``owner`` also NotLoadedError (nobody serves there), InterfaceGoneError and OwnerGoneError.
    """
    companions: Companions = "free" if skip_busy_ports else "all"
    lanes = _open(policy, interface, owner, mode, queues, companions, wait)
    if pin is not None:
        try:
            lanes.pin(pin)
        except BaseException:
            lanes.close()
            raise
    return lanes


def _open(
    policy: Policy | str | Path | None,
    interface: str | None,
    owner: str | Path | None,
    mode: Wanted,
    queues: Sequence[int] | None,
    companions: Companions,
    wait: float,
) -> Lanes:
    """Without pinning; as open_lanes."""
    if owner is not None:
        if policy is not None or interface is not None or mode != "auto":
            raise UsageError(
                "policy, interface and mode are the owner's", hint="open_lanes(owner=...) without them"
            )
        return open_owned(owner, queues=queues, companions=companions, wait=wait)
    if policy is None:
        raise UsageError("there is no policy", hint="give the path of its file, or owner=")
    policy_path = ""
    if not isinstance(policy, Policy):
        policy_path = str(policy)
        policy = Policy.load(policy)
    modes = rungs(mode, policy)
    over_xdp = tuple(rung for rung in modes if rung not in {"mmsg", "portable"})
    over_sockets = modes[len(over_xdp) :]
    refused: list[Refusal] = []
    if over_xdp and interface is None and not over_sockets:
        raise UsageError(f"mode {mode} needs an interface", hint='give interface="eth1", say')
    if over_xdp and interface is not None:
        try:
            return _open_xsk(policy, interface, over_xdp, queues, companions, policy_path)
        except (UnsupportedError, PermissionsError) as error:
            if not over_sockets:
                raise
            refused += [Refusal(mode=rung, reason=str(error)) for rung in over_xdp]
        except OSError as error:
            raise SluiceError.from_errno(
                f"opening {interface}",
                error.errno or 0,
            ) from error
    return _open_sockets(policy, over_sockets, refused)


def _open_xsk(
    policy: Policy,
    interface: str,
    modes: Sequence[Mode],
    queues: Sequence[int] | None,
    companions: Companions,
    policy_path: str,
) -> XskLanes:
    """Own the interface in this process, and use the lanes here; the owner ends with them."""
    if sys.platform != "linux":
        raise UnsupportedError("XDP needs Linux", hint='open_lanes(mode="portable") works everywhere')
    lane_specs(policy)  # says so when there is nothing to receive, before anything is touched
    native = any(mode.startswith("native") for mode in modes)
    generic = "generic-copy" in modes
    excluded = [
        Refusal(mode=mode, reason="not asked for")
        for mode in ("native-zero-copy", "native-copy")
        if native and mode not in modes
    ]
    with ExitStack() as cleanup:
        owner = cleanup.enter_context(
            Owner.open(
                interface,
                policy,
                policy_path=policy_path,
                mode="auto" if native and generic else "native" if native else "generic",
                minimum_mode=modes[-1],
                excluded=excluded,
                notify=_warn,
            )
        )
        lease = owner.lend(queues=queues, companions=companions)
        cleanup.callback(owner.take_back, lease)
        companion = Companion.adopt(owner.policy, lease.descriptors.take_companions())
        cleanup.callback(companion.close)
        lease.start()
        lanes = XskLanes(lease.descriptors, companion=companion, on_close=owner.close)
        cleanup.pop_all()
    return lanes


def _open_sockets(policy: Policy, modes: Sequence[Mode], refused: list[Refusal]) -> Lanes:
    backends: dict[Mode, Callable[[Policy], MmsgLanes | PortableLanes]] = {
        "mmsg": open_selected_lanes,
        "portable": PortableLanes,
    }
    for mode in modes:
        try:
            lanes = backends[mode](policy)
        except UnsupportedError as error:
            refused.append(Refusal(mode=mode, reason=str(error)))
            continue
        lanes.refused = tuple(refused)
        if lanes.busy_poll_refused:
            _warn(lanes.busy_poll_refused)
        return lanes
    raise _nothing_works(refused)


def _warn(text: str) -> None:
    """Of what an owner tells, what its user asked for and does not get."""
    if text.startswith("[tuning]"):
        warnings.warn(text, RuntimeWarning, stacklevel=5)


def _nothing_works(refused: Sequence[Refusal]) -> SluiceError:
    return UnsupportedError(
        f"no mode works: {refused[-1].reason if refused else 'none is allowed'}",
        hint="`sluice doctor` says what is missing",
        detail="\n".join(f"{refusal.mode}: {refusal.reason}" for refusal in refused),
    )

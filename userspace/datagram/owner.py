# SPDX-License-Identifier: Apache-2.0
"""The owner of an interface: opens all that needs privileges, and lends lanes.

    with Owner.open("eth1", policy) as owner:
        lease = owner.lend()
        lease.start()
        lanes = attach_lanes(lease.descriptors)

One owner per interface, by a lock. The program is attached by a link that this process alone
holds: when it ends, however it ends, the kernel takes the program off. Sockets exist only while
lanes are lent; otherwise the program passes to the kernel what it would steer.

An owner belongs to one thread. It remembers its network namespace, so the thread may be in
another one when it calls.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from userspace.datagram import busy_poll, jumbo, ladder
from userspace.datagram.claim import Claim, Namespace
from userspace.datagram.descriptors import Mode, Refusal
from userspace.datagram.lease import Companions, Lease, complete
from userspace.datagram.opening import shape, socket_lane_specs
from userspace.datagram.pinned import foreign, pin_link, refuse_pinned, take_over
from userspace.datagram.policy_document import known_ids, with_ids
from xdp import owner_state
from xdp.errors import BusyError, InterfaceGoneError, SluiceError, UsageError
from xdp.interface import Tuning
from xdp.link import AttachMode, Link, attached_program, detach_foreign
from xdp.names import Names
from xdp.policy import Policy
from xdp.policy_model import InterfaceMode, Rung
from xdp.policy_model import Tuning as Asked
from xdp.program import SteerProgram
from xdp.tables import compile_policy
from xdp.watch import Change, InterfaceWatch

#: Seconds between attempts to attach to an interface that came back but refuses, at first and at most.
RETRY_FIRST, RETRY_MOST = 1.0, 30.0


def _silent(_text: str) -> None:
    """For owners that nobody listens to."""


class Owner:
    """See the module.

    ``mode`` is the rung that holds, or "native" or "generic" when no lane ends in a socket;
    ``refused`` says why no higher one. ``policy`` is in force, its peers with the kernel's numbers.
    """

    mode: Mode | AttachMode
    refused: tuple[Refusal, ...]
    program: SteerProgram

    def __init__(
        self,
        interface: str,
        policy: Policy,
        *,
        policy_path: str,
        mode: InterfaceMode | None,
        minimum_mode: Rung | None,
        replace: bool,
        tuning: Tuning,
        excluded: Sequence[Refusal],
        notify: Callable[[str], None],
    ) -> None:
        """Only remembers what is asked for; use :meth:`open`."""
        self.policy = policy
        self.policy_path = policy_path
        self.socket_path = ""
        self.notify = notify
        self._mode = mode
        self._minimum_mode = minimum_mode
        self._replace = replace
        self._tuning = tuning
        self._excluded = tuple(excluded)
        self._home = Namespace()
        self._leases: list[Lease] = []
        self._claim: Claim | None = None
        self._retry_at = 0.0
        self._retry_pause = RETRY_FIRST
        self._said = ""
        self._open = True
        self._persisted = False
        self._attach_refused: tuple[Refusal, ...] = ()
        self._probed: tuple[Refusal, ...] = ()
        self.link: Link | None = None
        try:
            self.watch = InterfaceWatch(interface, self._link_lives)
        except BaseException:
            self._home.close()
            raise

    @classmethod
    def open(
        cls,
        interface: str,
        policy: Policy,
        *,
        policy_path: str = "",
        mode: InterfaceMode | None = None,
        minimum_mode: Rung | None = None,
        replace: bool = False,
        tuning: Tuning | None = None,
        excluded: Sequence[Refusal] = (),
        notify: Callable[[str], None] = _silent,
    ) -> Owner:
        """Own an interface of this thread's network namespace and attach the policy's program to it.

        ``mode`` and ``minimum_mode`` override the policy's. ``replace`` takes off a program that
        sits there without a link, or takes over what ``sluice up --persist`` left, without a gap.
        ``excluded`` are rungs that somebody does not want, with the reason that is told.
        ``notify`` gets one line for each thing that happens later and should be known.

        Raises BusyError (another owner, whose pid is named, or a foreign program), NoModeError
        (no allowed mode; with a reason for each), UsageError (no such interface),
        PermissionsError, PolicyError, VerifierError.
        """
        owner = cls(
            interface,
            policy,
            policy_path=policy_path,
            mode=mode,
            minimum_mode=minimum_mode,
            replace=replace,
            tuning=tuning or Tuning(),
            excluded=excluded,
            notify=notify,
        )
        try:
            # Before what takes long: a second start should hear at once that it is one.
            owner._take_claim()
            owner.program = SteerProgram.load(frags=owner._longest(notify) > 0)
            owner.program.close_counters_to_writes()
            owner._swap(policy)
            owner._attach()
        except BaseException:
            owner.close()
            raise
        return owner

    @property
    def interface(self) -> str:
        """Its name now."""
        return self.watch.interface

    @property
    def ifindex(self) -> int:
        """Its index now."""
        return self.watch.ifindex

    @property
    def attached(self) -> bool:
        """Whether the program is on the interface."""
        return self.link is not None

    @property
    def generation(self) -> int:
        """Of the policy in force; counts from 1."""
        return self.program.policy_maps.generation

    @property
    def tuning(self) -> Asked:
        """What is asked for: the policy's, or what this owner was given instead."""
        return self._tuning.before(self.policy.tuning)

    @property
    def tuned(self) -> tuple[owner_state.Tuned, ...]:
        """Settings of the interface that are changed now, and what they were."""
        return () if self._claim is None else self._claim.changed

    @property
    def minimum_mode(self) -> Rung:
        """The rung below which nothing is attached or opened."""
        return self._minimum_mode or self.policy.minimum_mode

    @property
    def leases(self) -> tuple[Lease, ...]:
        """What is lent now."""
        return tuple(self._leases)

    def lend(
        self,
        *,
        queues: Sequence[int] | None = None,
        companions: Companions = "all",
        pid: int | None = None,
    ) -> Lease:
        """Open sockets for the lanes of all queues (or of those named), for process ``pid``.

        Companion sockets go to the first who asks; later leases (of other queues) get none.

        Raises BusyError naming the process that has the lanes or a companion's port,
        InterfaceGoneError, NoModeError, UsageError (no lane ends in a socket, no such queue).
        """
        lanes = socket_lane_specs(self.policy)
        if not lanes:
            raise UsageError(
                "every lane of the policy ends in the kernel: there is nothing to lend",
                hint='give a lane end = "socket", or read from an ordinary UDP socket',
            )
        if self.link is None:
            raise InterfaceGoneError(f"{self.interface} is gone", hint="wait until the owner says it is back")
        wanted = None if queues is None else frozenset(queues)
        for lease in self._leases:
            shared = lease.queues if wanted is None else wanted & lease.queues
            if shared:
                raise BusyError(
                    f"the lanes of {self.interface} queue {min(shared)} are in use by process {lease.pid}",
                    hint="stop that process, or ask for other queues",
                )
        rings = self.policy.rings
        with self._home.entered():
            opened, refused = ladder.open_best(
                self.interface,
                self._attached_as,
                self.minimum_mode,
                lanes,
                ladder.Sizes(rings.frame_size, rings.reserve, rings.tx, self._jumbo()),
                queues=queues,
                cookie=self.program.cookie,
                known=self._probed,
            )
            if (opened.mode, tuple(refused)) != (self.mode, self._probed):
                self._settle(opened.mode, refused)
                self._write_state()
            if any(lease.ports for lease in self._leases):
                companions = "none"
            opened.pin = self.policy.tuning.pin
            complete(opened, self.refused, self.program.maps["counters"], self.policy, companions)
            if why := busy_poll.set_on_queues(opened, self.policy.tuning):
                self.notify(why)
        lease = Lease(opened, self.program.maps["xsks"], os.getpid() if pid is None else pid)
        self._leases.append(lease)
        return lease

    def take_back(self, lease: Lease) -> None:
        """Stop steering to what was lent; idempotent."""
        lease.close()
        if lease in self._leases:
            self._leases.remove(lease)

    def reload(self, policy: Policy) -> int:
        """Put another policy in force while traffic flows; its generation.

        How the program is attached, and whether it takes jumbo frames, stays as it is. Raises BusyError
        when lanes or rings differ while they are lent, PolicyError; the old policy is then still in force.
        """
        if self._leases and shape(policy) != shape(self.policy):
            users = ", ".join(sorted({str(lease.pid) for lease in self._leases}))
            raise BusyError(
                f"the new policy has other lanes or rings, and process {users} uses those of the old one",
                hint="stop that process first; rates, classes, services and peers may change any time",
            )
        if policy.tuning != self.policy.tuning:
            self.notify("[tuning] has changed: settings of the interface follow at the next start")
        self._swap(policy)
        if policy.rings.jumbo is not self.program.frags and policy.rings.jumbo != "auto":
            self.notify(f"{self.interface}: jumbo in [rings] is for the next start; until then it stays")
        self._write_state()
        return self.generation

    def upgrade(self) -> None:
        """Compile the program anew and put it in the old one's place without a gap.

        Counters, peers, limits and sockets stay. Raises SluiceError when the new version's maps
        have another layout; the old program then stays.
        """
        if self.link is None:
            raise InterfaceGoneError(f"{self.interface} is gone", hint="upgrade when it is back")
        old, new = self.program, self.program.successor()
        try:
            self.link.update(new)
        except BaseException:
            new.close()
            raise
        new.policy_maps.tables = old.policy_maps.tables
        self.program = new
        for lease in self._leases:
            lease.moved(new.maps["xsks"])
        old.close()
        self._write_state()

    def poll(self) -> list[Change]:
        """What happened to the interface since the last call, dealt with; never waits.

        "gone": lanes were taken back. "back": the program is attached to the interface of that
        name again, and lanes can be lent. Call it when ``watch`` is readable and once a second.
        """
        done: list[Change] = []
        with self._home.entered():
            changes = self.watch.poll()
            for change in changes:
                if change.state == "back":
                    self._retry_at, self._retry_pause = 0.0, RETRY_FIRST
                    continue
                if change.state == "gone":
                    self._lose()
                elif change.state == "renamed":
                    self._write_state()
                done.append(change)
            due = self.link is None and self.watch.present and time.monotonic() >= self._retry_at
            if due and self._attach_again():
                done.append(Change("back", self.interface, self.ifindex))
        return done

    def persist(self) -> Path:
        """Pin the link, so that the program stays after this process; where it is pinned.

        Nothing may be lent. Changed settings and their journal stay too, for `sluice down`.
        """
        if self.link is None or self._leases:
            raise UsageError("lanes are lent, or the interface is gone: nothing to keep")
        with self._home.entered():
            # Written first: of a pin without a state `sluice status` would know less.
            self._persisted = True
            self._write_state()
            try:
                return pin_link(self.link, self.interface)
            except BaseException:
                self._persisted = False
                raise

    def close(self) -> None:
        """Take the program off, put settings back, give up the interface; idempotent.

        After :meth:`persist` the program, its state and its settings stay.
        """
        if not self._open:
            return
        self._open = False
        with contextlib.ExitStack() as rest:  # in reverse; whatever fails, the others are still done
            rest.callback(self._home.close)
            rest.callback(self.watch.close)
            rest.callback(self._give_up)
            if hasattr(self, "program"):
                rest.callback(self.program.close)
            rest.callback(self._detach)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The interface: claimed, attached, lost, found again

    def _attach(self) -> None:
        interface, ifindex = self.interface, self.ifindex
        mode: InterfaceMode = self._mode or self.policy.mode
        refused: list[Refusal] = []
        kind: AttachMode | None = None
        wanted = self._tuning.over(self.policy.tuning)
        link = take_over(interface, ifindex, self.program)
        if link is None:
            if self._replace:
                detach_foreign(ifindex)
            elif (found := attached_program(ifindex)) is not None:
                # Asked before anything is changed; attaching asks again.
                raise foreign(interface, *found)
            self._claimed.tune(interface, wanted)
            link, kind, refused = ladder.attach_best(
                self.program, interface, ifindex, mode, self.minimum_mode
            )
        self.link = link
        if kind is None:  # taken over: its queues stay, packets are on their way through them
            self._claimed.tune(interface, replace(wanted, queues=None))
        self._attached_as: AttachMode = kind or ("native" if link.mode == "native" else "generic")
        self.mode, self.refused = self._attached_as, tuple(refused)
        self._attach_refused, self._probed = self.refused, ()
        if socket_lane_specs(self.policy):
            if self.watch.up:
                holding = ladder.probe(
                    interface,
                    self._attached_as,
                    self.minimum_mode,
                    longest=self._jumbo(),
                    known=self._excluded,
                )
                self._settle(*holding)
            else:
                why = Refusal(mode="native-zero-copy", reason="not tried: the interface is down")
                native = self._attached_as == "native"
                self._settle("native-copy" if native else "generic-copy", [])
                self.refused += (why,) if native else ()
        self._write_state()

    def _settle(self, mode: Mode, refused: Sequence[Refusal]) -> None:
        self._probed = tuple(refused)
        self.mode, self.refused = mode, (*self._attach_refused, *refused)

    def _longest(self, notify: Callable[[str], None] | None = None) -> int:
        lanes = socket_lane_specs(self.policy)
        return jumbo.choose(self.interface, self.policy.rings, lanes, notify)

    def _jumbo(self) -> int:
        """Bytes of packets in several frames; the program was made for them or was not."""
        return self._longest() if self.program.frags else 0

    def _lose(self) -> None:
        """The interface is gone: so are its link, its sockets and its settings."""
        for lease in self.leases:
            self.take_back(lease)
        self._detach()
        if self._claim is not None:
            self._claim.gone()
            self._claim = None

    def _attach_again(self) -> bool:
        try:
            if self._claim is None:
                self._take_claim()
            self._attach()
        except SluiceError as error:
            self._detach()
            if str(error) != self._said:
                self._said = str(error)
                self.notify(f"{self.interface} is back but can't be used yet: {error}")
            self._retry_at = time.monotonic() + self._retry_pause
            self._retry_pause = min(2 * self._retry_pause, RETRY_MOST)
            return False
        self._said = ""
        return True

    def _link_lives(self) -> bool:
        return self.link is None or self.link.ifindex != 0

    def _detach(self) -> None:
        for lease in self.leases:
            self.take_back(lease)
        if self.link is not None:
            self.link.close()
            self.link = None

    def _take_claim(self) -> None:
        if not self._replace:  # before its settings are put back
            refuse_pinned(self.interface, self.ifindex)
        self._claim = Claim(self.interface, self.ifindex, self.notify)

    @property
    def _claimed(self) -> Claim:
        assert self._claim is not None
        return self._claim

    def _give_up(self) -> None:
        if self._claim is None:
            return
        if self._persisted:
            self._claim.leave()
            return
        with self._home.entered():
            self._claim.release(self.interface)

    # Policy and state

    def _swap(self, policy: Policy) -> None:
        self.program.swap(compile_policy(policy))
        tables = self.program.policy_maps.tables
        assert tables is not None
        self.policy = with_ids(policy, known_ids(tables))

    def _write_state(self) -> None:
        started = owner_state.start_time(os.getpid())
        assert started is not None
        state = owner_state.OwnerState(
            pid=os.getpid(),
            started=started,
            program_id=self.program.id,
            interface=self.interface,
            mode=self.mode,
            refused=tuple(owner_state.Refusal(one.mode, one.reason) for one in self.refused),
            policy=self.policy_path,
            socket=self.socket_path,
            persisted=self._persisted,
            names=Names.from_policy(self.policy),
            tuned=self.tuned,
        )
        if self._claim is not None:
            with self._home.entered():
                self._claim.write(state)

    def serve_at(self, path: Path) -> None:
        """Descriptors are served there from now on (:mod:`userspace.datagram.broker`): say so."""
        self.socket_path = str(path)
        self._write_state()

# SPDX-License-Identifier: Apache-2.0
"""Several processes (or threads) on the same ports, each with sockets of its own for each lane.

    workers = open_workers("policy.toml", 4)     # needs root
    for worker in workers:
        if os.fork() == 0:
            with worker.lanes() as lanes:        # the other workers' sockets are closed here
                serve(lanes)
    workers.release()                            # and here, so that they end with their processes

The kernel spreads peers over the workers: all datagrams of an address go to one, whatever
port and lane.  When a worker ends, however it ends, its sockets end with it, and its peers are
spread over the others, within their lanes.  What waited in its socket buffers is lost.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self, overload

import msgspec

from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.policy_document import decode_policy, encode_policy
from userspace.datagram.selected import (
    DRAIN,
    Drain,
    LaneSocket,
    load_program,
    open_drains,
    open_worker_sockets,
)
from userspace.datagram.sockets import socket_ports
from userspace.native._native import lib
from xdp.counters import Counters
from xdp.errors import SluiceError, UsageError
from xdp.policy import Policy
from xdp.select import SelectProgram
from xdp.tables import compile_policy

_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
_LANES = frozenset((None, DRAIN, *range(lib.SLUICE_MAX_LANES)))


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    """A worker as it is told to another process; the sockets' descriptors come in this order."""

    worker: int
    policy: str
    sockets: list[tuple[_Port, int | None]]


class Worker:
    """One worker's sockets, on their way to its process or thread; :meth:`lanes` makes lanes of them.

    Inherited by os.fork and multiprocessing, pickled by multiprocessing's other start
    methods, or sent over a Unix socket (:meth:`to_message`).
    """

    def __init__(self, number: int, policy: Policy, sockets: Sequence[LaneSocket]) -> None:
        self.number = number
        self.policy = policy
        self._sockets: Sequence[LaneSocket] | None = sockets
        self._siblings: Workers | None = None

    def lanes(self, *, quota: int | None = None) -> MmsgLanes:
        """The lanes, which take over the sockets.  In a forked process the other workers' are closed.

        Raises ValueError when the sockets have been used, sent or closed.
        """
        sockets = self._take()
        if self._siblings is not None and self._siblings.inherited:
            self._siblings.close()
        return MmsgLanes(self.policy, selected=sockets, quota=quota)

    def to_message(self) -> tuple[dict[str, Any], list[int]]:
        """A JSON-able dict and descriptors, for :meth:`from_message`; close this worker after sending."""
        if self._sockets is None:
            raise ValueError("this worker's sockets are used or closed")
        message = _Message(
            worker=self.number,
            policy=encode_policy(self.policy).decode(),
            sockets=[(one.port, one.lane) for one in self._sockets],
        )
        return msgspec.to_builtins(message), [one.socket.fileno() for one in self._sockets]

    @classmethod
    def from_message(cls, message: dict[str, Any], descriptors: Sequence[int]) -> Self:
        """The worker of a message; takes over the descriptors, also when it fails.  Raises UsageError."""
        with contextlib.ExitStack() as cleanup:
            opened: list[socket.socket] = []
            for number, descriptor in enumerate(descriptors):
                try:
                    opened.append(socket.socket(fileno=descriptor))
                except OSError as error:
                    _close_all(descriptors[number:])
                    raise UsageError(f"descriptor {descriptor} is no worker's socket: {error}") from error
                cleanup.callback(opened[-1].close)
            try:
                said = msgspec.convert(message, _Message)
                sockets = [
                    LaneSocket(port, lane, sock)
                    for (port, lane), sock in zip(said.sockets, opened, strict=True)
                ]
            except ValueError as error:
                raise UsageError(f"this message describes no worker: {error}") from error
            if not _LANES.issuperset(one.lane for one in sockets):
                raise UsageError("this message describes no worker: it names lanes that there are not")
            worker = cls(said.worker, decode_policy(said.policy.encode()), sockets)
            cleanup.pop_all()
        return worker

    def close(self) -> None:
        """Close the sockets in this process; idempotent, and nothing when lanes have them."""
        if self._sockets is not None:
            _close_all(one.socket.detach() for one in self._take())

    def _take(self) -> Sequence[LaneSocket]:
        if self._sockets is None:
            raise ValueError("this worker's sockets are used or closed")
        sockets, self._sockets = self._sockets, None
        return sockets

    def __getstate__(self) -> dict[str, Any]:
        """For multiprocessing, which knows how sockets travel."""
        return {**self.__dict__, "_siblings": None}


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


class Workers(Sequence[Worker]):
    """What :func:`open_workers` opened: the workers, and the program that chooses among them."""

    def __init__(self, policy: Policy, program: SelectProgram, drains: list[Drain]) -> None:
        self.policy = policy
        self.program = program
        self._drains = drains
        self._process = os.getpid()
        self._workers: list[Worker] = []

    def open(self, number: int) -> Worker:
        """New sockets for that worker, in place of any that it still has: for one that has ended.

        Raises what open_service_sockets raises.
        """
        if not 0 <= number < self.program.workers:
            raise UsageError(f"there is no worker {number}", hint=f"0 to {self.program.workers - 1} are")
        sockets = open_worker_sockets(self.program, len(self.policy.lanes), self._drains, number)
        worker = Worker(number, self.policy, sockets)
        worker._siblings = self
        if number < len(self._workers):
            self._workers[number].close()
            self._workers[number] = worker
        else:
            self._workers.append(worker)
        return worker

    @property
    def inherited(self) -> bool:
        """Whether another process opened this, and this one is a fork of it."""
        return os.getpid() != self._process

    def counters(self) -> Counters:
        """What the program counted for all workers, in datagrams; see bpf/select.bpf.c."""
        return self.program.counters()

    def swap(self, policy: Policy) -> None:
        """Another policy with the same lanes, for the program at once; lanes follow by their own ``swap``."""
        if policy.lane_names != self.policy.lane_names:
            raise UsageError("the new policy has other lanes", hint="open the workers anew")
        self.program.swap(compile_policy(policy))
        self.policy = policy

    def release(self) -> None:
        """Close the workers' sockets in this process: they have been inherited or sent.

        As long as some process has them open, the kernel counts on them being read.
        """
        for worker in self._workers:
            worker.close()

    def close(self) -> None:
        """Close everything in this process; workers elsewhere go on."""
        self.release()
        for drain in self._drains:
            drain.socket.close()
        self.program.close()

    @overload
    def __getitem__(self, index: int) -> Worker: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Worker]: ...

    def __getitem__(self, index: int | slice) -> Worker | Sequence[Worker]:
        return self._workers[index]

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_workers(policy: Policy | str | Path, count: int) -> Workers:
    """Open the ports of a policy for ``count`` workers (1 to 64), each with a socket for each lane.

    ``policy`` is one, or the path of its file.  Raises PermissionsError (needs root, or CAP_BPF and
    CAP_PERFMON), UnsupportedError, PolicyError, UsageError, and BusyError where somebody else has a port.
    """
    if not isinstance(policy, Policy):
        policy = Policy.load(policy)
    with contextlib.ExitStack() as cleanup:
        try:
            program = load_program(policy, count)
            cleanup.callback(program.close)
            drains = open_drains(program, socket_ports(policy))
            for drain in drains:
                cleanup.callback(drain.socket.close)
            workers = Workers(policy, program, drains)
            cleanup.callback(workers.release)
            for number in range(count):
                workers.open(number)
        except OSError as error:
            raise SluiceError.from_errno(
                f"opening {count} workers",
                error.errno or 0,
            ) from error
        cleanup.pop_all()
    return workers


def open_selected_lanes(policy: Policy) -> MmsgLanes:
    """Lanes of this process alone, chosen by the program; where that can't be, sorted in the process.

    ``selected_by`` says which, ``selection_refused`` why.  Raises what MmsgLanes raises.
    """
    try:
        with contextlib.ExitStack() as cleanup:
            program = load_program(policy, 1)
            cleanup.callback(program.close)
            drains = open_drains(program, socket_ports(policy))
            for drain in drains:
                cleanup.callback(drain.socket.close)
            sockets = open_worker_sockets(program, len(policy.lanes), drains, 0)
            for drain in drains:
                drain.socket.close()  # the lanes have their own hold
            cleanup.pop_all()
        return MmsgLanes(policy, selected=sockets, program=program)
    except (SluiceError, OSError) as error:
        # What stands in the way of any socket (a busy port) is raised from here.
        lanes = MmsgLanes(policy)
        lanes.selection_refused = str(error)
        return lanes

# SPDX-License-Identifier: Apache-2.0
"""Sockets that share ports, one for each lane, among which the kernel chooses by the policy.

The select program (bpf/select.bpf.c) gives each datagram to the socket of its lane, so
that lanes have socket buffers of their own.  On each port there are

  - a socket for each lane, which refuses what was not sent to this host alone: the kernel
    gives broadcast and multicast to every socket of a port, past the program;
  - one for those, whose datagrams are classified in the process, as without the program;
  - the drain, which refuses everything: what the program drops goes there.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from userspace.datagram.sockets import ServiceSocket, attach_filter, open_service_sockets, socket_ports
from userspace.native._native import lib
from xdp.errors import UnsupportedError, UsageError
from xdp.policy import Policy
from xdp.select import SelectProgram, share_port
from xdp.tables import compile_policy

# Classic BPF (linux/filter.h).
_PACKET_TYPE = 0xFFFFF004  # SKF_AD_OFF + SKF_AD_PKTTYPE; 0 is PACKET_HOST
_ACCEPT = (0x06, 0, 0, 0xFFFFFFFF)
_REFUSE = (0x06, 0, 0, 0)
_TO_THIS_HOST_ALONE = ((0x28, 0, 0, _PACKET_TYPE), (0x15, 0, 1, 0), _ACCEPT, _REFUSE)
_REFUSE_EVERYTHING = (_REFUSE,)

#: On a port that is dual-stack, or has a socket for each family.
_GROUPS_PER_PORT = 2


#: In place of a lane's number: the socket is a drain.
DRAIN: int = lib.SL_MMSG_DRAIN


class LaneSocket(NamedTuple):
    """A bound socket and the lane that the kernel chooses it for; None: to be classified here; or DRAIN."""

    port: int
    lane: int | None
    socket: socket.socket


@dataclass(frozen=True, slots=True)
class Drain:
    """A group's drain and its number in the program."""

    port: int
    socket: socket.socket
    group: int

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6."""
        return self.socket.family


def load_program(policy: Policy, workers: int) -> SelectProgram:
    """The program with the policy in force, and room for its ports' groups.

    Raises what SelectProgram.load and swap raise, UsageError (nothing for an application), and
    UnsupportedError (more sockets than one process may have here).
    """
    ports = socket_ports(policy)
    if not ports:
        raise UsageError(
            "the policy has no port for an application",
            hint="add a service with a rule whose lane ends in a socket",
        )
    needed = len(ports) * (len(policy.lanes) + 2)
    if needed > lib.SL_MMSG_SOCKETS:
        raise UnsupportedError(
            f"{len(ports)} ports with {len(policy.lanes)} lanes need {needed} sockets, "
            f"and {lib.SL_MMSG_SOCKETS} are possible",
            hint="fewer ports or lanes, or lanes sorted in the process",
        )
    program = SelectProgram.load(groups=len(ports) * _GROUPS_PER_PORT, workers=workers)
    try:
        program.swap(compile_policy(policy))
    except BaseException:
        program.close()
        raise
    return program


def open_drains(program: SelectProgram, ports: Iterable[int]) -> list[Drain]:
    """Found the groups: from here on the program decides about these ports, and drops until lanes are open.

    Raises what open_service_sockets raises: BusyError also for a port whose other sockets would share it.
    """

    def prepare(sock: socket.socket) -> None:
        attach_filter(sock, _REFUSE_EVERYTHING)
        program.attach(sock)

    drains: list[Drain] = []
    with contextlib.ExitStack() as cleanup:
        for port in ports:
            for _, sock in open_service_sockets([port], prepare=prepare):
                cleanup.callback(sock.close)
                drain = Drain(port, sock, len(drains))
                program.bind_port(port, drain.group, versions=_versions(sock))
                program.register_drain(sock, group=drain.group)
                drains.append(drain)
        cleanup.pop_all()
    return drains


def open_worker_sockets(
    program: SelectProgram, lanes: int, drains: Sequence[Drain], worker: int
) -> list[LaneSocket]:
    """The sockets of one worker, for lanes 0 to ``lanes`` - 1, in the groups of the drains.

    Only worker 0 has those for broadcast and multicast.  All have the drains, which must not end before
    them: otherwise the kernel answers what is dropped.  Raises what open_service_sockets raises.
    """
    groups = {(drain.port, drain.family): drain.group for drain in drains}
    opened: list[LaneSocket] = []
    with contextlib.ExitStack() as cleanup:

        def join(sock: socket.socket) -> None:
            share_port(sock)
            attach_filter(sock, _TO_THIS_HOST_ALONE)

        def take(lane: int | None, sockets: Iterable[ServiceSocket]) -> None:
            for port, sock in sockets:
                cleanup.callback(sock.close)
                opened.append(LaneSocket(port, lane, sock))
                if lane is not None:
                    program.register(sock, group=groups[port, sock.family], lane=lane, worker=worker)

        for port in dict.fromkeys(drain.port for drain in drains):
            for lane in range(lanes):
                take(lane, open_service_sockets([port], prepare=join))
            if worker == 0:
                take(None, open_service_sockets([port], prepare=share_port))
        # Last: what is sent from a port leaves by its first socket.
        for drain in drains:
            opened.append(LaneSocket(drain.port, DRAIN, drain.socket.dup()))
            cleanup.callback(opened[-1].socket.close)
        cleanup.pop_all()
    return opened


def _versions(sock: socket.socket) -> tuple[int, ...]:
    if sock.family == socket.AF_INET:
        return (4,)
    only_v6 = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return (6,) if only_v6 else (4, 6)

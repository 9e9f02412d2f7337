# SPDX-License-Identifier: Apache-2.0
"""What lanes over kernel sockets have in common, however they read and write them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

from userspace.datagram.busy_poll import describe, set_on
from userspace.datagram.classifier import DatagramClassifier
from userspace.datagram.descriptors import Refusal
from userspace.datagram.pin import Pins, Where
from userspace.datagram.selected import LaneSocket
from userspace.datagram.socket_errors import SocketError
from userspace.datagram.sockets import ServiceSocket, open_service_sockets, socket_ports
from xdp.classify import Classifier
from xdp.errors import UnsupportedError, UsageError
from xdp.policy import Policy
from xdp.select import SelectProgram
from xdp.tables import compile_policy


class KernelSocketLanes(ABC):
    """A base class: the sockets and the policy behind them, and the end of both."""

    mode = ""
    #: better modes that could not be had, set by open_lanes
    refused: tuple[Refusal, ...] = ()
    #: the select program, where it is this object's own
    program: SelectProgram | None = None
    #: why the kernel does not choose the lanes, set by open_lanes
    selection_refused: str = ""
    _selected: Sequence[LaneSocket] | None = None
    _closed: bool
    _sockets: list[ServiceSocket]
    _classifier: DatagramClassifier | Classifier
    #: why the policy's busy_poll is not in force; "" when it is, or is not asked for
    busy_poll_refused: str = ""
    _pins: Pins | None = None

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._classifier.policy

    @property
    def ports(self) -> tuple[int, ...]:
        """The service ports that have a socket here."""
        return tuple(dict.fromkeys(self.port_of_socket))

    @property
    def port_of_socket(self) -> tuple[int, ...]:
        """The service port of each socket, by the number that a batch has for it."""
        return tuple(port for port, _ in self._sockets)

    @property
    def selected_by(self) -> Literal["kernel", "process"]:
        """Who puts datagrams into lanes: the select program, or this process behind a common buffer."""
        return "process" if self._selected is None else "kernel"

    def _open_sockets(self, policy: Policy) -> list[ServiceSocket]:
        """One for each of the policy's ports, as its ``[tuning]`` says where that is allowed."""
        opened = open_service_sockets(socket_ports(policy))
        self.busy_poll_refused = set_on((sock.fileno() for _, sock in opened), policy.tuning)
        return opened

    def swap(self, policy: Policy) -> None:
        """Follow another policy with the same lanes; sockets and quotas stay, peers keep their limits."""
        if policy.lane_names != self.policy.lane_names:
            raise UsageError("the new policy has other lanes", hint="open the lanes anew")
        if self.program is not None:
            self.program.swap(compile_policy(policy))
        self._classifier.swap(policy)

    def status(self) -> dict[str, object]:
        """What is in use, as plain values."""
        return {
            "mode": self.mode,
            "ports": list(self.ports),
            "lanes": list(self.policy.lane_names),
            "selected_by": self.selected_by,
            "selection_refused": self.selection_refused,
            "refused": [{"mode": refusal.mode, "reason": refusal.reason} for refusal in self.refused],
            "busy_poll": describe([sock.fileno() for _, sock in self._sockets]),
        }

    def pin(self, where: Where = "policy") -> tuple[int, ...]:
        """Keep the calling thread on a CPU, or on some, until these are closed; the CPUs that it may use now.

        Kernel sockets belong to no queue, so CPUs by queue are all of them, and "auto" is
        UnsupportedError.
        """
        if self._pins is None:
            self._pins = Pins("kernel sockets", 0, None)
        plan = self.policy.tuning.pin or "auto"
        wanted: Where = plan if where == "policy" else where
        if wanted == "auto":
            raise UnsupportedError(
                "kernel sockets belong to no queue whose interrupts they could be near to",
                hint="name the CPU: pin(2)",
            )
        queues = () if isinstance(wanted, int | str) else range(len(wanted))
        return self._pins.pin(queues, wanted, polls=False)

    def _unpin(self) -> None:
        if self._pins is not None:
            self._pins.restore()

    def socket_errors(self) -> tuple[SocketError, ...]:
        """Errors of datagrams sent from these sockets that were reported since the last call, oldest first.

        The latest 1,024 are kept; statistics() counts all.  Raises ValueError when closed.
        """
        return self._take_errors(look=True)

    @abstractmethod
    def _take_errors(self, *, look: bool) -> tuple[SocketError, ...]:
        """Those that were met so far; with ``look`` all sockets are asked first."""

    @abstractmethod
    def close(self) -> None:
        """Close the sockets; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

# SPDX-License-Identifier: Apache-2.0
"""What lanes over kernel sockets have in common, however they read and write them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from userspace.datagram.classifier import DatagramClassifier
from userspace.datagram.descriptors import Refusal
from userspace.datagram.sockets import ServiceSocket
from xdp.classify import Classifier
from xdp.errors import UsageError
from xdp.policy import Policy


class KernelSocketLanes(ABC):
    """A base class: the sockets and the policy behind them, and the end of both."""

    mode = ""
    #: better modes that could not be had, set by open_lanes
    refused: tuple[Refusal, ...] = ()
    _closed: bool
    _sockets: list[ServiceSocket]
    _classifier: DatagramClassifier | Classifier

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._classifier.policy

    @property
    def ports(self) -> tuple[int, ...]:
        """The service ports that have a socket here."""
        return tuple(port for port, _ in self._sockets)

    def swap(self, policy: Policy) -> None:
        """Follow another policy with the same lanes; sockets and quotas stay, peers keep their limits."""
        if policy.lane_names != self.policy.lane_names:
            raise UsageError("the new policy has other lanes", hint="open the lanes anew")
        self._classifier.swap(policy)

    def status(self) -> dict[str, object]:
        """What is in use, as plain values."""
        return {
            "mode": self.mode,
            "ports": list(self.ports),
            "lanes": list(self.policy.lane_names),
            "refused": [{"mode": refusal.mode, "reason": refusal.reason} for refusal in self.refused],
        }

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

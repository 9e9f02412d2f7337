# SPDX-License-Identifier: Apache-2.0
"""Telling `sluice peers` what flow control does: windows, rates, round-trip times, loss.

    publisher = FlowPublisher(manager.flows.flows, "repair-server")
    while True:
        ...
        publisher.publish(time.monotonic())        # writes once a second, and else does nothing
    publisher.close()

The file and who believes it is :mod:`xdp.told`'s.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from userspace.datagram.destination import Endpoint
from xdp.errors import UsageError
from xdp.flow_state import FLOWS, FLOWS_MAXIMUM, FlowState, PeerFlow
from xdp.owner_state import RUN
from xdp.told import INTERVAL, Publisher

if TYPE_CHECKING:
    from userspace.flow.controller import FlowController


class FlowPublisher(Publisher[FlowState]):
    """Writes the state of the first 1,024 of ``flows()``: some 20 microseconds for each of them.

    ``program``, ``interval`` and errors as :class:`xdp.told.Publisher` says.
    """

    __slots__ = ("_flows",)

    folder = FLOWS

    def __init__(
        self,
        flows: Callable[[], Iterable[tuple[Endpoint, FlowController]]],
        program: str,
        *,
        interval: float = INTERVAL,
        run: Path = RUN,
    ) -> None:
        if not callable(flows):
            raise UsageError(f"flows is a function that gives endpoints and controllers, not {flows!r}")
        super().__init__(program, interval=interval, run=run)
        self._flows = flows

    def _state(self, now: float) -> FlowState:  # noqa: ARG002 -- controllers keep their own time
        flows = list(self._flows())
        return FlowState(
            pid=os.getpid(),
            started=self._started,
            program=self._program,
            total=len(flows),
            flows=[peer_flow(endpoint, flow) for endpoint, flow in itertools.islice(flows, FLOWS_MAXIMUM)],
        )


def peer_flow(endpoint: Endpoint, flow: FlowController) -> PeerFlow:
    """The state of one, for people."""
    told = flow.snapshot()
    return PeerFlow(
        address=str(endpoint[0]),
        port=endpoint[1],
        congestion=told.congestion,
        window=told.window,
        in_flight=told.in_flight,
        rate=told.rate,
        delivery_rate=told.delivery_rate,
        smoothed_rtt=told.smoothed_rtt,
        min_rtt=told.min_rtt,
        sent_packets=told.sent_packets,
        lost_packets=told.lost_packets,
        loss_rate=told.loss_rate,
        ecn_share=told.ecn_share,
        level=told.level,  # type: ignore[arg-type]  # a Level's name
    )

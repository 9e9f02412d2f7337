# SPDX-License-Identifier: Apache-2.0
"""What programs with flow control tell of their peers, for `sluice peers`: a file each in /run/sluice/flows.

Who may write there and who is believed is :mod:`xdp.told`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from xdp.owner_state import RUN
from xdp.told import Count, Folder, Part, Seconds, Told, Word

#: Flows of one file, the ones used last.
FLOWS_MAXIMUM: Final = 1024
#: Bytes; a flow has about 250.
SIZE_MAXIMUM: Final = 1 << 20

_Rate = Annotated[float, Meta(ge=0, le=1e15)]


class PeerFlow(msgspec.Struct, frozen=True, kw_only=True):
    """The flow control of one endpoint; bytes, bytes/s and seconds."""

    address: Annotated[str, Meta(max_length=80)]
    port: Annotated[int, Meta(ge=1, le=65_535)]
    congestion: Word
    window: Count
    in_flight: Count
    rate: _Rate
    delivery_rate: _Rate
    smoothed_rtt: Seconds
    min_rtt: Seconds
    sent_packets: Count
    lost_packets: Count
    loss_rate: Part
    ecn_share: Part
    level: Literal["none", "mild", "severe"]


class FlowState(Told, frozen=True, kw_only=True):
    """The content of a file."""

    version: Literal[1] = 1
    #: All that the program has; those in ``flows`` may be fewer.
    total: Count
    flows: Annotated[list[PeerFlow], Meta(max_length=FLOWS_MAXIMUM)]


def _is_address(text: str) -> bool:
    """An address as Python writes it: nothing in it can confuse a terminal."""
    try:
        return str(ip_address(text)) == text and text.isascii() and text.isprintable()
    except ValueError:
        return False


FLOWS: Final = Folder(
    "flows",
    FlowState,
    size_maximum=SIZE_MAXIMUM,
    sound=lambda state: all(_is_address(flow.address) for flow in state.flows),
)


def read_flows(run: Path = RUN) -> list[FlowState]:
    """What all living programs tell, in the order of their pids; removes what the dead have left."""
    return FLOWS.read(run)


def flows_by_address(states: Sequence[FlowState]) -> dict[str, list[tuple[FlowState, PeerFlow]]]:
    """All flows with who told of them, by the peer's address."""
    found: dict[str, list[tuple[FlowState, PeerFlow]]] = {}
    for state in states:
        for flow in state.flows:
            found.setdefault(flow.address, []).append((state, flow))
    return found

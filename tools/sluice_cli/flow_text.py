# SPDX-License-Identifier: Apache-2.0
"""Flow control of a peer as JSON and as cells of a table.

One address may have several flows: of several ports, and of several programs.  A table has one row for it:
windows, bytes on their way and rates add up, of all else the worst is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sluice_cli.map_text import duration_text, rate_text
from xdp.flow_state import FlowState, PeerFlow

FLOW_COLUMNS: Final = ["window", "on its way", "rate", "round trip", "loss", "congestion"]
_LEVELS: Final = ("none", "mild", "severe")


def flow_documents(flows: Sequence[tuple[FlowState, PeerFlow]]) -> list[dict[str, Any]]:
    """For JSON; bytes, bytes/s and seconds."""
    return [
        {
            "port": flow.port,
            "program": state.program,
            "pid": state.pid,
            "congestion": flow.congestion,
            "level": flow.level,
            "window": flow.window,
            "in_flight": flow.in_flight,
            "rate": round(flow.rate, 3),
            "delivery_rate": round(flow.delivery_rate, 3),
            "smoothed_rtt": round(flow.smoothed_rtt, 9),
            "min_rtt": round(flow.min_rtt, 9),
            "sent_packets": flow.sent_packets,
            "lost_packets": flow.lost_packets,
            "loss_rate": round(flow.loss_rate, 6),
            "ecn_share": round(flow.ecn_share, 6),
        }
        for state, flow in flows
    ]


def flow_cells(flows: Sequence[dict[str, Any]]) -> list[str]:
    """What :data:`FLOW_COLUMNS` has for a peer, of its documents; empty without any."""
    if not flows:
        return [""] * len(FLOW_COLUMNS)
    longest = max(one["smoothed_rtt"] for one in flows)
    return [
        str(sum(one["window"] for one in flows)),
        str(sum(one["in_flight"] for one in flows)),
        rate_text(sum(one["rate"] for one in flows)).removesuffix("/s") + "B/s",
        # Before the first sample there is only a guess (RFC 9002, 6.2.2).
        duration_text(longest * 1e9) if any(one["min_rtt"] for one in flows) else "-",
        f"{max(one['loss_rate'] for one in flows):.1%}",
        max((one["level"] for one in flows), key=_LEVELS.index),
    ]

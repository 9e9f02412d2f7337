# SPDX-License-Identifier: Apache-2.0
"""``sluice bench flow``: what a packet costs in flow control, beside aioquic's recovery.

Both are told of the same events at the same virtual times: a packet is asked for and sent, and after
as many others as are on their way its acknowledgement comes, one for two packets, with up to 32 ranges.  No
network and no clock is in it.  Short rounds take turns, so that whatever else the machine does hits both;
CPU time is measured, and the median of the rounds' ratios counts.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import click

from sluice_cli.output import Output, Table, common_options, examples
from userspace.flow.controller import FlowController
from xdp.errors import UnsupportedError

SIZE: Final = 1200  # bytes of a packet
IN_FLIGHT: Final = 100  # packets
GAP: Final = 0.0005  # seconds between two packets, so 50 ms round trip
RANGES: Final = 32  # that the receiver remembers
#: Ours and theirs by the same algorithm.
CONTROLLERS: Final = (("newreno", "reno"), ("cubic", "cubic"))
LOSSES: Final = (0.0, 0.01)

#: When, and the acknowledgement that comes after the packet was sent: inclusive pairs, newest first.
Event = tuple[float, tuple[tuple[int, int], ...] | None]


def trace(packets: int, loss: float, seed: int = 0) -> list[Event]:
    """So many packets, that part of them lost at random."""
    rng = random.Random(seed)
    ranges: list[tuple[int, int]] = []  # oldest first
    events: list[Event] = []
    for number in range(packets):
        arrived = number - IN_FLIGHT
        acknowledged = None
        if arrived >= 0:
            if rng.random() >= loss:
                if ranges and ranges[-1][1] == arrived - 1:
                    ranges[-1] = ranges[-1][0], arrived
                else:
                    ranges = [*ranges[1 - RANGES :], (arrived, arrived)]
            if arrived % 2 and ranges:
                acknowledged = tuple(reversed(ranges))
        events.append((number * GAP, acknowledged))
    return events


def run_sluice(events: list[Event], congestion: str) -> float:
    """CPU seconds."""
    flow = FlowController(0.0, congestion=congestion, mtu=SIZE)
    can_send, on_packet_sent, on_ack_received = flow.can_send, flow.on_packet_sent, flow.on_ack_received
    start = time.process_time()
    for now, ranges in events:
        can_send(now, SIZE)
        on_packet_sent(now, SIZE)
        if ranges is not None:
            on_ack_received(now, ranges)
    return time.process_time() - start


def run_aioquic(events: list[Event], congestion: str) -> float:
    """The same through aioquic's recovery and pacer, its packets and range sets; the sets are made before."""
    try:
        from aioquic.quic.packet import QuicPacketType
        from aioquic.quic.packet_builder import QuicSentPacket
        from aioquic.quic.rangeset import RangeSet
        from aioquic.quic.recovery import QuicPacketRecovery, QuicPacketSpace
        from aioquic.tls import Epoch
    except ImportError:
        raise UnsupportedError("aioquic is not installed", hint="pip install 'sluice[test]'") from None
    ready: list[tuple[float, Any]] = [
        (now, ranges and RangeSet([range(first, last + 1) for first, last in reversed(ranges)]))
        for now, ranges in events
    ]
    recovery = QuicPacketRecovery(
        congestion_control_algorithm=congestion,
        initial_rtt=0.333,
        max_datagram_size=SIZE,
        peer_completed_address_validation=True,
        send_probe=lambda: None,
    )
    recovery.handshake_confirmed = True
    space = QuicPacketSpace(is_application_data=True)
    recovery.spaces = [space]
    pacer = recovery._pacer
    on_packet_sent, on_ack_received = recovery.on_packet_sent, recovery.on_ack_received
    next_send_time, update_after_send = pacer.next_send_time, pacer.update_after_send
    epoch, kind = Epoch.ONE_RTT, QuicPacketType.ONE_RTT
    start = time.process_time()
    for number, (now, rangeset) in enumerate(ready):
        # What its connection asks before it sends.
        _ = next_send_time(now=now), recovery.bytes_in_flight < recovery.congestion_window
        packet = QuicSentPacket(
            epoch=epoch,
            in_flight=True,
            is_ack_eliciting=True,
            is_crypto_packet=False,
            packet_number=number,
            packet_type=kind,
            sent_time=now,
            sent_bytes=SIZE,
        )
        on_packet_sent(packet=packet, space=space)
        update_after_send(now=now)
        if rangeset is not None:
            on_ack_received(ack_rangeset=rangeset, ack_delay=0.0, now=now, space=space)
    return time.process_time() - start


def flow_rows(packets: int, rounds: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each algorithm and share of losses."""
    rows: list[dict[str, Any]] = []
    for loss in LOSSES:
        events = trace(packets, loss)
        for ours, theirs in CONTROLLERS:
            progress(f"{ours}, {loss:.0%} lost")
            pairs = []
            for _ in range(rounds):
                gc.collect()
                pairs.append((run_sluice(events, ours), run_aioquic(events, theirs)))
            rows.append(
                {
                    "direction": "flow",
                    "controller": ours,
                    "loss": loss,
                    "sluice_us": statistics.median(pair[0] for pair in pairs) / packets * 1e6,
                    "aioquic_us": statistics.median(pair[1] for pair in pairs) / packets * 1e6,
                    "ratio": statistics.median(pair[0] / pair[1] for pair in pairs),
                }
            )
    return rows


def flow_table(rows: list[dict[str, Any]]) -> Table:
    """For people."""
    return Table(
        ["controller", "loss", "sluice µs", "aioquic µs", "ratio"],
        [
            [row["controller"], f"{row['loss']:.0%}", f"{row['sluice_us']:.2f}", f"{row['aioquic_us']:.2f}",
             f"{row['ratio']:.3f}"]
            for row in rows
        ],
        right=frozenset({1, 2, 3, 4}),
        title="flow control, CPU time of a packet",
    )  # fmt: skip


@click.command(
    epilog=examples(
        """sluice bench flow
        sluice bench flow --rounds 101 --json"""
    )
)
@click.option("--packets", type=click.IntRange(1000, 1_000_000), default=4000, show_default=True,
              help="Of each round.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1, 1000), default=31, show_default=True,
              help="Medians are reported.")  # fmt: skip
@common_options
def flow(output: Output, packets: int, rounds: int) -> None:
    """Measure flow control's CPU time per packet, beside aioquic's recovery.

    Asking, sending and half an acknowledgement, with 100 packets on their way, in virtual time.
    Needs no privileges.
    """
    rows = flow_rows(packets, rounds, output.progress)
    output.report({"results": rows}, lambda: output.table(flow_table(rows)))

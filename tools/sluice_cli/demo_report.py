# SPDX-License-Identifier: Apache-2.0
"""What ``sluice demo`` says at the end, and whether it all adds up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sluice_cli.generator import GeneratorResult
from sluice_cli.output import Table
from xdp.counters import Counters
from xdp.policy import Policy

#: The flood must be so many times what is read of it, or the demo shows nothing.
FLOOD_FACTOR: Final = 10


def build_report(
    *,
    policy: Policy,
    sent: Mapping[str, int],
    missed: int,
    digests: Mapping[str, Counter[str]],
    capture: Mapping[str, object] | None,
    receiver: Mapping[str, Any],
    counters: Counters,
    peers: Sequence[Mapping[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The JSON document; ``ok`` only if the highest lane lost nothing and all sums are right.

    A lane is balanced when what the program steered into it was received, or
    dropped because its ring was full or its socket had no frame.
    """
    lanes: list[dict[str, Any]] = []
    balanced = counters.balanced and bool(receiver["frames_balanced"])
    for number, lane in enumerate(policy.lanes):
        seen = counters.lanes[number]
        received = _of_lane(receiver["received"], number) or 0
        dropped = {
            reason: count.packets for reason, count in seen.verdicts.items() if reason.startswith("drop_")
        }
        for reason in ("ring_full", "socket_dropped"):
            if receiver[reason].get(lane.name):
                dropped[reason] = receiver[reason][lane.name]
        steered = sum(count.packets for reason, count in seen.verdicts.items() if reason.startswith("steer"))
        in_sockets = received + dropped.get("ring_full", 0) + dropped.get("socket_dropped", 0)
        lane_balanced = steered == in_sockets and not receiver["waiting"].get(lane.name)
        balanced &= lane_balanced
        lanes.append(
            {
                "name": lane.name,
                "priority": number,
                "sent": sent.get(lane.name, 0),
                "seen": seen.seen.packets,
                "received": received,
                "lost": sent.get(lane.name, 0) - received,
                "lost_before_program": sent.get(lane.name, 0) - seen.seen.packets,
                "dropped": dropped,
                "packets_per_second": round(received / seconds) if seconds else 0,
                "latency_us": _of_lane(receiver["latency_us"], number) or {"p50": None, "p99": None},
                "balanced": lane_balanced,
            }
        )
    high, low = lanes[0], lanes[-1]
    flooded = low["seen"] >= FLOOD_FACTOR * low["received"]
    payloads = _payloads(digests, receiver.get("digests", {}), [lane.name for lane in policy.lanes])
    document: dict[str, Any] = {
        "mode": receiver["mode"],
        "seconds": round(seconds, 3),
        "lanes": lanes,
        "peers": list(peers),
        "verdicts": {reason: count.packets for reason, count in sorted(counters.verdicts.items())},
        "seen": counters.seen.packets,
        "generator_missed": missed,
        "flood_factor": round(low["seen"] / low["received"], 1) if low["received"] else None,
        "balanced": balanced,
        "ok": balanced and flooded and high["sent"] > 0 and high["lost"] == 0,
    }
    if capture is not None:
        document["capture"] = {**capture, "payloads": payloads}
        complete = all(entry["intact"] == entry["sent"] for entry in payloads.values())
        document["ok"] = document["ok"] and bool(payloads) and complete
    return document


def _of_lane(values: Sequence[Any], number: int) -> Any:
    """The receiver knows of no lane below its lowest one."""
    return values[number] if number < len(values) else None


def _payloads(
    sent: Mapping[str, Counter[str]], received: Mapping[str, Sequence[str]], names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """For each lane: how many payloads of the capture belong there, and arrived there byte for byte."""
    found = {}
    for lane, wanted in sent.items():
        arrived = Counter(received.get(str(names.index(lane)), ()))
        found[lane] = {"sent": wanted.total(), "intact": (wanted & arrived).total()}
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _latency(found: Mapping[str, float | None] | None, which: str) -> str:
    value = found[which] if found else None
    return "-" if value is None else f"{value:,.1f}"


def live_table(
    names: Sequence[str], sent: GeneratorResult, receiver: Mapping[str, Any], counters: Counters
) -> Table:
    """Lanes while traffic flows; what was sent is ahead of what was received."""
    by_lane: Counter[str] = Counter()
    for stream in sent.streams:
        by_lane[stream.name] += stream.sent
    received = receiver.get("received", [])
    latencies = receiver.get("latency_us", [])
    rows = []
    for number, name in enumerate(names):
        latency = _of_lane(latencies, number)
        rows.append(
            [
                name,
                _number(by_lane.get(name, 0)),
                _number(counters.lanes[number].seen.packets),
                _number(_of_lane(received, number) or 0),
                _number(receiver.get("ring_full", {}).get(name, 0)),
                _latency(latency, "p50"),
                _latency(latency, "p99"),
            ]
        )
    return Table(
        title="lanes, highest first",
        columns=["lane", "sent", "seen", "received", "ring full", "p50 µs", "p99 µs"],
        rows=rows,
        right=frozenset(range(1, 7)),
    )


def tables(document: Mapping[str, Any]) -> list[Table]:
    """For people."""
    lanes = Table(
        title=f"lanes, highest first ({document['mode']}, {document['seconds']:g} s)",
        columns=["lane", "sent", "seen", "received", "lost", "dropped", "packets/s", "p50 µs", "p99 µs"],
        rows=[
            [
                lane["name"],
                _number(lane["sent"]),
                _number(lane["seen"]),
                _number(lane["received"]),
                _number(lane["lost"]),
                ", ".join(f"{reason} {count:,}" for reason, count in lane["dropped"].items()) or "-",
                _number(lane["packets_per_second"]),
                _latency(lane["latency_us"], "p50"),
                _latency(lane["latency_us"], "p99"),
            ]
            for lane in document["lanes"]
        ],
        right=frozenset({1, 2, 3, 4, 6, 7, 8}),
    )
    peers = Table(
        title="busiest peers",
        columns=["address", "class", "packets", "drops"],
        rows=[
            [str(peer["address"]), str(peer["class_name"]), _number(peer["packets"]), _number(peer["drops"])]
            for peer in document["peers"]
        ],
        right=frozenset({2, 3}),
    )
    found = [lanes, peers]
    if "capture" in document:
        found.append(
            Table(
                title="capture",
                columns=["lane", "sent", "intact"],
                rows=[
                    [lane, _number(entry["sent"]), _number(entry["intact"])]
                    for lane, entry in document["capture"]["payloads"].items()
                ],
                right=frozenset({1, 2}),
            )
        )
    high, low = document["lanes"][0], document["lanes"][-1]
    verdict = (
        f"{high['name']}: {high['received']:,} of {high['sent']:,} received while {low['name']} got "
        f"{document['flood_factor']} times what was read of it"
    )
    sums = "all counters add up" if document["balanced"] else "COUNTERS DO NOT ADD UP"
    found.append(
        Table(
            columns=["", ""],
            rows=[["result", "ok" if document["ok"] else "FAILED"], ["", verdict], ["", sums]],
            styles={0: "green" if document["ok"] else "red"},
        )
    )
    return found

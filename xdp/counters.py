# SPDX-License-Identifier: Apache-2.0
"""What the program counted, added up over the CPUs."""

from __future__ import annotations

from dataclasses import dataclass, field

from xdp._libbpf import ffi, lib
from xdp.abi import REASONS, Category, category


@dataclass(frozen=True)
class Count:
    """Packets, and bytes of whole frames without FCS."""

    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.packets + other.packets, self.bytes + other.bytes)

    def __sub__(self, other: Count) -> Count:
        return Count(self.packets - other.packets, self.bytes - other.bytes)


@dataclass(frozen=True)
class LaneCounters:
    """One lane: what the rules sent to it, and what became of what ended in it."""

    seen: Count
    demoted_from: int
    demoted_to: int
    verdicts: dict[str, Count]

    @property
    def balanced(self) -> bool:
        """What came in, by rule or by demotion, ended under some verdict."""
        ended = sum(count.packets for count in self.verdicts.values())
        return self.seen.packets + self.demoted_to - self.demoted_from == ended


@dataclass(frozen=True)
class Counters:
    """A snapshot.  Rows of other CPUs move while it is taken: it balances exactly once traffic rests."""

    seen: Count
    lanes: tuple[LaneCounters, ...]
    #: Verdicts on packets for which no lane was chosen, by reason.
    other: dict[str, Count]
    strangers_created: int
    strangers_refused: int
    metadata_refused: int
    limit_contended: int
    #: Select program: given to another worker of the lane, since the peer's own has no socket.
    worker_gone: int = 0
    totals: dict[Category, Count] = field(default_factory=dict)

    @property
    def verdicts(self) -> dict[str, Count]:
        """By reason, over all lanes and none; reasons that never occurred are left out."""
        result = dict(self.other)
        for lane in self.lanes:
            for reason, count in lane.verdicts.items():
                result[reason] = result.get(reason, Count()) + count
        return result

    @property
    def passed(self) -> int:
        """Packets given to the kernel's network stack."""
        return self.totals["passed"].packets

    @property
    def steered(self) -> int:
        """Packets given to a lane's AF_XDP socket."""
        return self.totals["steered"].packets

    @property
    def dropped(self) -> int:
        """Packets dropped, whatever the reason."""
        return self.totals["dropped"].packets

    @property
    def replied(self) -> int:
        """Packets answered in the kernel."""
        return self.totals["replied"].packets

    @property
    def balanced(self) -> bool:
        """Seen = passed + steered + dropped + replied, in packets and bytes, and each lane by itself."""
        total = sum(self.totals.values(), Count())
        return total == self.seen and all(lane.balanced for lane in self.lanes)


def parse_counters(raw: bytes) -> Counters:
    """``raw`` holds one ``struct sluice_counters`` per CPU, end to end."""
    size = ffi.sizeof("struct sluice_counters")
    rows = ffi.from_buffer("struct sluice_counters[]", raw)
    cpus = len(raw) // size
    verdicts = [
        Count(
            sum(rows[cpu].verdict[index].packets for cpu in range(cpus)),
            sum(rows[cpu].verdict[index].bytes for cpu in range(cpus)),
        )
        for index in range(lib.SLUICE_VERDICTS_SIZE)
    ]
    totals: dict[Category, Count] = {name: Count() for name in ("passed", "steered", "dropped", "replied")}
    by_row: list[dict[str, Count]] = []
    for row in range(lib.SLUICE_COUNTER_ROWS):
        found = {}
        for reason, name in enumerate(REASONS):
            count = verdicts[row * lib.SLUICE_REASONS + reason]
            if count.packets:
                found[name] = count
                totals[category(reason)] += count
        by_row.append(found)

    def total(name: str) -> int:
        return sum(getattr(rows[cpu], name) for cpu in range(cpus))

    lanes = tuple(
        LaneCounters(
            seen=Count(
                sum(rows[cpu].lane_seen[lane].packets for cpu in range(cpus)),
                sum(rows[cpu].lane_seen[lane].bytes for cpu in range(cpus)),
            ),
            demoted_from=sum(rows[cpu].demoted_from[lane] for cpu in range(cpus)),
            demoted_to=sum(rows[cpu].demoted_to[lane] for cpu in range(cpus)),
            verdicts=by_row[lane],
        )
        for lane in range(lib.SLUICE_MAX_LANES)
    )
    return Counters(
        seen=Count(
            sum(rows[cpu].seen.packets for cpu in range(cpus)),
            sum(rows[cpu].seen.bytes for cpu in range(cpus)),
        ),
        lanes=lanes,
        other=by_row[lib.SLUICE_NO_LANE],
        strangers_created=total("strangers_created"),
        strangers_refused=total("strangers_refused"),
        metadata_refused=total("metadata_refused"),
        limit_contended=total("limit_contended"),
        worker_gone=total("worker_gone"),
        totals=totals,
    )

# SPDX-License-Identifier: Apache-2.0
"""How an interface hands packets over: interrupts, timers, coalescing, GRO. Asked, never changed.

Sources: Documentation/networking/napi.rst, Documentation/networking/scaling.rst, ethtool(8).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from xdp.errors import SluiceError
from xdp.interface import SETTINGS
from xdp.policy_tuning import LONG_DELAY
from xdp.probe import Finding
from xdp.queue_cpus import QueueCpus, queue_cpus

#: Rows of queues that are named one by one.
_SHOWN = 4
#: Characters of a command that the kernel keeps in /proc/PID/comm (TASK_COMM_LEN - 1).
_IRQBALANCE = "irqbalance"


def probe_tuning(
    name: str, queues: int, on: set[str], coalescing: dict[str, int] | None
) -> Iterator[Finding]:
    """``on``: the offloads that are on, by ethtool's names; ``coalescing``: ethtool's answer, or None."""
    yield from _timers(name)
    yield from _coalescing(name, coalescing)
    if "rx-gro" in on:
        yield Finding("GRO", "ok", "on: merges behind the program in native mode, before it in generic mode")
    else:
        yield Finding("GRO", "ok", "off")
    found = queue_cpus(name, queues)
    yield from _interrupts(found)
    yield from _steering(name, found)


def _timers(name: str) -> Iterator[Finding]:
    try:
        defer, flush = (
            int(SETTINGS[key].read(name)) for key in ("napi_defer_hard_irqs", "gro_flush_timeout")
        )
    except (SluiceError, ValueError):
        return  # before Linux 5.8, or without sysfs
    detail = f"napi_defer_hard_irqs {defer}, gro_flush_timeout {flush} ns"
    if defer and flush > LONG_DELAY:
        advice = f"a packet may wait {flush / 1e6:g} ms where nobody polls; 200,000 ns is usual"
        yield Finding("NAPI timers", "warn", detail, advice)
    else:
        yield Finding("NAPI timers", "ok", detail)


def _coalescing(name: str, found: dict[str, int] | None) -> Iterator[Finding]:
    if found is None:
        return
    if found["use_adaptive_rx_coalesce"]:
        advice = f"for an even delay, at more CPU time: ethtool -C {name} adaptive-rx off rx-usecs 8"
        yield Finding("coalescing", "warn", "adaptive: the driver changes the delay of interrupts", advice)
    else:
        yield Finding("coalescing", "ok", f"rx-usecs {found['rx_coalesce_usecs']}, not adaptive")


def _interrupts(found: tuple[QueueCpus, ...]) -> Iterator[Finding]:
    seen = [one for one in found if one.interrupt is not None]
    if not seen:
        yield Finding(
            "interrupts", "ok", "none: handled on the CPU of whoever sends; name CPUs to pin readers"
        )
        return
    words = [f"queue {one.queue}: IRQ {one.interrupt} on {_numbers(one.cpus)}" for one in seen[:_SHOWN]]
    words += [f"and {len(seen) - _SHOWN} more"] if len(seen) > _SHOWN else []
    detail = "; ".join(words)
    if pid := process_named(_IRQBALANCE):
        advice = (
            "it moves interrupts away from pinned readers: systemctl stop irqbalance, or ban these IRQs in it"
        )
        yield Finding("interrupts", "warn", f"{detail}; irqbalance runs (pid {pid})", advice)
    elif len(seen) > 1 and len(frozenset[int]().union(*(one.cpus for one in seen))) == 1:
        advice = "one CPU handles all queues: write another one to /proc/irq/NUMBER/smp_affinity_list of each"
        yield Finding("interrupts", "warn", detail, advice)
    else:
        yield Finding("interrupts", "ok", detail)


def _steering(name: str, found: tuple[QueueCpus, ...]) -> Iterator[Finding]:
    steered = [one for one in found if one.steered]
    if steered:
        queues = ", ".join(str(one.queue) for one in steered)
        files = f"/sys/class/net/{name}/queues/rx-N/rps_cpus"
        advice = f"it moves only what is passed to the kernel; to end it, write 0 to {files}"
        yield Finding("RPS", "warn", f"on for queue {queues}", advice)


def _numbers(cpus: frozenset[int]) -> str:
    return f"CPU {', '.join(map(str, sorted(cpus)))}" if cpus else "an unknown CPU"


def process_named(command: str, proc: Path = Path("/proc")) -> int:
    """The lowest pid of a process with that command, 0: none that can be seen."""
    for entry in sorted((path for path in proc.iterdir() if path.name.isdigit()), key=lambda p: int(p.name)):
        with suppress(OSError):  # ended meanwhile
            if (entry / "comm").read_text(encoding="utf-8", errors="replace").strip() == command:
                return int(entry.name)
    return 0

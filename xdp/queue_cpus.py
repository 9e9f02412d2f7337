# SPDX-License-Identifier: Apache-2.0
"""Which CPU handles the interrupts of a receive queue, and which one is good for its reader.

From the kernel's netdev family (Documentation/netlink/specs/netdev.yaml: queue-get, napi-get; Linux
6.8, where the driver tells), else from the names in /proc/interrupts, which differ by driver. Virtual
interfaces (veth, lo) have no interrupts: their packets are handled on the CPU that sends them.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdp.interface import device_of, sysfs_text

_QUEUE_GET, _NAPI_GET = 10, 11  # enum netdev_cmd, linux/netdev.h
_QUEUE_TYPE_RX = 0
_PROC = Path("/proc")
_CPUS = Path("/sys/devices/system/cpu")  # the same in every network namespace
#: Parts of interrupts' names that are not those of a receive queue.
_OTHERS = re.compile(
    r"(?:^|[-.])(?:tx|output|config|control|ctrl|async|mgmnt|misc|event|fdir)(?:[-.]|$)", re.IGNORECASE
)


@dataclass(frozen=True)
class QueueCpus:
    """Of one receive queue: its interrupt (None: none found) and who handles it.

    ``steered`` are the CPUs that RPS hands its packets to (rps_cpus); empty when it is off.
    """

    queue: int
    interrupt: int | None
    cpus: frozenset[int]
    steered: frozenset[int]


def queue_cpus(interface: str, queues: int) -> tuple[QueueCpus, ...]:
    """Of the queues 0 to ``queues`` - 1 of an interface of this network namespace."""
    interrupts = _by_netlink(socket.if_nametoindex(interface))
    if not interrupts:
        text = (_PROC / "interrupts").read_text(encoding="ascii", errors="replace")
        interrupts = by_name(text, {interface, device_of(interface)} - {""})
    found = []
    for queue in range(queues):
        number = interrupts.get(queue)
        cpus = frozenset[int]() if number is None else _handlers(number)
        steered = parse_mask(sysfs_text(interface, f"queues/rx-{queue}/rps_cpus"))
        found.append(QueueCpus(queue, number, cpus, steered))
    return tuple(found)


def by_name(text: str, names: set[str]) -> dict[int, int]:
    """Queue -> interrupt, of /proc/interrupts: "eth1-TxRx-3", "virtio2-input.3", "mlx5_comp3@pci:..."."""
    found: dict[int, int] = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        words = rest.split()
        if not number.strip().isdigit() or not words:
            continue
        action = words[-1]
        before, _, after = action.partition("@pci:")
        if after in names and (match := re.search(r"comp(\d+)$", before)):
            found.setdefault(int(match[1]), int(number))
            continue
        for name in names:
            tail = action.removeprefix(name) if action.startswith((f"{name}-", f"{name}.")) else ""
            if not _OTHERS.search(tail) and (match := re.search(r"(\d+)$", tail)):
                found.setdefault(int(match[1]), int(number))
    return found


def parse_list(text: str) -> frozenset[int]:
    """``0-2,5`` as a set (Documentation/admin-guide/cputopology.rst)."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def parse_mask(text: str) -> frozenset[int]:
    """``00000000,00000005`` as a set."""
    digits = text.strip().replace(",", "")
    bits = int(digits, 16) if digits else 0
    return frozenset(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)


def near(own: frozenset[int], others: frozenset[int], allowed: frozenset[int], *, same: bool) -> list[int]:
    """CPUs for the reader of a queue whose interrupts ``own`` handle, the best ones only, ascending.

    ``same``: that very CPU, for a reader that polls the queue itself. Else one that shares a cache
    with it but handles no interrupt, ``others``' included, and no core with one that does; as far as
    there are such among ``allowed``.
    """
    if same:
        return sorted(own & allowed) or sorted(allowed)
    cached = frozenset[int]().union(*(_sharing(cpu, "cache/index3/shared_cpu_list") for cpu in own))
    cores = frozenset[int]().union(*(_sharing(cpu, "topology/thread_siblings_list") for cpu in own | others))
    for wanted in (cached - cores, cached - own - others, cached - own, allowed - own):
        if wanted & allowed:
            return sorted(wanted & allowed)
    return sorted(allowed)


def _sharing(cpu: int, what: str) -> frozenset[int]:
    """All CPUs that share it with ``cpu``; where the kernel doesn't say, all there are share a cache."""
    try:
        return parse_list((_CPUS / f"cpu{cpu}" / what).read_text(encoding="ascii"))
    except OSError:
        return frozenset(range(os.cpu_count() or 1)) if what.startswith("cache") else frozenset({cpu})


def _handlers(interrupt: int) -> frozenset[int]:
    """Who really gets it; where the kernel doesn't say, who may."""
    for name in ("effective_affinity_list", "smp_affinity_list"):
        with suppress(OSError):
            found = parse_list((_PROC / "irq" / str(interrupt) / name).read_text(encoding="ascii"))
            if found:
                return found
    return frozenset()


def _by_netlink(ifindex: int) -> dict[int, int]:
    """Queue -> interrupt, as far as kernel and driver tell."""
    from pyroute2.netlink import NLM_F_DUMP, NLM_F_REQUEST, genlmsg
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.generic import GenericNetlinkSocket

    class Queue(genlmsg):  # type: ignore[misc] # pyroute2 has no types
        """enum netdev_a_queue."""

        prefix = "NETDEV_A_QUEUE_"
        nla_map = (
            ("NETDEV_A_QUEUE_UNSPEC", "none"),
            ("NETDEV_A_QUEUE_ID", "uint32"),
            ("NETDEV_A_QUEUE_IFINDEX", "uint32"),
            ("NETDEV_A_QUEUE_TYPE", "uint32"),
            ("NETDEV_A_QUEUE_NAPI_ID", "uint32"),
        )

    class Napi(genlmsg):  # type: ignore[misc]
        """enum netdev_a_napi."""

        prefix = "NETDEV_A_NAPI_"
        nla_map = (
            ("NETDEV_A_NAPI_UNSPEC", "none"),
            ("NETDEV_A_NAPI_IFINDEX", "uint32"),
            ("NETDEV_A_NAPI_ID", "uint32"),
            ("NETDEV_A_NAPI_IRQ", "uint32"),
        )

    def ask(kind: Any, command: int, attribute: str) -> list[Any]:
        with GenericNetlinkSocket() as family:
            try:
                family.bind("netdev", kind)
                request = kind()
                request["cmd"], request["version"] = command, 1
                request["attrs"] = [[attribute, ifindex]]
                flags = NLM_F_REQUEST | NLM_F_DUMP
                return list(family.nlm_request(request, msg_type=family.prid, msg_flags=flags))
            except NetlinkError as error:
                if error.code in (errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL):
                    return []
                raise

    interrupts = {
        one.get_attr("NETDEV_A_NAPI_ID"): one.get_attr("NETDEV_A_NAPI_IRQ")
        for one in ask(Napi, _NAPI_GET, "NETDEV_A_NAPI_IFINDEX")
    }
    found = {}
    for one in ask(Queue, _QUEUE_GET, "NETDEV_A_QUEUE_IFINDEX"):
        number = interrupts.get(one.get_attr("NETDEV_A_QUEUE_NAPI_ID"))
        if one.get_attr("NETDEV_A_QUEUE_TYPE") == _QUEUE_TYPE_RX and number is not None:
            found[int(one.get_attr("NETDEV_A_QUEUE_ID"))] = int(number)
    return found

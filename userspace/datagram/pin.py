# SPDX-License-Identifier: Apache-2.0
"""A queue's reader stays on one CPU: the policy's, one that is named, or one near the interrupts.

Threads are pinned one by one, each by its own call, since only it knows that it is the reader
(sched_setaffinity(2)). What a thread starts later inherits its CPUs: start helpers first.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from xdp.errors import InterfaceGoneError, UnsupportedError, UsageError
from xdp.policy_model import Pin
from xdp.queue_cpus import near, queue_cpus

#: Where to: as ``[tuning] pin`` says ("auto" where it says nothing), near the queue's interrupts,
#: one CPU, or the CPUs of queues 0, 1 and so on.
Where = Literal["policy", "auto"] | int | Sequence[int]


class Pins:
    """The threads that read some queues of an interface, and where they were allowed to run before."""

    def __init__(self, interface: str, ifindex: int, plan: Pin | None) -> None:
        self._interface = interface
        self._ifindex = ifindex
        self._plan = plan
        self._lock = threading.Lock()
        # native id of the thread -> CPUs before and now
        self._before: dict[int, tuple[frozenset[int], frozenset[int]]] = {}

    def pin(self, queues: Sequence[int], where: Where, *, polls: bool) -> tuple[int, ...]:
        """Pin the calling thread, which reads these queues; the CPUs that it may run on now.

        ``polls``: it polls the queue itself, so that the interrupt's CPU is the best.

        Raises UsageError (no such CPU, none named for a queue), UnsupportedError ("auto" where
        the queues have no interrupts), InterfaceGoneError (not in this network namespace).
        """
        thread = threading.get_native_id()
        with self._lock:
            known = self._before.get(thread)
            before = known[0] if known is not None else frozenset(os.sched_getaffinity(0))
            wanted = self._choose(queues, where, before, polls)
            try:
                os.sched_setaffinity(0, wanted)
            except (OSError, OverflowError, ValueError) as error:
                raise UsageError(
                    f"CPU {', '.join(map(str, sorted(wanted)))} can't be had: {error}",
                    hint=f"this process may use {', '.join(map(str, sorted(before)))}; see `lscpu -e`",
                ) from error
            now = frozenset(os.sched_getaffinity(0))
            self._before[thread] = (before, now)
        return tuple(sorted(now))

    def restore(self) -> None:
        """Let the threads run where they ran before, unless somebody has moved them since; idempotent."""
        with self._lock:
            for thread, (before, now) in self._before.items():
                # Numbers of threads that have ended may be another process's by now.
                with suppress(OSError):
                    if Path(f"/proc/self/task/{thread}").exists() and os.sched_getaffinity(thread) == now:
                        os.sched_setaffinity(thread, before)
            self._before.clear()

    def _choose(
        self, queues: Sequence[int], where: Where, allowed: frozenset[int], polls: bool
    ) -> frozenset[int]:
        if where == "policy":
            where = self._plan if self._plan is not None else "auto"
        if isinstance(where, int):
            return frozenset({where})
        if where == "auto":
            return self._automatic(queues, allowed, polls)
        cpus = tuple(where)
        if not all(isinstance(cpu, int) for cpu in cpus):
            raise UsageError(
                f"there is no pin {where!r}", hint='allowed: "policy", "auto", a CPU, CPUs by queue'
            )
        if not queues or max(queues) >= len(cpus):
            raise UsageError(
                f"pin names CPUs for {len(cpus)} queues, but this is queue {max(queues, default=0)}",
                hint="name one CPU for each queue, that of queue 0 first",
            )
        return frozenset(cpus[queue] for queue in queues)

    def _automatic(self, queues: Sequence[int], allowed: frozenset[int], polls: bool) -> frozenset[int]:
        try:
            seen = socket.if_nametoindex(self._interface)
        except OSError:
            seen = 0
        if seen != self._ifindex:
            raise InterfaceGoneError(
                f"{self._interface} can't be seen from this network namespace, nor its interrupts",
                hint="name the CPUs instead: pin = [2, 3]",
            )
        found = queue_cpus(self._interface, max(queues) + 1)
        handling = frozenset[int]().union(*(one.cpus for one in found))
        chosen = set()
        for queue in queues:
            own = found[queue].cpus
            if not own:
                raise UnsupportedError(
                    f"{self._interface} queue {queue} has no interrupt to be near to "
                    "(a virtual interface's packets are handled where they are sent)",
                    hint="name the CPUs instead: pin = [2, 3]",
                )
            good = near(own, handling - own, allowed, same=polls)
            chosen.add(good[queue % len(good)])
        return frozenset(chosen)

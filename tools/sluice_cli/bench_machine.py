# SPDX-License-Identifier: Apache-2.0
"""The machine that a benchmark runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from xdp.errors import UsageError


def cpus(same_core: bool) -> tuple[int, int]:
    """CPU of the receiver and of the generator.

    Raises:
        UsageError: there is only one.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if same_core:
        return allowed[-1], allowed[-1]
    if len(allowed) < 2:
        raise UsageError("the benchmark needs two CPUs", hint="say --same-core to measure on one")
    return allowed[-1], allowed[-2]


def machine(same_core: bool) -> dict[str, Any]:
    """What the numbers belong to."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "interface": "veth, native XDP, copy mode",
        "same_core": same_core,
    }

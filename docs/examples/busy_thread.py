# SPDX-License-Identifier: Apache-2.0
"""What calls into C cost, alone and beside a busy thread: python docs/examples/busy_thread.py."""

import threading
import time
import zlib
from collections.abc import Callable

from xdp._libbpf import lib

CALLS = 100  # between two looks at the clock, which costs as much as a short call
BLOCK = bytes(64 << 10)


def short() -> None:
    """Next to nothing, without the GIL."""
    lib.sluice_libbpf_version()


def longer() -> None:
    """Some microseconds without the GIL, as receiving a batch takes."""
    zlib.crc32(BLOCK)


def measure(call: Callable[[], None], seconds: float = 1.0) -> float:
    """Mean time of a call, in microseconds."""
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        for _ in range(CALLS):
            call()
        calls += CALLS
    return passed / calls * 1e6


def compute() -> None:
    """Keep the GIL until asked for it."""
    while not stop.is_set():
        pass


stop = threading.Event()
alone = [measure(call) for call in (short, longer)]
busy = threading.Thread(target=compute)
busy.start()
beside = [measure(call) for call in (short, longer)]
stop.set()
busy.join()
for name, before, after in zip(("short", "longer"), alone, beside, strict=True):
    print(f"{name} call: {before:.2f} µs alone, {after:.2f} µs beside a busy thread")

# SPDX-License-Identifier: Apache-2.0
"""Send everything back, from several processes: sudo python docs/examples/workers.py POLICY COUNT."""

import multiprocessing
import os
import signal
import sys
from contextlib import suppress

from userspace.datagram.workers import Worker, open_workers


def echo(worker: Worker, parent: int) -> None:
    """In a process of its own, until the first one ends it, or has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with worker.lanes() as lanes:
        while os.getppid() == parent:
            lanes.send_back(lanes.receive(timeout=1))


policy, count = sys.argv[1:]
fork = multiprocessing.get_context("fork")
with open_workers(policy, int(count)) as workers:
    for worker in workers:
        fork.Process(target=echo, args=(worker, os.getpid()), daemon=True).start()
    workers.release()  # a worker's sockets shall end with its process, however that ends
    print(len(workers), "workers", flush=True)
    with suppress(KeyboardInterrupt):
        signal.pause()
    lanes = zip(workers.policy.lane_names, workers.counters().lanes, strict=False)
    print({name: lane.seen.packets for name, lane in lanes})

# SPDX-License-Identifier: Apache-2.0
"""Count packets by lane: sudo python docs/examples/receive.py INTERFACE POLICY."""

import sys
from collections import Counter

from userspace.datagram.lanes import open_lanes

interface, policy = sys.argv[1:]
counts: Counter[str] = Counter()
with open_lanes(policy, interface=interface) as lanes:
    print(lanes.status(), flush=True)
    names = {lane.number: lane.name for lane in lanes.lanes}
    try:
        while True:
            with lanes.receive() as batch:  # highest lane first; the batch is given back at the end
                counts.update(names[lane] for lane in batch.lanes)
    except KeyboardInterrupt:
        print(dict(counts))

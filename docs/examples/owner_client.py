# SPDX-License-Identifier: Apache-2.0
"""Count packets by lane, with lanes from `sluice up`: python docs/examples/owner_client.py INTERFACE.

Needs no privileges: [owner] in the policy names this user.  Waits for an interface that is gone.
"""

import sys
from collections import Counter

from userspace.datagram.handover import default_path
from userspace.datagram.lanes import open_lanes
from xdp.errors import InterfaceGoneError

owner = default_path(sys.argv[1])
counts: Counter[str] = Counter()
try:
    while True:
        try:
            with open_lanes(owner=owner, wait=60) as lanes:
                print(lanes.status(), flush=True)
                names = {lane.number: lane.name for lane in lanes.lanes}
                while True:
                    with lanes.receive() as batch:
                        counts.update(names[lane] for lane in batch.lanes)
        except InterfaceGoneError as error:
            print(error, flush=True)
except KeyboardInterrupt:
    print(dict(counts))

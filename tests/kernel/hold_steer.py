# SPDX-License-Identifier: Apache-2.0
"""A process that owns the steer program on an interface, as tests of the tools need one.

    python hold_steer.py INTERFACE MODE POLICY [STATE_FILE]
    python hold_steer.py INTERFACE MODE foreign

Prints "ready" once the program is attached, and holds it until SIGTERM.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from xdp import link as links
from xdp.names import Names
from xdp.owner_state import OwnerState, Refusal, start_time, write_state
from xdp.policy import Policy
from xdp.program import SteerProgram, load_bytecode
from xdp.tables import compile_policy

# r0 = XDP_PASS; exit
PASS_EVERYTHING = bytes.fromhex("b7000000020000009500000000000000")


class Foreign:
    """Somebody else's program: it passes everything."""

    def __init__(self) -> None:
        self.fd = load_bytecode("somebody_else", PASS_EVERYTHING)


def main() -> None:
    interface, mode, source, *state = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    program: Any
    if source == "foreign":
        program = Foreign()
    else:
        policy = Policy.load(source)
        program = SteerProgram.load()
        program.swap(compile_policy(policy))
    link = links.attach(
        program, socket.if_nametoindex(interface), "native" if mode == "native" else "generic"
    )
    if state:
        started = start_time(os.getpid())
        assert started is not None
        write_state(
            Path(state[0]),
            OwnerState(
                pid=os.getpid(),
                started=started,
                program_id=program.id,
                interface=interface,
                mode=f"{mode} copy",
                refused=(Refusal("native zero-copy", "veth has none"),),
                policy=source,
                names=Names.from_policy(policy),
            ),
        )
    print("ready", link.id, flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    if state:
        Path(state[0]).unlink(missing_ok=True)
    link.close()


if __name__ == "__main__":
    main()

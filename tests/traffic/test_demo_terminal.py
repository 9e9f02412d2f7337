# SPDX-License-Identifier: Apache-2.0
"""`sluice demo` on a terminal: it can be watched while it runs."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from tests.traffic.served import ENVIRONMENT

pytestmark = [pytest.mark.root, pytest.mark.bpf]

PATIENCE = 120.0  # for what takes seconds on an idle machine
COLUMNS, ROWS = 120, 50


def on_terminal(*words: str) -> tuple[int, str]:
    """Exit code of a command, and all that it wrote to its terminal."""
    ours, theirs = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    said = b""
    with subprocess.Popen(
        [sys.executable, "-m", "sluice_cli", *words],
        env={name: value for name, value in environment.items() if name != "NO_COLOR"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        deadline = time.monotonic() + PATIENCE
        try:
            while True:
                left = deadline - time.monotonic()
                assert left > 0, said
                if select.select([ours], [], [], left)[0]:
                    said += os.read(ours, 65536)
        except OSError:  # EIO: everybody at the other end has closed it
            pass
        finally:
            os.close(ours)
            if time.monotonic() >= deadline:
                process.terminate()
    return process.returncode, said.decode()


def test_lanes_are_shown_while_it_runs() -> None:
    code, said = on_terminal("demo", "--seconds", "2")
    assert code == 0, said
    assert "\x1b[" in said, "a terminal gets colour"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    frames = plain.split("lanes, highest first")
    assert len(frames) > 4, "about four tables a second, and the last one"
    # In the same lane more has been received from one table to the next.
    votes = [re.search(r"votes\W+([\d,]+)\W+([\d,]+)\W+([\d,]+)", frame) for frame in frames[1:]]
    received = [int(one[3].replace(",", "")) for one in votes if one]
    assert len(received) > 3
    assert received == sorted(received)
    assert received[0] < received[-1]
    assert "all counters add up" in plain

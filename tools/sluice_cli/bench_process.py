# SPDX-License-Identifier: Apache-2.0
"""How ``sluice bench`` speaks with the processes under test: "ready", a line of JSON, an orderly end."""

from __future__ import annotations

import json
import select
import subprocess
import time
from collections.abc import Sequence
from typing import Any, Final

from xdp.errors import SluiceError

#: Seconds; Python, imports and sockets on a busy machine.
START_TIMEOUT: Final = 30.0


def wait_ready(process: subprocess.Popen[str], path: str) -> None:
    """Until the path under test could receive.  Raises SluiceError."""
    if _line(process, START_TIMEOUT) != "ready":
        raise failed(process, path)


def read_report(
    process: subprocess.Popen[str], path: str, timeout: float = 2 * START_TIMEOUT
) -> dict[str, Any]:
    """The line of JSON at its end.  Raises SluiceError."""
    line = _line(process, timeout)
    try:
        report: dict[str, Any] = json.loads(line)
    except ValueError:
        raise failed(process, path) from None
    return report


def _line(process: subprocess.Popen[str], timeout: float) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 0.1)[0]:
            return process.stdout.readline().strip()
    return ""


def failed(process: subprocess.Popen[str], path: str) -> SluiceError:
    """What to raise for a process that did not do what it should; it is ended."""
    process.kill()
    _, said = process.communicate()
    lines: Sequence[str] = said.strip().splitlines()
    return SluiceError(f"the path {path} failed: {lines[-1] if lines else 'it said nothing'}", detail=said)


def end(process: subprocess.Popen[str]) -> None:
    """Ask it to end, and see to it that it does."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()

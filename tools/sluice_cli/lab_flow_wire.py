# SPDX-License-Identifier: Apache-2.0
"""What sender and relay of ``sluice lab flow`` agree on: task, clock, the bytes of their datagrams.

A data packet begins with one number of 64 bits: its flow in the upper 16, its sequence number in the
lower 48, so that a batch of them is read and written by one ``gather`` or ``scatter``.  An acknowledgement
is a flow, a delay, a count of CE marks and ranges, newest first.

Both processes get their :class:`Task` as JSON on the command line, say ``{"ready": ...}`` when they could
begin, read the time at which they begin (seconds of CLOCK_MONOTONIC, which hosts of a lab share) and say one
line of JSON at the end, or an error.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec

from userspace.flow.ranges import RANGES, Acknowledgement
from xdp.errors import SluiceError, UsageError

#: UDP, of both hosts.
PORT: Final = 9000
#: Packets that are received and sent at once.
BATCH: Final = 256

NUMBER_BITS: Final = 48
NUMBER_MASK: Final = (1 << NUMBER_BITS) - 1

#: flow, ranges, microseconds since the newest came, packets with a CE mark
_HEAD: Final = struct.Struct("!HHII")
_RANGE_BYTES: Final = 16
#: Ranges as pairs of numbers, by how many there are.
_RANGES: Final = tuple(struct.Struct(f"!{2 * count}Q") for count in range(RANGES + 1))
_U32: Final = (1 << 32) - 1

#: Of both hosts: one lane for all; priorities are the bottleneck's business here.
POLICY: Final = f"""version = 1

[[lane]]
name = "flow"
timestamps = true

[[service]]
name = "flow"
ports = [{PORT}]

[[service.rule]]
action = "lane"
lane = "flow"
"""

Mode = Literal[
    "auto", "native", "generic", "native-zero-copy", "native-copy", "generic-copy", "mmsg", "portable"
]


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What to do; ``interface`` is the sender's, ``peer`` the address of the other one."""

    scenario: str
    controllers: tuple[str, ...]
    seconds: float
    seed: int
    interface: str
    peer: str
    mode: Mode = "auto"


def encode(flow: int, said: Acknowledgement) -> bytes:
    """An acknowledgement as the payload of a datagram."""
    ranges = said.ranges[:RANGES]
    head = _HEAD.pack(flow, len(ranges), min(round(said.delay * 1e6), _U32), said.ce_count & _U32)
    return head + _RANGES[len(ranges)].pack(*(number for pair in ranges for number in pair))


def decode(payload: bytes | memoryview) -> tuple[int, Acknowledgement] | None:
    """Flow and acknowledgement; None for what is none.  Any numbers: FlowController minds them."""
    if len(payload) < _HEAD.size:
        return None
    flow, count, microseconds, marked = _HEAD.unpack_from(payload)
    if count > RANGES or len(payload) != _HEAD.size + count * _RANGE_BYTES:
        return None
    numbers = _RANGES[count].unpack_from(payload, _HEAD.size)
    return flow, Acknowledgement(
        tuple(zip(numbers[::2], numbers[1::2], strict=True)), microseconds * 1e-6, marked
    )


def read_task(arguments: list[str]) -> Task:
    """From the command line.  Raises UsageError."""
    try:
        return msgspec.json.decode(arguments[1], type=Task)
    except (IndexError, msgspec.DecodeError) as error:
        raise UsageError(
            f"one argument, a task: {error}", hint="it is started by `sluice lab flow`"
        ) from None


def begin(ready: dict[str, Any]) -> float:
    """Say what is ready and wait for the time to begin, seconds of CLOCK_MONOTONIC.

    Raises UsageError when nothing comes.
    """
    say({"ready": ready})
    try:
        return float(sys.stdin.readline())
    except ValueError:
        raise UsageError("nobody said when to begin", hint="it is started by `sluice lab flow`") from None


def main(run: Callable[[Task], None]) -> None:
    """The whole process; an error that has a reason is its last line."""
    try:
        run(read_task(sys.argv))
    except SluiceError as error:
        say({"error": {"message": str(error), "hint": error.hint, "exit_code": error.exit_code}})
        raise SystemExit(error.exit_code) from None


def say(document: dict[str, Any]) -> None:
    """One line of JSON on stdout."""
    print(json.dumps(document), flush=True)


class Clock:
    """Seconds since the beginning; negative before it."""

    __slots__ = ("_began",)

    def __init__(self, began: float) -> None:
        self._began = began

    def now(self) -> float:
        """Of CLOCK_MONOTONIC, as the times of received packets are."""
        return time.monotonic() - self._began

    def of(self, nanoseconds: int) -> float:
        """When a packet was received, from a batch's column."""
        return nanoseconds * 1e-9 - self._began

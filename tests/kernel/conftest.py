# SPDX-License-Identifier: Apache-2.0
"""The steer program, loaded once for all tests of this level, and what belongs to it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sluice_cli.idle_socket import IdleSocket
from tests.kernel.datapath import load
from tests.kernel.steer_runs import SteerRuns
from xdp._libbpf import lib
from xdp.program import SteerProgram

EVERYTHING_PASSES = """
version = 1
[[lane]]
name = "only"
[[service]]
name = "none"
ports = [9]
"""


@pytest.fixture(scope="session")
def idle_socket() -> Iterator[IdleSocket]:
    """What makes a lane open to test runs."""
    with IdleSocket() as made:
        yield made


@pytest.fixture(scope="session")
def steer_program(idle_socket: IdleSocket) -> Iterator[SteerProgram]:
    """With a socket in each lane of queue 0, which is the queue that test runs come from."""
    with SteerProgram.load() as program:
        idle_socket.fill(program.maps["xsks"], lib.SLUICE_MAX_LANES)
        yield program


@pytest.fixture(scope="session")
def jumbo_program(idle_socket: IdleSocket) -> Iterator[SteerProgram]:
    """The same for packets in several buffers."""
    with SteerProgram.load(frags=True) as program:
        idle_socket.fill(program.maps["xsks"], lib.SLUICE_MAX_LANES)
        yield program


@pytest.fixture(scope="session")
def datapath_program() -> Iterator[SteerProgram]:
    """With the policy of tests/kernel/datapath.py; lanes that are opened take the places of older ones."""
    with load() as program:
        yield program


@pytest.fixture
def one_cpu() -> Iterator[int]:
    """This thread stays on one CPU: its counters are in one row."""
    before = os.sched_getaffinity(0)
    cpu = min(before)
    os.sched_setaffinity(0, {cpu})
    yield cpu
    os.sched_setaffinity(0, before)


@pytest.fixture
def runs(steer_program: SteerProgram, one_cpu: int) -> Iterator[SteerRuns]:
    """Run frames through the program.  Afterwards its counters balance, and its state is fresh again."""
    yield from _runs(steer_program)


@pytest.fixture
def jumbo_runs(jumbo_program: SteerProgram, one_cpu: int) -> Iterator[SteerRuns]:
    """The same through the program that takes packets in several buffers."""
    yield from _runs(jumbo_program)


def _runs(program: SteerProgram) -> Iterator[SteerRuns]:
    made = SteerRuns(program)
    yield made
    counters = program.counters()
    assert counters.balanced, counters
    made.use(EVERYTHING_PASSES)
    made.forget_strangers()
    made.forget_limits()
    made.strangers.close()

# SPDX-License-Identifier: Apache-2.0
"""Rings in one thread: against a deque, what is refused, counters, and the descriptors."""

from __future__ import annotations

import errno
import os
import resource
import select
import subprocess
import sys
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from userspace.datagram.ring import CAPACITY_MAX, ELEMENT_MAX, Ring, RingClosedError
from xdp.errors import SluiceError, UsageError

ROOT = Path(__file__).resolve().parents[2]

#: First indices: the usual one, and such that 32 bits or all 63 wrap around soon.
STARTS = st.sampled_from([0, (1 << 32) - 3, (1 << 63) - 1, (1 << 63) - 9])


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


class RingAgainstDeque(RuleBasedStateMachine):
    """Every call's result, the contents, the counters, and what the descriptors say."""

    @initialize(
        capacity=st.sampled_from([1, 2, 4, 8, 16]),
        size=st.sampled_from([1, 3, 8, 24, 64]),
        producers=st.sampled_from(["one", "many"]),
        start=STARTS,
    )
    def make(self, capacity: int, size: int, producers: Literal["one", "many"], start: int) -> None:
        self.ring = Ring(capacity, size, producers, _start=start)
        self.model: deque[bytes] = deque()
        self.put = self.got = self.refused = self.full = self.empty = self.most = 0
        self.closed = self.items_watched = self.room_watched = False
        self.short_get = self.short_put = False  # the last one of its side

    def element(self, number: int) -> bytes:
        return (number * 0x9E3779B97F4A7C15).to_bytes(64, "little")[: self.ring.element_size]

    @rule(count=st.integers(0, 20), whole=st.booleans(), timeout=st.sampled_from([0.0, -1.0]))
    def put_some(self, count: int, whole: bool, timeout: float) -> None:
        elements = [self.element(self.put + further) for further in range(count)]
        room = self.ring.capacity - len(self.model)

        def put() -> int:
            joined = b"".join(elements)
            if whole:
                return self.ring.put_many(joined, whole=True)
            return self.ring.put_many(memoryview(bytearray(joined)), timeout)

        if whole and count > self.ring.capacity:
            with pytest.raises(UsageError, match="never fit"):
                put()
            return
        if self.closed and count:
            with pytest.raises(RingClosedError):
                put()
            return
        expected = count if count <= room else 0 if whole else room
        assert put() == expected
        self.model.extend(elements[:expected])
        self.put += expected
        self.refused += count - expected
        self.full += expected < count
        self.most = max(self.most, len(self.model))
        self.short_put = expected < count
        if expected:
            self.short_get = False

    @rule(count=st.integers(0, 20), whole=st.booleans(), timeout=st.sampled_from([0.0, -1.0]))
    def get_some(self, count: int, whole: bool, timeout: float) -> None:
        size = self.ring.element_size
        into = bytearray(b"?" * (count * size))

        def get() -> int:
            return self.ring.get_many(into, whole=True) if whole else self.ring.get_many(into, timeout)

        if whole and count > self.ring.capacity:
            with pytest.raises(UsageError, match="never fit"):
                get()
            return
        if self.closed and not self.model and count:
            with pytest.raises(RingClosedError):
                get()
            return
        expected = min(count, len(self.model))
        if whole and not self.closed and expected < count:
            expected = 0
        assert get() == expected
        assert bytes(into) == b"".join(self.model.popleft() for _ in range(expected)).ljust(
            count * size, b"?"
        )
        self.got += expected
        self.empty += count > 0 and expected == 0
        self.short_get = expected < count
        if expected:
            self.short_put = False

    @rule()
    def watch_items(self) -> None:
        self.ring.fileno()
        self.short_get = self.short_get or not self.items_watched
        self.items_watched = True

    @rule()
    def watch_room(self) -> None:
        self.ring.room_fileno()
        self.short_put = self.short_put or not self.room_watched
        self.room_watched = True

    @precondition(lambda self: self.put > 20)
    @rule()
    def close(self) -> None:
        self.ring.close()
        self.closed = True

    @invariant()
    def counters_are_right(self) -> None:
        if not hasattr(self, "ring"):
            return
        counters = self.ring.counters()
        assert (counters.enqueued, counters.dequeued) == (self.put, self.got)
        assert counters.waiting == len(self.model)
        assert (counters.refused, counters.full, counters.empty) == (self.refused, self.full, self.empty)
        assert counters.high_water <= self.most
        assert (counters.high_water == self.ring.capacity) == (self.most == self.ring.capacity)
        assert self.ring.closed == self.closed

    @invariant()
    def descriptors_say_so(self) -> None:
        """Readable whenever there is something; and not for ever when there is nothing."""
        if not hasattr(self, "ring"):
            return
        if self.items_watched:
            if self.model or self.closed:
                assert readable(self.ring.fileno())
            elif self.short_get:
                assert not readable(self.ring.fileno())
        if self.room_watched:
            if len(self.model) < self.ring.capacity or self.closed:
                assert readable(self.ring.room_fileno())
            elif self.short_put:
                assert not readable(self.ring.room_fileno())


TestRingAgainstDeque = RingAgainstDeque.TestCase
TestRingAgainstDeque.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, print_blob=True
)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"capacity": 0}, "power of two up to 16777216, not 0"),
        ({"capacity": 3}, "power of two"),
        ({"capacity": -8}, "power of two"),
        ({"capacity": 2 * CAPACITY_MAX}, "power of two"),
        ({"capacity": 8, "element_size": 0}, "1 to 64 bytes, not 0"),
        ({"capacity": 8, "element_size": ELEMENT_MAX + 1}, "1 to 64 bytes, not 65"),
        ({"capacity": 8, "producers": "two"}, "'one' or 'many', not 'two'"),
    ],
)
def test_making_refuses(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Ring(**arguments)


def test_a_ring_says_what_it_is() -> None:
    ring = Ring(8, 64, "many")
    assert (ring.capacity, ring.element_size, ring.producers, ring.closed) == (8, 64, "many", False)
    assert repr(ring) == "<Ring of 8 x 64 bytes, many producer(s)>"
    with ring as same:
        assert same is ring
    assert ring.closed
    assert repr(ring).endswith(", closed>")


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Until the limit is put back, the next descriptor would be beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.dup(0)
    os.close(spare)  # the lowest that is free
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_descriptors_left() -> None:
    with no_more_descriptors(), pytest.raises(SluiceError, match="ring of 8 elements: Too many") as caught:
        Ring(8)
    assert caught.value.errno == errno.EMFILE
    assert "ulimit -n" in caught.value.hint


NO_MEMORY = """
import resource
from userspace.datagram.ring import CAPACITY_MAX, Ring
from xdp.errors import SluiceError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
try:
    Ring(CAPACITY_MAX, 64, producers="many")
except SluiceError as error:
    print(error, "-", error.hint)
"""


def test_no_memory_left() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "making a ring of 16777216 elements: Cannot allocate memory - make it smaller\n"


def test_its_descriptors_go_with_it() -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    ring = Ring(8)
    assert count() == before + 2
    ring.close()
    assert count() == before + 2, "somebody may still wait on them"
    del ring
    assert count() == before


def test_buffers_that_do_not_fit() -> None:
    ring = Ring(8, 24)
    with pytest.raises(UsageError, match="25 bytes are no whole number of elements of 24 bytes"):
        ring.put_many(bytes(25))
    with pytest.raises(UsageError, match="23 bytes are no whole"):
        ring.get_many(bytearray(23))
    with pytest.raises(UsageError, match="can be written"):
        ring.get_many(bytes(24))
    with pytest.raises(UsageError, match="contiguous"):
        ring.put_many(memoryview(bytes(48))[::2])
    with pytest.raises(UsageError, match="contiguous"):
        ring.put_many("text")  # type: ignore[arg-type]
    for wrong in ({"timeout": None}, {"timeout": 1.0}):
        with pytest.raises(UsageError, match="whole does not wait"):
            ring.put_many(bytes(24), whole=True, **wrong)
        with pytest.raises(UsageError, match="whole does not wait"):
            ring.get_many(bytearray(24), whole=True, **wrong)
    with pytest.raises(UsageError, match="not a number"):
        ring.get_many(bytearray(24), float("nan"))
    counters = ring.counters()
    assert counters.enqueued == counters.refused == counters.empty == 0


@pytest.mark.parametrize("producers", ["one", "many"])
def test_numbers(producers: Literal["one", "many"]) -> None:
    ring = Ring(8, producers=producers)
    assert ring.put_u64([0, 1, (1 << 64) - 1]) == 3
    assert ring.put_u64(array("Q", [3, 4])) == 2
    assert ring.put_u64(range(5, 9), whole=True) == 0
    assert ring.put_u64(range(5, 9)) == 3
    assert ring.get_u64(2) == array("Q", [0, 1])
    assert ring.get_u64(1000, timeout=None) == array("Q", [(1 << 64) - 1, 3, 4, 5, 6, 7])
    assert ring.get_u64(4) == ring.get_u64(0) == array("Q")
    for wrong in ([-1], [1 << 64], ["1"], 5):
        with pytest.raises(UsageError, match=r"from 0 to 2\^64 - 1"):
            ring.put_u64(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at most -1"):
        ring.get_u64(-1)
    assert ring.counters().enqueued == 8


def test_numbers_need_elements_of_eight_bytes() -> None:
    ring = Ring(8, 16)
    with pytest.raises(UsageError, match="16 bytes, not 8"):
        ring.put_u64([1])
    with pytest.raises(UsageError, match="16 bytes, not 8"):
        ring.get_u64(1)


@pytest.mark.parametrize("producers", ["one", "many"])
def test_what_was_put_before_close_is_got(producers: Literal["one", "many"]) -> None:
    ring = Ring(4, producers=producers)
    assert ring.put_u64([1, 2, 3]) == 3
    ring.close()
    ring.close()
    for timeout in (0.0, 60.0, None):
        with pytest.raises(RingClosedError, match="closed"):
            ring.put_u64([4], timeout)
    assert ring.get_u64(1, timeout=None) == array("Q", [1])
    into = array("Q", bytes(32))
    assert ring.get_many(into, whole=True) == 2, "four will never come"
    for timeout in (0.0, 60.0, None):
        with pytest.raises(RingClosedError, match="closed"):
            ring.get_u64(1, timeout)
    assert issubclass(RingClosedError, ValueError)  # as docs/api.md says of all that is closed


def test_a_wait_that_ends_without_anything() -> None:
    ring = Ring(2)
    assert ring.get_u64(1, timeout=0.01) == array("Q")
    assert ring.put_u64([1, 2, 3], timeout=0.01) == 2
    assert ring.put_u64([3], timeout=0.01) == 0
    counters = ring.counters()
    assert (counters.empty, counters.full, counters.refused, counters.high_water) == (1, 2, 2, 2)

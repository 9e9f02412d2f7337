# SPDX-License-Identifier: Apache-2.0
"""The part of the batch manager that knows neither clock nor lanes, in virtual time."""

from __future__ import annotations

import errno
import math
from array import array
from ipaddress import ip_address
from typing import Any

import pytest

from userspace.datagram.batch_queue import BatchQueue, OutgoingBatch
from userspace.datagram.batch_statistics import Reason
from userspace.datagram.batch_targets import Fanouts, Target, Targets
from userspace.native._native import ffi
from xdp.errors import UsageError

TARGETS = Targets()
A, B, C = (TARGETS["127.0.0.1", port] for port in (1, 2, 3))

# Times are multiples of this, so that sums of them are exact.
TICK = 1 / 1024
TIMEOUT, AGE, RETRY = 5 * TICK, 40 * TICK, 2 * TICK


def queue(**options: Any) -> BatchQueue:
    return BatchQueue(
        **{
            "batch_size": 4,
            "batch_timeout": TIMEOUT,
            "buffers": 12,
            "buffer_size": 100,
            "priorities": 3,
            "maximum_age": AGE,
            "retry": RETRY,
            **options,
        }
    )


def add(q: BatchQueue, *payloads: bytes, to: Target = A, priority: int = 2, now: float = 0.0) -> None:
    for payload in payloads:
        assert q.add(to, payload, priority, now)


def taken(q: BatchQueue, reason: Reason, now: float = 0.0) -> tuple[OutgoingBatch, list[bytes]]:
    batch = q.take(reason, now)
    return batch, [bytes(payload) for payload in batch.payloads]


def test_due_by_size_and_by_time() -> None:
    q = queue()
    assert q.next_flush() is None
    assert q.due(1e9) is None
    add(q, b"1", now=1.0)
    add(q, b"2", b"3", now=1.0 + TICK)
    assert q.next_flush() == 1.0 + TIMEOUT
    assert q.due(1.0 + TIMEOUT - TICK) is None
    assert q.due(1.0 + TIMEOUT) == "time"
    add(q, b"4", b"5", now=1.0 + TICK)
    assert q.due(1.0 + TICK) == "size"
    batch, payloads = taken(q, "size")
    assert payloads == [b"1", b"2", b"3", b"4"]
    q.settle(batch, 1.0 + TICK, calls=1, unsent={})
    assert q.next_flush() == 1.0 + TICK + TIMEOUT
    assert q.waiting == q.ready == 1


def test_highest_first_also_when_a_lower_one_is_older() -> None:
    q = queue()
    add(q, b"low 1", b"low 2", priority=2, now=0.0)
    add(q, b"middle", priority=1, now=TICK)
    add(q, b"high 1", b"high 2", priority=0, now=2 * TICK)
    batch, payloads = taken(q, "size")
    assert payloads == [b"high 1", b"high 2", b"middle", b"low 1"]
    assert batch.parts == [(0, 2), (1, 1), (2, 1)]
    # There was room for two: those with the highest priority had it.
    q.settle(batch, TICK, calls=1, unsent={2: errno.EAGAIN, 3: errno.EAGAIN})
    assert q.ready == 0
    add(q, b"high 3", priority=0, now=TICK)
    assert q.due(TICK) is None
    assert q.due(TICK + RETRY) == "retry"
    assert taken(q, "retry", TICK + RETRY)[1] == [b"high 3", b"middle", b"low 1", b"low 2"]


def test_what_fails_is_named_and_the_rest_is_sent() -> None:
    q = queue()
    add(q, b"1", to=A)
    add(q, b"22", to=B, priority=1)
    batch, _ = taken(q, "demand")
    q.settle(batch, 0.0, calls=1, unsent={0: errno.EMSGSIZE})
    (failure,) = q.failures
    assert failure.destination == B.endpoint
    assert (failure.errno, failure.priority, failure.size) == (errno.EMSGSIZE, 1, 2)
    statistics = q.statistics()
    assert (statistics.sent, statistics.failed, statistics.failures) == (1, 1, {errno.EMSGSIZE: 1})
    assert statistics.balanced
    assert q.next_flush() is None


def test_one_full_way_does_not_hold_up_the_others() -> None:
    """B has no room, what comes behind it has: B waits in its order, the others go on."""
    q = queue()
    add(q, b"a1", to=A)
    add(q, b"b1", b"b2", to=B)
    add(q, b"c1", to=C)
    batch, _ = taken(q, "size")
    q.settle(batch, TICK, calls=1, unsent={1: errno.EAGAIN, 2: errno.ENOBUFS})
    assert (q.waiting, q.ready) == (2, 0)
    assert q.next_flush() == TICK + RETRY
    add(q, b"b3", to=B, now=TICK)
    add(q, b"a2", b"a3", b"a4", to=A, now=TICK)
    assert q.due(TICK) is None
    add(q, b"c2", to=C, now=TICK)
    assert q.due(TICK) == "size"
    batch, payloads = taken(q, "size")
    assert payloads == [b"a2", b"a3", b"a4", b"c2"]
    q.settle(batch, TICK, calls=1, unsent={})
    assert q.due(TICK + RETRY) == "retry"
    batch, payloads = taken(q, "retry", TICK + RETRY)
    assert payloads == [b"b1", b"b2", b"b3"]
    q.settle(batch, TICK + RETRY, calls=1, unsent={})
    assert q.statistics().attempts == {"size": 2, "time": 0, "demand": 0, "retry": 1}
    assert q.next_flush() is None


def test_a_short_timeout_counts_beside_what_is_held() -> None:
    q = queue(batch_timeout=TICK)
    add(q, b"b", to=B)
    add(q, b"a", to=A)
    batch, _ = taken(q, "demand")
    q.settle(batch, 0.0, calls=1, unsent={0: errno.EAGAIN})
    assert q.next_flush() == RETRY
    add(q, b"a", to=A)
    assert q.next_flush() == TICK
    assert q.due(TICK) == "time"
    q.unblock()
    assert q.ready == 2


def test_too_old_is_dropped_only_when_there_was_no_room() -> None:
    q = queue()
    add(q, b"old", to=A)
    add(q, b"older than needed", to=B, priority=0, now=TICK)
    late = AGE + 5.0
    batch, _ = taken(q, "time")
    q.settle(batch, late, calls=1, unsent={})
    assert q.statistics().sent == 2
    add(q, b"1", now=late)
    add(q, b"2", now=late + TICK)
    batch, _ = taken(q, "demand")
    q.settle(batch, late + AGE, calls=1, unsent={0: errno.EAGAIN, 1: errno.EAGAIN})
    statistics = q.statistics()
    assert (statistics.expired, statistics.waiting) == (1, 1)
    assert statistics.balanced


def test_without_a_buffer_it_is_refused_unless_a_lower_one_gives_way() -> None:
    q = queue(buffers=4)
    add(q, b"low 1", b"low 2", priority=2)
    add(q, b"middle 1", b"middle 2", priority=1)
    assert not q.add(A, b"low 3", 2, 0.0)
    assert q.statistics().refused == 1
    assert q.add(A, b"high", 0, 0.0)
    assert [(one.errno, one.priority, one.size) for one in q.failures] == [(errno.ENOBUFS, 2, 5)]
    assert taken(q, "demand")[1] == [b"high", b"middle 1", b"middle 2", b"low 1"]
    with pytest.raises(UsageError, match="bytes-like"):
        q.add(A, "text", 0, 0.0)  # type: ignore[arg-type]
    assert q.waiting == 4, "nothing gives way to what is wrong"
    assert q.statistics().balanced


def test_nothing_is_due_when_the_only_ready_one_gave_way() -> None:
    q = queue(batch_size=2, buffers=2, batch_timeout=TICK)
    add(q, b"b", to=B)
    add(q, b"a", to=A)
    batch, _ = taken(q, "size")
    q.settle(batch, 0.0, calls=1, unsent={0: errno.EAGAIN})
    add(q, b"a", to=A)
    assert q.next_flush() == TICK
    add(q, b"b", to=B, priority=0)  # the latest of the lowest is the one to A
    assert q.ready == 0
    assert q.next_flush() == RETRY
    assert q.due(RETRY - TICK) is None


def test_all_is_given_up() -> None:
    q = queue()
    add(q, b"1", b"2", priority=1)
    add(q, b"3", priority=0)
    assert q.give_up(errno.ENXIO) == 3
    assert [one.priority for one in q.failures] == [0, 1, 1]
    assert q.statistics().failures == {errno.ENXIO: 3}
    assert q.statistics().balanced
    assert q.next_flush() is None
    assert q.take("demand", 0.0).slots == []


@pytest.mark.parametrize(
    ("payload", "copied"),
    [
        (b"bytes", b"bytes"),
        (bytearray(b"array"), b"array"),
        (memoryview(b"a view")[2:], b"view"),
        (array("I", [1, 2]), array("I", [1, 2]).tobytes()),
        (memoryview(bytes(range(8))).cast("B", (2, 4)), bytes(range(8))),
        (ffi.buffer(ffi.new("char[]", b"cffi")), b"cffi\0"),
        (b"", b""),
        (bytes(100), bytes(100)),
    ],
)
def test_payloads_are_copied(payload: Any, copied: bytes) -> None:
    q = queue()
    add(q, b"before", payload, b"behind")
    if isinstance(payload, bytearray):
        payload[:] = b"other"
    assert taken(q, "demand")[1] == [b"before", copied, b"behind"]


@pytest.mark.parametrize(
    ("payload", "priority", "match"),
    [
        (bytes(101), 0, "101 bytes; a buffer has 100"),
        (array("Q", range(13)), 0, "104 bytes; a buffer has 100"),
        ("text", 0, "bytes-like"),
        (7, 0, "bytes-like"),
        ([1, 2], 0, "bytes-like"),
        (memoryview(b"abcdef")[::2], 0, "in one piece"),
        (b"", 3, r"priority is 0 \(the highest\) to 2, not 3"),
        (b"", -1, "priority is 0"),
        (b"", "high", "priority is 0"),
        (b"", 1.0, "priority is 0"),
    ],
)
def test_what_is_wrong_changes_nothing(payload: Any, priority: Any, match: str) -> None:
    q = queue()
    add(q, b"there")
    before = q.statistics()
    with pytest.raises(UsageError, match=match):
        q.add(A, payload, priority, 0.0)
    assert q.statistics() == before
    assert taken(q, "demand")[1] == [b"there"]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": 1 << 17, "buffers": 1 << 16},
        {"batch_size": 1.5},
        {"batch_size": "64"},
        {"buffers": 3},
        {"buffers": 1 << 17},
        {"buffer_size": 0},
        {"buffer_size": 65_528},
        {"buffers": 65_536, "buffer_size": 65_527},
        {"priorities": 0},
        {"priorities": 257},
        {"batch_timeout": -1.0},
        {"batch_timeout": math.nan},
        {"batch_timeout": "5 ms"},
        {"maximum_age": math.inf},
        {"retry": 0},
    ],
)
def test_values_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        queue(**options)


def test_defaults() -> None:
    q = BatchQueue()
    assert (q.batch_size, len(q.free), q.buffer_size, q.priorities) == (64, 1024, 65_527, 8)
    add(q, b"x", now=1.0)
    assert q.next_flush() == pytest.approx(1.005)


def test_sizes_and_delays_of_batches() -> None:
    q = queue()
    for count in (1, 2, 3, 4, 4):
        add(q, *[b"abc"] * count, now=1.0)
        batch = q.take("demand", 0.0)
        q.settle(batch, 1.0 + count * TICK, calls=2, unsent={})
    statistics = q.statistics()
    assert statistics.sizes == (1, 2, 2)
    assert statistics.batches == 5
    assert statistics.packets_per_batch == 14 / 5
    assert statistics.calls == 10
    assert statistics.bytes == 42
    tick = TICK * 1e6
    assert statistics.delay_minimum_us == pytest.approx(tick)
    assert statistics.delay_maximum_us == pytest.approx(4 * tick)
    assert statistics.delay_mean_us == pytest.approx((1 + 4 + 9 + 16 + 16) / 14 * tick)
    fresh = queue().statistics()
    assert (fresh.packets_per_batch, fresh.delay_mean_us, fresh.delay_minimum_us) == (0.0, 0.0, 0.0)


class TestTargets:
    def test_one_endpoint_is_one_target(self) -> None:
        targets = Targets()
        target = targets["192.0.2.1", 7]
        assert targets[ip_address("192.0.2.1"), 7] is target
        assert targets["192.0.2.1", 7] is target
        assert target.endpoint == ("192.0.2.1", 7)
        assert targets["192.0.2.1", 8] is not target

    def test_their_number_is_bounded(self) -> None:
        targets = Targets(kept=10)
        for port in range(1, 100):
            assert targets["192.0.2.1", port].endpoint == ("192.0.2.1", port)
            assert len(targets) <= 10

    @pytest.mark.parametrize(
        "wrong", [("localhost", 9), ("192.0.2.1", 0), ("192.0.2.1", "9"), ("::1", 9, 0, 0), (), 7, ("x",)]
    )
    def test_what_is_no_endpoint(self, wrong: Any) -> None:
        targets = Targets()
        with pytest.raises(UsageError):
            targets[wrong]
        assert not targets

    def test_fanouts_are_put_together_and_kept(self) -> None:
        fanouts = Fanouts(kept=2)
        six = TARGETS["fe80::1%1", 9]
        made = fanouts.find((A, six, A))
        parsed = type(made).__mro__[1]([A.endpoint, six.endpoint, A.endpoint])
        assert made.endpoints == parsed.endpoints
        assert made.addresses == parsed.addresses
        assert bytes(ffi.buffer(made.sources)) == bytes(ffi.buffer(parsed.sources))
        assert fanouts.find((A, B)) is not made
        assert fanouts.find((A, six, A)) is made
        fanouts.find((B, A))
        assert len(fanouts) == 2
        assert fanouts.find((A, six, A)) is made, "the one that was used longest ago went"

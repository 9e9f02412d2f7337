# SPDX-License-Identifier: Apache-2.0
"""A bounded ring between threads, without locks: batches of elements of one size, and back-pressure.

    ring = Ring(1024, producers="many")
    ring.put_u64([1, 2, 3])          # in any thread
    ring.get_u64(64, timeout=None)   # in one thread: array('Q', [1, 2, 3])

What goes on underneath, and why it is right, is in userspace/native/channel.h.  A call costs some
0.6 µs, nearly all of it Python's: hand over batches.  For single objects queue.SimpleQueue is faster.
"""

from __future__ import annotations

import errno
import threading
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from typing_extensions import Buffer

from userspace.native._native import ffi, lib
from xdp.errors import SluiceError, UsageError

if TYPE_CHECKING:
    from userspace.native._native import CData

CAPACITY_MAX: int = lib.SL_CHANNEL_CAPACITY_MAX
ELEMENT_MAX: int = lib.SL_CHANNEL_ELEMENT_MAX

#: Of indices, which count elements and wrap at 2^63.
_INDICES = 1 << 63

_FOREVER = -1.0  # a wait without a timeout

# Looked up once: an attribute of lib costs 35 ns at every use.
_put = lib.sl_channel_put
_get = lib.sl_channel_get
_put_wait = lib.sl_channel_put_wait
_get_wait = lib.sl_channel_get_wait
_from_buffer = ffi.from_buffer
_this_thread = threading.get_ident


class RingClosedError(ValueError):
    """The ring is closed: nothing can be put, or nothing is left to get."""


@dataclass(frozen=True, slots=True)
class RingCounters:
    """Elements since the beginning, but for ``full`` and ``empty``, which are calls, and the last two.

    ``waiting`` = ``enqueued`` - ``dequeued``.  ``refused``: of puts that gave up because the ring was
    full, so ``enqueued`` + ``refused`` is what was offered before it was closed.  ``full``: puts that
    met too little room, also when they then waited for it; ``empty``: gets that returned nothing.
    ``high_water``: the most that were seen waiting; exact when it is the capacity, else a short
    peak may be missed.  ``consumer_wakes`` and ``producer_wakes``: times that a sleeping side was woken.
    """

    enqueued: int
    dequeued: int
    waiting: int
    refused: int
    full: int
    empty: int
    high_water: int
    consumer_wakes: int
    producer_wakes: int


class Ring:
    """``capacity`` (a power of two) elements of ``element_size`` bytes (1 to 64) between threads.

    ``producers``: "one" thread that puts, which is faster, or "many".  One thread gets.  With
    ``debug`` (on unless Python runs with ``-O``) the first thread that puts into a ring for one, and the
    first that gets, own that side: another one raises UsageError, unless the owner has ended or
    `hand_over` was called.  Without, such a mistake damages elements.

    An element of 8 bytes is an index or an address, one of 64 a descriptor; what they stand for must
    live as long as they are in the ring.  Raises UsageError for a wrong argument.
    """

    def __init__(
        self,
        capacity: int,
        element_size: int = 8,
        producers: Literal["one", "many"] = "one",
        *,
        debug: bool = __debug__,
        _start: int = 0,
    ) -> None:
        """``_start`` is the first index, for tests of the wrap-around."""
        if not (0 < capacity <= CAPACITY_MAX and capacity & (capacity - 1) == 0):
            raise UsageError(
                f"a ring's capacity is a power of two up to {CAPACITY_MAX}, not {capacity}",
                hint="round it up: 1 << (capacity - 1).bit_length()",
            )
        if not 0 < element_size <= ELEMENT_MAX:
            raise UsageError(
                f"an element has 1 to {ELEMENT_MAX} bytes, not {element_size}",
                hint="pass what is larger by its index or address",
            )
        if producers not in {"one", "many"}:
            raise UsageError(f"producers are 'one' or 'many', not {producers!r}")
        options = ffi.new("struct sl_channel_options *")
        options.capacity, options.element_size = capacity, element_size
        options.many, options.start = producers == "many", _start % _INDICES
        code = ffi.new("int *")
        channel = lib.sl_channel_new(options, code)
        if channel == ffi.NULL:
            raise SluiceError.from_errno(
                f"making a ring of {capacity} elements",
                code[0],
                hint="make it smaller" if code[0] == errno.ENOMEM else "raise `ulimit -n`: a ring takes two",
            )
        # Threads in a call hold this object, so nobody is in there when it goes.
        self._channel: CData = ffi.gc(channel, lib.sl_channel_free, capacity * element_size)
        self._capacity, self._element_size = capacity, element_size
        self._producers: Literal["one", "many"] = producers
        self._debug = debug
        self._check_producer = debug and producers == "one"
        self._producer = self._consumer = 0  # the owning threads' idents; 0: nobody yet

    @property
    def capacity(self) -> int:
        """Elements that fit."""
        return self._capacity

    @property
    def element_size(self) -> int:
        """Bytes."""
        return self._element_size

    @property
    def producers(self) -> Literal["one", "many"]:
        """How many threads may put."""
        return self._producers

    @property
    def closed(self) -> bool:
        """Whether `close` was called; something may be left to get."""
        return bool(lib.sl_channel_closed(self._channel))

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return (
            f"<Ring of {self._capacity} x {self._element_size} bytes, {self._producers} producer(s){state}>"
        )

    # putting

    def put_many(self, elements: Buffer, timeout: float | None = 0.0, *, whole: bool = False) -> int:
        """Put the elements that ``elements`` holds, one behind the other; returns how many were accepted.

        They are copied, in order.  Fewer than all when the ring stays full for ``timeout`` seconds (0: does
        not wait, None: for ever) or is closed meanwhile: the rest is still the caller's.  While it waits,
        other producers' elements may come in between.  ``whole``: all or none; does not wait.

        Raises RingClosedError when it was closed before, UsageError for bytes that are no whole number
        of elements and for more than could ever fit whole.
        """
        if self._check_producer and self._producer != _this_thread():
            self._producer = self._own(self._producer, "puts into")
        try:
            data = _from_buffer("uint8_t[]", elements)
        except (TypeError, BufferError) as error:
            raise UsageError(f"elements are contiguous bytes: {error}") from None
        count, rest = divmod(len(data), self._element_size)
        if rest:
            raise self._odd(len(data))
        if timeout == 0 or whole:
            self._check_whole(timeout)
            result = _put(self._channel, data, count, whole)
            if result < 0:
                raise self._failure(result, count)
            return result
        return self._put_waiting(data, count, timeout)

    def _put_waiting(self, data: CData, count: int, timeout: float | None) -> int:
        end = _end(timeout)
        left, done = _left(end), 0
        while True:
            result = _put_wait(self._channel, data + done * self._element_size, count - done, left)
            if result > 0:
                done += result
            elif result < 0 and result != -errno.EINTR:
                if done:
                    return done
                raise self._failure(result, count)
            # Python runs signal handlers between two calls.
            left = _left(end)
            if done == count or left == 0:
                return done

    def put_u64(
        self, values: array[int] | Iterable[int], timeout: float | None = 0.0, *, whole: bool = False
    ) -> int:
        """`put_many` for elements of 8 bytes, numbers from 0 to 2^64 - 1; at best an ``array('Q')``."""
        self._check_u64()
        if not (isinstance(values, array) and values.typecode == "Q"):
            try:
                values = array("Q", list(values))
            except (TypeError, OverflowError) as error:
                raise UsageError(f"an element is a number from 0 to 2^64 - 1: {error}") from None
        return self.put_many(values, timeout, whole=whole)

    # getting

    def get_many(self, into: Buffer, timeout: float | None = 0.0, *, whole: bool = False) -> int:
        """Take as many elements as ``into`` has room for, or as there are; returns how many.

        Waits up to ``timeout`` seconds (0: not, None: for ever) for the first one; 0 when there was none.
        ``whole``: as many as there is room for, or none; does not wait.

        Raises RingClosedError when it is closed and nothing is left; what is left then also comes
        when it is less than ``whole`` asks for.  UsageError as for `put_many`, and when ``into`` can't be
        written.
        """
        if self._debug and self._consumer != _this_thread():
            self._consumer = self._own(self._consumer, "gets from")
        try:
            data = _from_buffer("uint8_t[]", into, True)  # by keyword: 60 ns more
        except (TypeError, BufferError) as error:
            raise UsageError(f"elements go into contiguous bytes that can be written: {error}") from None
        count, rest = divmod(len(data), self._element_size)
        if rest:
            raise self._odd(len(data))
        if timeout == 0 or whole:
            self._check_whole(timeout)
            result = _get(self._channel, data, count, whole)
        else:
            end = _end(timeout)
            result = _get_wait(self._channel, data, count, _left(end))
            while result == -errno.EINTR:
                result = _get_wait(self._channel, data, count, _left(end))
        if result < 0:
            raise self._failure(result, count)
        return result

    def get_u64(self, maximum: int, timeout: float | None = 0.0) -> array[int]:
        """`get_many` for elements of 8 bytes: at most ``maximum`` numbers, in an array of their own."""
        self._check_u64()
        if maximum < 0:
            raise UsageError(f"at most {maximum} elements")
        values = array("Q", bytes(8 * min(maximum, self._capacity)))
        del values[self.get_many(values, timeout) :]
        return values

    # waiting elsewhere

    def fileno(self) -> int:
        """An eventfd of the getting side: readable when there may be something to get, or it is closed.

        For event loops, which must only poll it.  It stays readable until a get finds fewer elements
        than it asks for.  From the first call on such a get costs a system call more.
        """
        return lib.sl_channel_item_fd(self._channel)

    def room_fileno(self) -> int:
        """The same for the putting side: readable when one element may fit, until a put is refused some."""
        return lib.sl_channel_room_fd(self._channel)

    # closing, looking

    def close(self) -> None:
        """Nothing more is accepted, and who waits is woken.

        Gets give what is left, then RingClosedError.  From any thread, also again.  Memory and
        descriptors go with the object.
        """
        lib.sl_channel_close(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def counters(self) -> RingCounters:
        """From any thread; while others put and get, of slightly different moments."""
        read = ffi.new("struct sl_channel_counters *")
        lib.sl_channel_read_counters(self._channel, read)
        return RingCounters(
            enqueued=read.enqueued,
            dequeued=read.dequeued,
            waiting=read.waiting,
            refused=read.refused,
            full=read.full,
            empty=read.empty,
            high_water=read.high_water,
            consumer_wakes=read.consumer_wakes,
            producer_wakes=read.producer_wakes,
        )

    def hand_over(self) -> None:
        """Other threads may put and get from now on: whoever comes first owns a side again.

        The one that did must be through with it, and the other one must know: started or told afterwards.
        """
        self._producer = self._consumer = 0

    # mistakes

    def _own(self, owner: int, what: str) -> int:
        for thread in threading.enumerate():
            if thread.ident == owner:  # one that has ended is not listed
                raise UsageError(
                    f"{threading.current_thread().name} {what} a ring that belongs to {thread.name}",
                    hint="several may put with producers='many', one may get; hand_over() changes the owner",
                )
        return _this_thread()

    def _odd(self, size: int) -> UsageError:
        return UsageError(f"{size} bytes are no whole number of elements of {self._element_size} bytes")

    @staticmethod
    def _check_whole(timeout: float | None) -> None:
        if timeout != 0:
            raise UsageError("whole does not wait", hint="leave out `whole`, or `timeout`")

    def _check_u64(self) -> None:
        if self._element_size != 8:
            raise UsageError(
                f"the elements of this ring have {self._element_size} bytes, not 8",
                hint="use put_many and get_many",
            )

    def _failure(self, result: int, count: int) -> Exception:
        if result == -errno.EBADF:
            return RingClosedError("this ring is closed")
        if result == -errno.EBUSY:
            return UsageError(
                "two threads put at the same time into a ring for one", hint="make it with producers='many'"
            )
        return UsageError(f"{count} elements never fit into a ring of {self._capacity}")


def _end(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    if timeout != timeout:  # noqa: PLR0124 (that is what NaN is)
        raise UsageError("timeout is not a number")
    return time.monotonic() + timeout


def _left(end: float | None) -> float:
    return _FOREVER if end is None else max(end - time.monotonic(), 0.0)

# SPDX-License-Identifier: Apache-2.0
"""Event loops to run a test in, and cancellation at every place where a coroutine waits."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Protocol, TypeVar

import pytest

from tests.unit.socket_backends import DEADLINE

T = TypeVar("T")


class Run(Protocol):
    """What the fixture `run` is."""

    def __call__(self, main: Coroutine[Any, Any, T]) -> T: ...


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine in a loop of its own, with a deadline."""
    factory = asyncio.new_event_loop
    if request.param == "uvloop":
        factory = pytest.importorskip("uvloop", reason="uvloop is not installed").new_event_loop

    def body(main: Coroutine[Any, Any, T]) -> T:
        return run_in(factory, main)

    return body


#: For what has nothing to do with the loop: once is enough.
asyncio_only = pytest.mark.parametrize("run", ["asyncio"], indirect=True)


def run_in(factory: Callable[[], asyncio.AbstractEventLoop], main: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(4 * DEADLINE):
            return await main

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(limited())


def readers(loop: asyncio.AbstractEventLoop) -> int:
    """Descriptors that a loop watches; 0 where it does not tell."""
    selector = getattr(loop, "_selector", None)
    return 0 if selector is None else len(selector.get_map())


@types.coroutine
def _observed(coroutine: Coroutine[Any, Any, T], suspended: Callable[[Any], None]) -> Generator[Any, Any, T]:
    """As the coroutine; ``suspended`` is called with what it waits for, None: for its next turn."""
    result: object = None
    raised: BaseException | None = None
    while True:
        try:
            what = coroutine.send(result) if raised is None else coroutine.throw(raised)
        except StopIteration as end:
            value: T = end.value
            return value
        suspended(what)
        raised = None
        try:
            result = yield what
        except BaseException as error:  # noqa: BLE001 - the coroutine's to handle
            raised = error


async def until(condition: Callable[[], object]) -> None:
    """Within the deadline of the test."""
    while not condition():  # noqa: ASYNC110 - of the world outside, which sets no event
        await asyncio.sleep(0.001)


async def cancelled_at(
    number: int,
    coroutine: Coroutine[Any, Any, object],
    *,
    late: bool,
    suspended: Callable[[], None] = lambda: None,
) -> bool:
    """Cancel it where it waits for the ``number``-th time (from 0); False: it ended before.

    ``late``: only when what it waits for is there, but it has not gone on yet.  ``suspended`` is called
    each time that it waits.
    """
    count = 0

    def reached(what: Any) -> None:
        nonlocal count
        count += 1
        if count == number + 1:
            if late and what is not None:
                what.add_done_callback(lambda _: task.cancel())
            else:
                asyncio.get_running_loop().call_soon(task.cancel)
        suspended()

    async def body() -> object:
        return await _observed(coroutine, reached)

    task = asyncio.ensure_future(body())
    try:
        await task
    except asyncio.CancelledError:
        return True
    assert count <= number, "the cancellation got lost"
    return False

# SPDX-License-Identifier: Apache-2.0
"""How endpoints end, on real sockets: by their program, its errors, or the lanes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.aio_endpoints import (
    GATHERED,
    Echo,
    closed,
    received,
    sender,
    services,
    unused,
)
from tests.unit.event_loops import Run, run
from tests.unit.socket_backends import (
    Lanes,
    Open,
    Sender,
    backend,
    free_port,
    open_lanes,
    port,
)
from userspace.datagram import aio_protocol
from userspace.datagram.aio_protocol import open_endpoint

__all__ = ["backend", "open_lanes", "port", "run", "sender"]  # fixtures: in use, though only as arguments


def test_what_protocols_raise(open_lanes: Open, port: int, sender: Sender, run: Run) -> None:
    """Goes to the loop's exception handler; nothing else is lost by it."""
    lanes = open_lanes()

    class Raising(Echo):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            if data == b"V bad":
                raise RuntimeError("bad")
            super().datagram_received(data, addr)

        def error_received(self, exc: Exception) -> None:
            raise RuntimeError("worse") from exc

    class Failing(Echo):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            raise RuntimeError("worst")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        said: list[str] = []
        loop.set_exception_handler(lambda _loop, context: said.append(str(context["exception"])))
        with pytest.raises(RuntimeError, match="worst"):
            await open_endpoint(Failing, lanes, port=port)
        with pytest.raises(TypeError):
            await open_endpoint(lambda: Echo(1), lanes, port=port)  # type: ignore[call-arg]
        assert unused(lanes)
        transport, protocol = await open_endpoint(Raising, lanes, port=port)
        sender.send(b"V1", b"V bad", b"V2")
        assert await received(sender.sock, 2) == [b"V1", b"V2"]
        transport.sendto(bytes(70_000), sender.sock.getsockname())
        transport.close()
        await closed(transport, protocol)
        assert said == ["bad", "worse"]
        assert lanes.census()["held"] == 0

    run(main())


def test_close_sends_what_waits_and_abort_does_not(
    open_lanes: Open, port: int, sender: Sender, run: Run
) -> None:
    lanes = open_lanes()

    async def main() -> None:
        name = sender.sock.getsockname()
        for number, end in enumerate(("close", "abort", "close")):
            transport, protocol = await open_endpoint(Echo, lanes, port=port)
            for _ in range(3):
                transport.sendto(b"%d" % number, name)
            getattr(transport, end)()
            assert transport.is_closing()
            transport.sendto(b"after the end", name)
            await closed(transport, protocol)
            statistics = transport.statistics()
            assert (statistics.sent, statistics.dropped) == ((3, 1) if end == "close" else (0, 4))
            transport.abort()
            transport.close()
            await asyncio.sleep(0)
            assert protocol.calls == ["connection_made", "connection_lost"]
        assert await received(sender.sock, 6) == [b"0"] * 3 + [b"2"] * 3

    run(main())


@pytest.mark.parametrize("what", ["abort", "close", "sendto"])
def test_a_protocol_that_acts_on_an_error(
    open_lanes: Open,
    port: int,
    sender: Sender,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """From within the call that sends."""
    monkeypatch.setattr(aio_protocol, "GATHERED", GATHERED)
    lanes = open_lanes()
    name = sender.sock.getsockname()

    class Acting(Echo):
        def error_received(self, exc: Exception) -> None:
            super().error_received(exc)
            if what == "sendto":
                for number in range(GATHERED + 10):
                    self.transport.sendto(b"%d" % number, name)
                self.transport.close()
            else:
                getattr(self.transport, what)()

    async def main() -> None:
        transport, protocol = await open_endpoint(Acting, lanes, port=port)
        for payload in (b"a", bytes(70_000), b"b"):
            transport.sendto(payload, name)
        await closed(transport, protocol)
        statistics = transport.statistics()
        sent = {"abort": 2, "close": 2, "sendto": GATHERED + 12}[what]
        assert (statistics.sent, statistics.failed, statistics.dropped) == (sent, 1, 0)
        assert len(await received(sender.sock, sent)) == sent

    run(main())


def test_lanes_that_are_closed(open_lanes: Open, port: int, run: Run) -> None:
    """All endpoints are told, also when it is found by sending."""
    ports = sorted({port, free_port()})
    lanes = open_lanes(services(ports))

    async def main() -> None:
        made = [await open_endpoint(Echo, lanes, port=one) for one in ports]
        lanes.close()
        for one in made:
            await closed(*one, error=ValueError)
        again: Lanes = open_lanes(services(ports))
        transport, protocol = await open_endpoint(Echo, again, port=ports[0])
        again.close()
        transport.sendto(b"x", ("127.0.0.1", 9))
        await closed(transport, protocol, error=ValueError)
        assert transport.statistics().dropped == 1
        assert unused(lanes)
        with pytest.raises(ValueError, match="closed"):
            await open_endpoint(Echo, again, port=ports[0])

    run(main())

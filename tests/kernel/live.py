# SPDX-License-Identifier: Apache-2.0
"""Datagrams from the lab's client to a socket of its server, numbered, none too many at once."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Self

from sluice_cli.lab import Lab

PORT = 8001
#: Datagrams on their way: a veth's ring holds 256, and what overflows there is no loss of ours.
WINDOW = 64
SILENCE = 5.0  # seconds without a datagram: it was lost


class Traffic(AbstractContextManager["Traffic"]):
    """Runs from entry to :meth:`stop`: a sender and a receiver that count what they did."""

    def __init__(self, lab: Lab, port: int = PORT) -> None:
        self._held = ExitStack()
        with lab.server.enter():
            self._in = self._held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self._in.bind((str(lab.server.ipv4), port))
        self._in.settimeout(0.05)
        with lab.client.enter():
            self._out = self._held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self._out.connect((str(lab.server.ipv4), port))
        self._stop = threading.Event()
        self._room = threading.Semaphore(WINDOW)
        self.sent = 0
        self.received: list[int] = []
        self._threads = [threading.Thread(target=work) for work in (self._send, self._receive)]

    def _send(self) -> None:
        while not self._stop.is_set():
            # Denied after a loss of WINDOW datagrams; then there is nothing more to learn.
            if not self._room.acquire(timeout=SILENCE):
                return
            self._out.send(self.sent.to_bytes(4, "big"))
            self.sent += 1

    def _receive(self) -> None:
        last = time.monotonic()
        while time.monotonic() - last < SILENCE:
            if self._stop.is_set() and not self._threads[0].is_alive() and len(self.received) == self.sent:
                return
            try:
                data = self._in.recv(64)
            except TimeoutError:
                continue
            self.received.append(int.from_bytes(data, "big"))
            self._room.release()
            last = time.monotonic()

    def wait_for(self, count: int) -> None:
        """Until ``count`` more have arrived."""
        target = len(self.received) + count
        deadline = time.monotonic() + 2 * SILENCE
        while len(self.received) < target:
            assert time.monotonic() < deadline, f"{len(self.received)} of {self.sent} arrived"
            time.sleep(0.001)

    def stop(self) -> None:
        """Ends the sending and waits for what is on its way; idempotent."""
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._held.close()

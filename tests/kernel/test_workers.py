# SPDX-License-Identifier: Apache-2.0
"""Several workers on the same ports: who gets whose datagrams, also after one was killed."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler

import pytest

from sluice_cli.lab import Lab
from tests.kernel.selecting import DEADLINE, PORT, Wire, is_loaded, program_id, until
from userspace.datagram.workers import Worker, Workers, open_workers
from xdp.errors import UnsupportedError, UsageError
from xdp.policy import Policy

pytestmark = [pytest.mark.root, pytest.mark.feature("sk_reuseport")]

COUNT = 3
#: So many that one worker without any is no chance that comes up (3 times 2/3 to the power of 48).
PEERS = tuple(f"10.81.20.{n}" for n in range(1, 25)) + tuple(f"fd81::20:{n}" for n in range(1, 25))
PORTS = (PORT, PORT + 1)
LANES = 2

POLICY = f"""
version = 1
[[lane]]
name = "votes"
[[lane]]
name = "bulk"
[[service]]
name = "s"
ports = [{PORTS[0]}, {PORTS[1]}]
[[service.kind]]
name = "vote"
match = [{{ offset = 0, value = "56" }}]
[[service.rule]]
kind = "vote"
action = "lane"
lane = "votes"
[[service.rule]]
action = "lane"
lane = "bulk"
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def opened(hosts: Lab) -> Iterator[Workers]:
    with hosts.server.enter(), open_workers(Policy.parse(POLICY), COUNT) as made:
        yield made


@pytest.fixture
def workers(opened: Workers, hosts: Lab) -> Workers:
    """With new sockets for all."""
    with hosts.server.enter():
        for number in range(COUNT):
            opened.open(number)
    return opened


class Processes:
    """A process for each worker, which writes "worker lane payload" lines into one pipe."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        self._rest = b""
        self.pids: dict[int, int] = {}

    def start(self, worker: Worker) -> None:
        pid = os.fork()
        if not pid:
            try:
                self._serve(worker)
            finally:
                os._exit(1)
        self.pids[worker.number] = pid

    def _serve(self, worker: Worker) -> None:
        with worker.lanes() as lanes:
            while True:
                with lanes.receive(64) as batch:
                    lines = [
                        b"%d %d %s\n" % (worker.number, lane, bytes(view))
                        for lane, view in zip(batch.lanes, batch, strict=True)
                    ]
                    os.write(self._in, b"".join(lines))

    def say(self, worker: int, lane: int, what: str) -> None:
        os.write(self._in, f"{worker} {lane} {what}\n".encode())

    def read(self, count: int) -> list[tuple[int, int, str]]:
        """So many lines."""
        deadline = time.monotonic() + DEADLINE
        while self._rest.count(b"\n") < count:
            readable, _, _ = select.select([self._out], [], [], max(deadline - time.monotonic(), 0))
            assert readable, f"not all of {count} came: {self._rest!r:.200}"
            self._rest += os.read(self._out, 1 << 16)
        lines, self._rest = self._rest.splitlines(), b""
        assert len(lines) == count
        return [(int(a), int(b), c.decode()) for a, b, c in (line.split(b" ", 2) for line in lines)]

    def kill(self, number: int) -> None:
        pid = self.pids.pop(number)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def close(self) -> None:
        for number in list(self.pids):
            self.kill(number)
        os.close(self._out)
        os.close(self._in)


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    made.close()


def send_all(wire: Wire) -> int:
    """From each peer to each port, for each lane; how many."""
    for peer in PEERS:
        for port in PORTS:
            wire.send(peer, port, f"V {peer} {port}".encode())
            wire.send(peer, port, f"B {peer} {port}".encode())
    return len(PEERS) * len(PORTS) * LANES


def owners(got: list[tuple[int, int, str]]) -> dict[str, int]:
    """Peer -> the worker that had all of its datagrams, each of them in its lane."""
    found: dict[str, set[int]] = {}
    for worker, lane, payload in got:
        kind, peer, _ = payload.split()
        assert lane == (0 if kind == "V" else 1), payload
        found.setdefault(peer, set()).add(worker)
    assert set(found) == set(PEERS)
    assert {len(those) for those in found.values()} == {1}
    return {peer: those.pop() for peer, those in found.items()}


def test_a_killed_worker_leaves_its_peers_to_the_others(
    workers: Workers, processes: Processes, hosts: Lab
) -> None:
    with Wire(hosts) as wire:
        for worker in workers:
            processes.start(worker)
        workers.release()
        gone = workers.counters().worker_gone
        before = owners(processes.read(send_all(wire)))
        assert set(before.values()) == {0, 1, 2}
        assert workers.counters().worker_gone == gone

        processes.kill(1)
        after = owners(processes.read(send_all(wire)))
        lost = [peer for peer, worker in before.items() if worker == 1]
        assert {peer: worker for peer, worker in after.items() if peer not in lost} == {
            peer: worker for peer, worker in before.items() if worker != 1
        }
        assert set(after.values()) == {0, 2}
        assert workers.counters().worker_gone == gone + len(lost) * len(PORTS) * LANES

        processes.kill(0)
        assert set(owners(processes.read(send_all(wire))).values()) == {2}

        # Nobody is left: dropped, and counted as that.
        processes.kill(2)
        had = workers.counters()
        count = send_all(wire)
        until(lambda: workers.counters().seen.packets == had.seen.packets + count, "not all came")
        missed = workers.counters().verdicts["pass_no_socket"].packets
        assert missed - had.verdicts.get("pass_no_socket", had.seen - had.seen).packets == count

        # And one that is started again.
        with hosts.server.enter():
            again = workers.open(1)
        processes.start(again)
        again.close()
        assert set(owners(processes.read(send_all(wire))).values()) == {1}
        assert workers.counters().balanced


def test_the_opener_may_be_killed(processes: Processes, hosts: Lab) -> None:
    """Workers go on with all that they need; with the last of them everything is gone."""
    shift = 10  # ports of its own
    text = POLICY.replace(str(PORTS[0]), str(PORTS[0] + shift)).replace(str(PORTS[1]), str(PORTS[1] + shift))
    opener = os.fork()
    if not opener:
        try:
            with hosts.server.enter(), open_workers(Policy.parse(text), 1) as mine:
                processes.start(mine[0])
                mine.release()
                processes.say(processes.pids[0], program_id(mine.program), "worker and program")
                signal.pause()
        finally:
            os._exit(1)
    processes.pids[COUNT] = opener
    ((worker, program, _),) = processes.read(1)
    processes.kill(COUNT)
    try:
        with Wire(hosts) as wire:
            assert is_loaded(program)
            wire.send(PEERS[0], PORT + shift, b"V first")
            wire.send(PEERS[0], PORT + shift, b"B second")
            assert sorted(processes.read(2)) == [(0, 0, "V first"), (0, 1, "B second")]
    finally:
        os.kill(worker, signal.SIGKILL)
    until(lambda: not is_loaded(program), "the program is still there")


def test_workers_in_threads_and_over_a_socket(workers: Workers, hosts: Lab) -> None:
    """One is used here, one sent, one pickled as multiprocessing does; none closes another."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Wire(hosts) as wire, ours, theirs:
        message, descriptors = workers[1].to_message()
        socket.send_fds(ours, [json.dumps(message).encode()], descriptors)
        workers[1].close()
        raw, received, _, _ = socket.recv_fds(theirs, 1 << 16, 64)
        pickled = ForkingPickler.loads(ForkingPickler.dumps(workers[2]))
        workers[2].close()
        handles = (workers[0], Worker.from_message(json.loads(raw), received), pickled)
        count = send_all(wire)
        got: list[tuple[int, int, str]] = []
        lanes = [handle.lanes() for handle in handles]
        try:
            deadline = time.monotonic() + DEADLINE
            while len(got) < count:
                assert time.monotonic() < deadline, f"{len(got)} of {count} came"
                for number, one in enumerate(lanes):
                    with one.receive(timeout=0.01) as batch:
                        got += [
                            (number, lane, bytes(view).decode())
                            for lane, view in zip(batch.lanes, batch, strict=True)
                        ]
            assert set(owners(got).values()) == {0, 1, 2}
            assert {one.selected_by for one in lanes} == {"kernel"}
        finally:
            for one in lanes:
                one.close()


def test_another_policy_for_all(workers: Workers, hosts: Lab) -> None:
    with Wire(hosts) as wire:
        workers.swap(Policy.parse(POLICY.replace('kind = "vote"\naction = "lane"\nlane = "votes"',
                                                 'kind = "vote"\naction = "drop"')))  # fmt: skip
        had = workers.counters().verdicts
        assert "drop_policy" not in had
        wire.send(PEERS[0], PORT, b"V")
        until(lambda: "drop_policy" in workers.counters().verdicts, "it was not dropped")
        workers.swap(Policy.parse(POLICY))
        with pytest.raises(UsageError, match="other lanes"):
            workers.swap(Policy.parse(POLICY.replace('"bulk"', '"rest"')))


def test_used_or_wrong(workers: Workers) -> None:
    message, descriptors = workers[0].to_message()
    with pytest.raises(UsageError, match="describes no worker"):
        Worker.from_message({**message, "sockets": [[PORT, 99]]}, [os.dup(fd) for fd in descriptors])
    with pytest.raises(UsageError, match="describes no worker"):
        Worker.from_message(message, [os.dup(descriptors[0])])
    pipe = os.pipe()
    with pytest.raises(UsageError, match="no worker's socket"):
        Worker.from_message(message, [os.dup(descriptors[0]), *pipe])
    for end in pipe:  # taken over all the same
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(end)
    workers[0].lanes().close()
    for use in (workers[0].lanes, workers[0].to_message):
        with pytest.raises(ValueError, match="used or closed"):
            use()
    workers[0].close()
    with pytest.raises(UsageError, match="no worker 3"):
        workers.open(3)
    ports = ", ".join(map(str, range(8000, 8400)))
    with pytest.raises(UnsupportedError, match="400 ports with 2 lanes need 1600 sockets"):
        open_workers(Policy.parse(POLICY.replace(f"{PORTS[0]}, {PORTS[1]}", ports)), 1)
    for count in (0, 65):
        with pytest.raises(UsageError, match="1 to 64"):
            open_workers(Policy.parse(POLICY), count)

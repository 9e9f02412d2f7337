# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around AF_XDP lanes: interfaces that vanish, applications that die, wrong hands."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from sluice_cli.lab import Host, Lab
from tests.kernel.datapath import (
    BULK,
    POLICY,
    SECONDS,
    SPECS,
    VOTES,
    attached,
    client_socket,
    collect,
    lanes_on,
    open_files,
    open_on,
    quiet,
    server_address,
    until,
)
from tests.ordinary_user import NOBODY, nobodys_python, readable_python
from userspace.datagram import xsk
from userspace.datagram.descriptors import LaneSpec
from userspace.datagram.destination import Destination
from userspace.datagram.lanes import attach_lanes, open_lanes
from userspace.datagram.xsk import open_queues
from userspace.datagram.xsk_lanes import XskLanes
from userspace.native._native import lib
from xdp.errors import BusyError, InterfaceGoneError, UnsupportedError, UsageError
from xdp.policy import Policy
from xdp.program import SteerProgram

ROOT = Path(__file__).resolve().parents[2]
EPOLL_PWAIT2 = "441"  # the same number on all architectures (asm-generic/unistd.h)

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.filterwarnings("ignore:not a bytes object:DeprecationWarning"),
]


@pytest.fixture
def program(datapath_program: SteerProgram) -> SteerProgram:
    return datapath_program


@contextlib.contextmanager
def routes(host: Host) -> Iterator[Any]:
    with host.enter(), IPRoute() as ip:
        yield ip


class Waiting:
    """A thread in ``receive``; what became of it."""

    def __init__(self, lanes: XskLanes) -> None:
        self.result: object = None
        self._lanes = lanes
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def _wait(self) -> None:
        try:
            with self._lanes.receive() as batch:
                self.result = [bytes(view) for view in batch]
        except Exception as error:  # noqa: BLE001 - looked at by the test
            self.result = error

    def asleep(self) -> bool:
        """Whether it sits in the kernel; nothing else in ``receive`` sleeps there but epoll."""
        line = Path(f"/proc/self/task/{self._thread.native_id}/syscall").read_text(encoding="ascii")
        return line.split()[0] == EPOLL_PWAIT2

    def end(self) -> object:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "still waiting"
        return self.result


def wait_asleep(lanes: XskLanes) -> Waiting:
    waiting = Waiting(lanes)
    until(waiting.asleep, "a thread that sleeps")
    return waiting


def test_deleted_while_waiting(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab) as lanes:
        waiting = wait_asleep(lanes)
        with routes(lab.server) as ip:
            ip.link("del", index=lab.server.ifindex)
        error = waiting.end()
        assert isinstance(error, InterfaceGoneError)
        assert "srv0: the interface is gone" in str(error)
        to = Destination(lab.server.mac, lab.client.mac, ("10.81.0.1", VOTES), ("10.81.0.2", 9))
        lanes.send(to, [b"x"] * 3000)  # some are taken into the ring
        with pytest.raises(InterfaceGoneError):
            lanes.send(to, [b"x"] * 3000)
        with pytest.raises(InterfaceGoneError):
            lanes.receive(timeout=1)


def test_deleted_while_polled(lab: Lab, program: SteerProgram) -> None:
    """An application that only asks from time to time is told as well."""
    with lanes_on(program, lab) as lanes:
        with routes(lab.server) as ip:
            ip.link("del", index=lab.server.ifindex)

        def gone() -> bool:
            try:
                lanes.try_receive().release()
            except InterfaceGoneError:
                return True
            return False

        until(gone, "InterfaceGoneError")


def test_deletion_wakes_event_loops(lab: Lab, program: SteerProgram) -> None:
    with attached(program, lab.server):
        descriptors = open_on(program, lab.server)
        with lab.server.enter():  # netlink tells of links in the namespace where it is opened
            lanes = XskLanes(descriptors)
        with lanes, select.epoll() as loop:
            loop.register(lanes.fileno(), select.EPOLLIN)
            until(lambda: quiet(loop, lanes), "silence")
            with routes(lab.server) as ip:
                ip.link("del", index=lab.server.ifindex)
            assert loop.poll(SECONDS)
            with pytest.raises(InterfaceGoneError):
                lanes.try_receive()


def test_down_and_up_and_renamed(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab) as lanes, client_socket(lab) as client:
        client.sendto(b"before", (server_address(lab), VOTES))
        assert collect(lanes, 1) == [(0, b"before")]
        to = Destination(lab.server.mac, lab.client.mac, ("10.81.0.1", VOTES), client.getsockname())
        waiting = wait_asleep(lanes)
        with routes(lab.server) as ip:
            ip.link("set", index=lab.server.ifindex, state="down")
            assert lanes.send(to, [b"sent while down"]) == 1
            time.sleep(0.25)  # longer than the interval of the check that must not mistake this for gone
            assert waiting.result is None
            ip.link("set", index=lab.server.ifindex, ifname="renamed0", state="up")
            until(lambda: ip.get_links(lab.server.ifindex)[0].get_attr("IFLA_OPERSTATE") == "UP", "up again")
            neighbour = {"dst": str(lab.client.ipv4), "lladdr": lab.client.mac, "ifindex": lab.server.ifindex}
            ip.neigh("replace", state="permanent", **neighbour)

        def answered() -> bool:
            client.sendto(b"after", (server_address(lab), VOTES))
            return waiting.result is not None

        until(answered, "a packet after the interface was up again")
        found = waiting.end()
        assert isinstance(found, list)
        assert set(found) == {b"after"}
        assert lanes.flush()
        assert client.recv(100) == b"sent while down"


def test_what_is_left_to_send_goes_out_while_waiting(lab: Lab, program: SteerProgram) -> None:
    """Sent while the interface was down; once it is up nobody sends, but somebody waits for packets."""
    with lanes_on(program, lab) as lanes, client_socket(lab) as client:
        to = Destination(lab.server.mac, lab.client.mac, ("10.81.0.1", VOTES), client.getsockname())
        with routes(lab.server) as ip:
            ip.link("set", index=lab.server.ifindex, state="down")
            assert lanes.send(to, [b"sent while down"]) == 1
            waiting = wait_asleep(lanes)
            ip.link("set", index=lab.server.ifindex, state="up")
            assert client.recv(100) == b"sent while down"
            neighbour = {"dst": str(lab.server.ipv4), "lladdr": lab.server.mac, "ifindex": lab.client.ifindex}
        with routes(lab.client) as ip:
            ip.neigh("replace", state="permanent", **neighbour)
        client.sendto(b"thanks", (server_address(lab), VOTES))
        assert waiting.end() == [b"thanks"]


def test_nobody_waits_on_the_socket_that_sends(lab: Lab, program: SteerProgram) -> None:
    """In an epoll set it would cost a wake-up for each packet that leaves (native/queue.h)."""
    with lanes_on(program, lab) as lanes:
        watched = {
            int(line.split()[1])
            for line in Path(f"/proc/self/fdinfo/{lanes.fileno()}").read_text(encoding="ascii").splitlines()
            if line.startswith("tfd:")
        }
        (queue,) = lanes._queues
        assert {lib.sl_queue_socket(queue, lane) for lane in range(len(lanes.lanes))} <= watched
        assert lib.sl_queue_transmit_socket(queue) not in watched
    assert lib.sl_queue_transmit_socket(queue) == -1


def test_closed_while_waiting(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab) as lanes:
        waiting = wait_asleep(lanes)
        lanes.close()
        error = waiting.end()
        assert isinstance(error, ValueError)
        assert "closed" in str(error)
        for use in (lanes.receive, lanes.fileno, lanes.split):
            with pytest.raises(ValueError, match="closed"):
                use()
        lanes.close()
        assert lanes.closed


def test_parts_end_with_the_whole(make_lab: Callable[..., Lab], program: SteerProgram) -> None:
    with lanes_on(program, make_lab(queues=2)) as lanes:
        first, second = lanes.split()
        waiting = wait_asleep(first)
        second.close()  # leaves the rest alone
        lanes.try_receive().release()
        lanes.close()
        assert isinstance(waiting.end(), ValueError)


def test_batches_outlive_the_lanes(lab: Lab, program: SteerProgram) -> None:
    with attached(program, lab.server), client_socket(lab) as client:
        lanes = XskLanes(open_on(program, lab.server))
        client.sendto(b"kept", (server_address(lab), VOTES))
        batch = lanes.receive(timeout=SECONDS)
        lanes.close()
        assert [bytes(view) for view in batch] == [b"kept"]
        del lanes
        assert str(batch.source(0)[0]) == "10.81.0.2"
        batch.release()


def test_nothing_is_left(lab: Lab, program: SteerProgram) -> None:
    """Open and close again and again, at once: no descriptor and no mapping stays, the queue is free."""

    def mappings() -> int:
        return Path("/proc/self/maps").read_text(encoding="ascii").count("sluice-umem")

    gc.collect()
    before = open_files()
    for round_ in range(5):
        with lanes_on(program, lab) as lanes, client_socket(lab) as client:
            client.sendto(b"%d" % round_, (server_address(lab), BULK))
            assert collect(lanes, 1) == [(1, b"%d" % round_)]
            assert mappings() == 1
    assert mappings() == 0
    del lanes
    assert open_files() == before


def test_huge_pages(lab: Lab, program: SteerProgram) -> None:
    """Used where there are enough, and given back."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    before = setting.read_text(encoding="ascii")

    def free() -> int:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("HugePages_Free:"))

    spare = free()
    setting.write_text(str(int(before) + 64), encoding="ascii")
    try:
        available = free()
        if available < spare + 64:
            pytest.skip("no 128 MiB of free memory in pieces of 2 MiB")
        with lanes_on(program, lab) as lanes, client_socket(lab) as client:
            assert free() < available
            client.sendto(b"large", (server_address(lab), BULK))
            assert collect(lanes, 1) == [(1, b"large")]
        del lanes
        until(lambda: free() == available, "the huge pages to come back")
    finally:
        setting.write_text(before, encoding="ascii")


def test_dropped_lanes_close_themselves(lab: Lab) -> None:
    with lab.server.enter():
        lanes = open_lanes(Policy.parse(POLICY), interface=lab.server.interface)
    assert lanes.mode == "native-copy"
    with pytest.warns(ResourceWarning, match="never closed"):
        del lanes
    lab.server.attach_pass()  # refused if a program were still there


def test_queue_in_use(lab: Lab, program: SteerProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xsk, "BUSY_TIMEOUT", 0.05)
    before = open_files()
    with lanes_on(program, lab), pytest.raises(BusyError, match="another AF_XDP application"):
        open_on(program, lab.server)
    gc.collect()
    assert open_files() == before


def test_second_application_is_refused(lab: Lab, program: SteerProgram) -> None:
    with attached(program, lab.server), client_socket(lab) as client:
        descriptors = open_on(program, lab.server)
        message, passed = descriptors.to_message()
        again = type(descriptors).from_message(message, [os.dup(fd) for fd in passed])
        with attach_lanes(descriptors) as lanes:
            client.sendto(b"first", (server_address(lab), VOTES))
            assert collect(lanes, 1) == [(0, b"first")]
            with pytest.raises(BusyError, match="another application"):
                attach_lanes(again)
            with pytest.raises(UsageError, match="before"):
                attach_lanes(descriptors)
            client.sendto(b"second", (server_address(lab), VOTES))
            assert collect(lanes, 1) == [(0, b"second")]


APPLICATION = """
import json, os, socket, sys
from userspace.datagram.descriptors import LaneDescriptors
from userspace.datagram.lanes import attach_lanes
with socket.socket(fileno=int(sys.argv[1])) as wire:
    message, passed, _, _ = socket.recv_fds(wire, 65536, 16)
    with attach_lanes(LaneDescriptors.from_message(json.loads(message), passed)) as lanes:
        print("ready", os.getuid(), flush=True)
        while True:
            with lanes.receive(timeout=10) as batch:
                if not batch:
                    break
                lanes.send_back(batch)
"""


def start_application(descriptors: Any) -> subprocess.Popen[str]:
    """In another process, as nobody, without any capability."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = subprocess.Popen(
            nobodys_python("-c", APPLICATION, str(theirs.fileno())),
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
        )
        message, passed = descriptors.to_message()
        socket.send_fds(ours, [json.dumps(message).encode()], passed)
    assert child.stdout is not None
    assert child.stdout.readline() == f"ready {NOBODY}\n"
    return child


def test_another_process_without_privileges(lab: Lab, program: SteerProgram) -> None:
    """It gets descriptors and needs nothing else; killed, it leaves a queue that can be opened anew."""
    with attached(program, lab.server), client_socket(lab) as client:
        for _ in range(2):
            with open_on(program, lab.server) as descriptors:
                child = start_application(descriptors)
                try:
                    for index in range(100):
                        client.sendto(b"%d" % index, (server_address(lab), VOTES))
                        assert client.recv(100) == b"%d" % index
                finally:
                    child.kill()
                    child.wait(SECONDS)
                    if child.stdout is not None:
                        child.stdout.close()


def test_signals_are_handled_while_waiting(lab: Lab, program: SteerProgram) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with lanes_on(program, lab) as lanes, client_socket(lab) as client:

            def disturb() -> None:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                until(lambda: seen, "the handler to run")
                client.sendto(b"after the signal", (server_address(lab), VOTES))

            thread = threading.Timer(0.05, disturb)
            thread.start()
            with lanes.receive() as batch:
                assert [bytes(view) for view in batch] == [b"after the signal"]
            thread.join()

            class InterruptedHereError(Exception):
                pass

            def interrupt(number: int, frame: object) -> None:
                raise InterruptedHereError

            signal.signal(signal.SIGUSR1, interrupt)
            thread = threading.Timer(
                0.05, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            )
            thread.start()
            with pytest.raises(InterruptedHereError):
                lanes.receive()
            thread.join()
            assert sum(lanes.frames()[0].application) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


def run_limited(lab: Lab, prefix: list[str], limit: int) -> str:
    """Try to open queues with less than root has; what is said."""
    code = (
        "import sys, resource\n"
        f"resource.setrlimit(resource.RLIMIT_MEMLOCK, ({limit}, {limit}))\n"
        "from userspace.datagram.descriptors import LaneSpec\n"
        "from userspace.datagram.xsk import open_queues\n"
        "from xdp.errors import SluiceError\n"
        "try:\n"
        f"    open_queues({lab.server.interface!r}, [LaneSpec(number=0, name='votes')], mode='native-copy')\n"
        "except SluiceError as error:\n"
        "    print(type(error).__name__, error, '|', error.hint)\n"
        "else:\n"
        "    print('opened')\n"
    )
    done = lab.server.run(readable_python("-c", code, prefix=tuple(prefix)), check=False)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_without_privileges(lab: Lab) -> None:
    said = run_limited(lab, ["setpriv", f"--reuid={NOBODY}", "--clear-groups"], 65536)
    assert said.startswith("PermissionsError srv0 queue 0: making an AF_XDP socket: not permitted")
    assert "CAP_NET_RAW" in said


def test_out_of_locked_memory(lab: Lab) -> None:
    prefix = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
    said = run_limited(lab, prefix, 65536)
    assert said.startswith("UnsupportedError srv0 queue 0: registering the UMEM")
    assert "ulimit -l" in said


def test_wrong_openings(lab: Lab) -> None:
    lane = [LaneSpec(number=0, name="votes")]
    with lab.server.enter():
        with pytest.raises(UnsupportedError, match="no zero-copy"):
            open_queues(lab.server.interface, lane, mode="native-zero-copy")
        with pytest.raises(UsageError, match="no mode"):
            open_queues(lab.server.interface, lane, mode="mmsg")
        with pytest.raises(UsageError, match="no interface"):
            open_queues("nonesuch", lane, mode="native-copy")
        with pytest.raises(UsageError, match="0 lanes"):
            open_queues(lab.server.interface, SPECS[:0], mode="native-copy")


def test_batch_sizes(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab) as lanes, client_socket(lab) as client:
        for maximum in (0, -1, 65537):
            with pytest.raises(UsageError, match="1 to 65536"):
                lanes.receive(maximum, 0)
        sent = 0

        def all_wait() -> bool:
            return lanes.statistics().lane("bulk").waiting == sent

        while sent < 1000:  # in steps: a veth queue holds 256, and loses what comes beyond them
            for _ in range(100):
                client.sendto(b"x", (server_address(lab), BULK))
            sent += 100
            until(all_wait, "all that were sent")
        for maximum in (1, 256, 300, 65536):
            with lanes.receive(maximum, 0) as batch:
                assert len(batch) == min(maximum, 1000 - 557)
                assert len(batch.lengths) == len(batch)

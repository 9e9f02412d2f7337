# SPDX-License-Identifier: Apache-2.0
"""An owner in this process: what it attaches, what it lends, whom it refuses, what it leaves."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from sluice_cli.lab import Lab
from tests.kernel.hold_steer import Foreign
from tests.kernel.owned import (
    KERNEL_POLICY,
    POLICY,
    PORT,
    SECONDS,
    descriptors,
    kernel_socket,
    left_behind,
    program_of,
    sender,
    until,
)
from userspace.datagram.ladder import NoModeError, allowed
from userspace.datagram.lanes import attach_lanes
from userspace.datagram.owner import Owner
from userspace.datagram.policy_document import known_ids
from userspace.datagram.xsk_lanes import XskLanes
from xdp import link as links
from xdp.errors import BusyError, PermissionsError, SluiceError, UsageError
from xdp.maps import BpfMap
from xdp.owner_state import OwnerState, read_state, start_time, state_path, write_state
from xdp.policy import Policy
from xdp.state import InterfaceLock, prepare, sweep
from xdp.watch import interface_index

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture(scope="module")
def room() -> Iterator[Lab]:
    """A lab with two queues for all tests that leave it as it was."""
    with Lab(queues=2) as lab:
        yield lab


@pytest.fixture(scope="module")
def owner(room: Lab) -> Iterator[Owner]:
    """An owner of the server's interface, made in its namespace and used from outside."""
    with room.server.enter():
        made = Owner.open("srv0", Policy.parse(POLICY))
    with made:
        yield made
    assert program_of(room) is None
    assert left_behind(room) == []


def lanes_of(owner: Owner) -> tuple[XskLanes, ExitStack]:
    """Lanes in this process, and what takes them back."""
    stack = ExitStack()
    lease = owner.lend()
    stack.callback(owner.take_back, lease)
    lease.start()
    lanes = attach_lanes(lease.descriptors, owner.policy)
    stack.callback(lanes.close)
    return lanes, stack


def received(lanes: XskLanes) -> list[bytes]:
    with lanes.receive(timeout=SECONDS) as batch:
        return [batch[index].tobytes() for index in range(len(batch))]


class TestOwning:
    def test_mode_and_the_reasons_against_better_ones(self, room: Lab, owner: Owner) -> None:
        assert owner.mode == "native-copy"
        assert [(one.mode, "zero-copy" in one.reason) for one in owner.refused] == [
            ("native-zero-copy", True)
        ]
        found = program_of(room)
        assert found == (owner.program.id, "native")

    def test_its_state_can_be_read(self, room: Lab, owner: Owner) -> None:
        state = read_state(state_path("srv0", room.server.path.stat().st_ino))
        assert state is not None
        assert (state.pid, state.alive, state.program_id) == (os.getpid(), True, owner.program.id)
        assert state.mode == "native-copy"
        assert state.names.lanes == ("votes", "bulk")
        assert list(state.names.peers.values()) == ["alice"]

    def test_a_second_owner_hears_who_is_the_first(self, room: Lab, owner: Owner) -> None:
        with room.server.enter(), pytest.raises(BusyError, match=f"owned by process {os.getpid()}$"):
            Owner.open("srv0", Policy.parse(POLICY))
        assert program_of(room) == (owner.program.id, "native")

    def test_no_such_interface(self, room: Lab) -> None:
        with room.server.enter(), pytest.raises(UsageError, match=r"no interface 'eth9'") as caught:
            Owner.open("eth9", Policy.parse(POLICY))
        assert "srv0" in caught.value.hint

    def test_packets_pass_while_nothing_is_lent(self, room: Lab, owner: Owner) -> None:
        with kernel_socket(room) as sock, sender(room) as out:
            out.send(b"Vote")
            assert sock.recv(100) == b"Vote"
        assert owner.leases == ()

    def test_the_kernel_knows_the_peer(self, owner: Owner) -> None:
        tables = owner.program.policy_maps.tables
        assert tables is not None
        assert known_ids(tables) == {peer.address: peer.id for peer in owner.policy.peers}


class TestLending:
    def test_lanes_in_order(self, room: Lab, owner: Owner) -> None:
        lanes, stack = lanes_of(owner)
        with stack, sender(room) as out:
            for text in (b"bulk", b"Vote"):
                out.send(text)
            got: list[bytes] = []
            while len(got) < 2:
                got += received(lanes)
            assert sorted(got) == [b"Vote", b"bulk"]
        with kernel_socket(room) as sock, sender(room) as out:
            out.send(b"Vote")
            assert sock.recv(100) == b"Vote", "steered though nobody has the lanes"

    def test_twice_is_once_too_often(self, owner: Owner) -> None:
        first = owner.lend(pid=12345)
        try:
            with pytest.raises(BusyError, match="queue 0 are in use by process 12345"):
                owner.lend()
            with pytest.raises(BusyError, match="queue 1 are in use by process 12345"):
                owner.lend(queues=[1])
        finally:
            owner.take_back(first)

    def test_one_process_for_each_queue(self, owner: Owner) -> None:
        with ExitStack() as stack:
            for queue in (0, 1):
                lease = owner.lend(queues=[queue], pid=queue + 1)
                stack.callback(owner.take_back, lease)
                lease.start()
                assert lease.queues == {queue}
                assert bool(lease.ports) == (queue == 0), "companion sockets go to the first"
            with pytest.raises(BusyError, match="process 2"):
                owner.lend(queues=[1])

    @pytest.mark.parametrize("queues", [[2], [-1], []])
    def test_queues_that_are_none(self, owner: Owner, queues: list[int]) -> None:
        with pytest.raises(UsageError):
            owner.lend(queues=queues)
        assert owner.leases == ()

    def test_a_port_that_somebody_has(self, room: Lab, owner: Owner) -> None:
        with kernel_socket(room):
            with pytest.raises(BusyError, match=f"port {PORT} is in use by process {os.getpid()}"):
                owner.lend()
            lease = owner.lend(companions="free")
            assert lease.ports == frozenset()
            owner.take_back(lease)
        assert owner.leases == ()

    def test_twenty_applications_later_no_descriptor_more(self, owner: Owner) -> None:
        def cycle() -> None:
            _, stack = lanes_of(owner)
            stack.close()

        cycle()  # what is imported and cached on first use
        before = descriptors(os.getpid())
        for _ in range(20):
            cycle()
        assert descriptors(os.getpid()) == before

    def test_counters_can_be_mapped_but_not_written(self, owner: Owner) -> None:
        lease = owner.lend()
        try:
            shared = lease.descriptors.counters
            assert shared is not None
            counters = BpfMap(os.dup(shared))
            size = -(-counters.info.value_size * counters.info.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
            with mmap.mmap(shared, size, mmap.MAP_SHARED, mmap.PROT_READ) as seen:
                assert int.from_bytes(seen[:8], "little") >= 0
            with pytest.raises(PermissionError):
                mmap.mmap(shared, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            with pytest.raises(SluiceError, match="not permitted"):
                counters.update(bytes(4), bytes(counters.entry_size))
            counters.close()
        finally:
            owner.take_back(lease)


class TestChanges:
    def test_another_policy(self, owner: Owner) -> None:
        before = owner.generation
        assert owner.reload(Policy.parse(POLICY.replace("10.81.0.2", "10.81.0.3"))) == before + 1
        # A number is not used again while packets that carry it may be on their way.
        assert [(str(peer.address), peer.id) for peer in owner.policy.peers] == [("10.81.0.3", 2)]
        owner.reload(Policy.parse(POLICY))

    def test_other_lanes_only_while_nobody_has_them(self, owner: Owner) -> None:
        other = Policy.parse(POLICY.replace("ring = 128", "ring = 64"))
        lease = owner.lend(pid=4711)
        generation = owner.generation
        with pytest.raises(BusyError, match="process 4711"):
            owner.reload(other)
        assert owner.generation == generation
        owner.take_back(lease)
        assert owner.reload(other) == generation + 1
        owner.reload(Policy.parse(POLICY))

    def test_another_program_under_the_same_lanes(self, room: Lab, owner: Owner) -> None:
        lanes, stack = lanes_of(owner)
        with stack, sender(room) as out:
            out.send(b"V1")
            assert received(lanes) == [b"V1"]
            before, seen = owner.program.id, owner.program.counters().seen.packets
            owner.upgrade()
            assert owner.program.id != before
            assert program_of(room) == (owner.program.id, "native")
            out.send(b"V2")
            assert received(lanes) == [b"V2"]
            assert owner.program.counters().seen.packets > seen, "the counters go on"
            assert owner.reload(owner.policy) > 1


class TestModes:
    def test_what_is_allowed(self) -> None:
        assert allowed("auto", "portable") == ("native", "generic")
        assert allowed("auto", "native-copy") == ("native",)
        assert allowed("auto", "native-zero-copy") == ("native",)
        assert allowed("generic", "native-zero-copy") == ()
        assert allowed("generic", "generic-copy") == ("generic",)
        assert allowed("generic", "native-copy") == ()

    def test_generic(self, make_lab: object, lab: Lab) -> None:
        with lab.server.enter(), Owner.open("srv0", Policy.parse(POLICY), mode="generic") as owner:
            assert owner.mode == "generic-copy"
            assert program_of(lab) == (owner.program.id, "generic")
            lanes, stack = lanes_of(owner)
            with stack, sender(lab) as out:
                out.send(b"V")
                assert received(lanes) == [b"V"]

    def test_a_minimum_that_cannot_be_had_changes_nothing(self, lab: Lab) -> None:
        with lab.server.enter(), pytest.raises(NoModeError, match="no mode of native-zero-copy"):
            Owner.open("srv0", Policy.parse(POLICY), minimum_mode="native-zero-copy")
        assert program_of(lab) is None
        assert left_behind(lab) == []

    def test_an_interface_without_native_xdp(self, lab: Lab) -> None:
        """A packet that does not fit into a page: without jumbo frames veth refuses native XDP."""
        policy = Policy.parse(POLICY.replace("reserve = 64", "reserve = 64\njumbo = false"))
        lab.client.detach()
        for host in lab.hosts:
            host.run(["ip", "link", "set", host.interface, "mtu", "9000"])
        with lab.server.enter(), Owner.open("srv0", policy) as owner:
            assert owner.mode == "generic-copy"
            assert [one.mode for one in owner.refused] == ["native-zero-copy", "native-copy"]
            assert all("srv0" in one.reason for one in owner.refused)

    def test_an_interface_that_is_down(self, lab: Lab) -> None:
        lab.server.run(["ip", "link", "set", "srv0", "down"])
        with lab.server.enter(), Owner.open("srv0", Policy.parse(POLICY)) as owner:
            assert owner.mode == "native-copy"
            assert "down" in owner.refused[0].reason
            lab.server.run(["ip", "link", "set", "srv0", "up"])
            owner.take_back(owner.lend())
            assert "zero-copy" in owner.refused[0].reason, "asked once it could be"

    def test_lanes_that_end_in_the_kernel_only(self, lab: Lab) -> None:
        with lab.server.enter(), Owner.open("srv0", Policy.parse(KERNEL_POLICY)) as owner:
            assert owner.mode == "native"
            with pytest.raises(UsageError, match="ends in the kernel"):
                owner.lend()


class TestForeignPrograms:
    def test_refused_and_replaced(self, lab: Lab) -> None:
        lab.server.attach_pass()
        found = program_of(lab)
        assert found is not None
        with lab.server.enter():
            with pytest.raises(BusyError, match=rf"carries program {found[0]} \(\w+, native\)"):
                Owner.open("srv0", Policy.parse(KERNEL_POLICY))
            assert program_of(lab) == found
            with Owner.open("srv0", Policy.parse(KERNEL_POLICY), replace=True) as owner:
                assert program_of(lab) == (owner.program.id, "native")

    def test_one_that_a_link_holds_stays(self, lab: Lab) -> None:
        foreign = Foreign()
        with lab.server.enter():
            link = links.attach(foreign, interface_index("srv0"))
            try:
                before = program_of(lab)
                for replace in (False, True):
                    with pytest.raises(BusyError, match="somebody_else"):
                        Owner.open("srv0", Policy.parse(KERNEL_POLICY), replace=replace)
                assert program_of(lab) == before
            finally:
                link.close()
                os.close(foreign.fd)
        assert left_behind(lab) == []


class TestFilesInRun:
    def test_the_lock_is_one_for_all_and_leaves_nothing(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        lock = InterfaceLock.take("eth1", 7, run)
        with pytest.raises(BusyError, match=f"process {os.getpid()}$"):
            InterfaceLock.take("eth1", 7, run)
        InterfaceLock.take("eth2", 8, run).release()
        lock.release()
        lock.release()
        assert list(run.iterdir()) == []
        InterfaceLock.take("eth1", 7, run).release()

    def test_a_directory_that_others_may_write_to(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        run.chmod(0o777)
        with pytest.raises(PermissionsError, match="can be written to by others"):
            prepare(run)

    def test_what_killed_owners_left_is_swept(self, tmp_path: Path) -> None:
        run = prepare(tmp_path / "run")
        served = run / "1-eth1.sock"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(served))
        outside = tmp_path / "outside.sock"
        outside.touch()
        (run / "1-7.lock").touch()
        dead = OwnerState(
            pid=2**22 + 1,
            started=5,
            program_id=2**31 - 1,
            interface="eth1",
            mode="native",
            socket=str(served),
        )
        write_state(run / "1-eth1.json", dead)
        persisted = msgspec.structs.replace(dead, socket=str(outside), persisted=True)
        write_state(run / "1-eth2.json", persisted)
        alive = msgspec.structs.replace(dead, pid=os.getpid(), started=start_time(os.getpid()) or 0)
        write_state(run / "1-eth3.json", alive)
        with_lock = InterfaceLock.take("eth9", 9, run)
        sweep(run)
        assert sorted(path.name for path in run.iterdir()) == sorted(["1-eth3.json", with_lock.path.name])
        assert outside.exists(), "only what is ours is removed"
        with_lock.release()


def test_rename_before_an_owner_gives_up(lab: Lab) -> None:
    """Its files follow the name; at the end all of them are gone."""
    with lab.server.enter(), Owner.open("srv0", Policy.parse(KERNEL_POLICY)) as owner:
        lab.server.run(["ip", "link", "set", "srv0", "down"])
        lab.server.run(["ip", "link", "set", "srv0", "name", "new0"])
        until(lambda: [change.state for change in owner.poll()], "told of the new name")
        assert owner.interface == "new0"
        inode = lab.server.path.stat().st_ino
        assert read_state(state_path("new0", inode)) is not None
        assert read_state(state_path("srv0", inode)) is None
    assert left_behind(lab) == []

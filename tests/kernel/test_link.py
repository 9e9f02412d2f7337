# SPDX-License-Identifier: Apache-2.0
"""Links on a real veth: attach, refuse, replace while traffic flows, and be gone without a trace."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice_cli.lab import Lab
from tests.kernel.live import PORT, Traffic
from xdp.errors import BusyError, InterfaceGoneError, SluiceError, UnsupportedError
from xdp.link import AttachMode, Link, attach, attached_program, detach_foreign, program_name
from xdp.policy import Policy
from xdp.program import PROGRAM_NAME, SteerProgram
from xdp.tables import Tables, compile_policy

pytestmark = pytest.mark.bpf

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 60.0  # bcc's compiler on a busy machine


def kernel_lane(service: str, port: int = PORT) -> Tables:
    """Everything to ``port`` in a lane that ends in the kernel."""
    return compile_policy(
        Policy.parse(f"""
version = 1
[[lane]]
name = "only"
end = "kernel"
[[service]]
name = "{service}"
ports = [{port}]
  [[service.rule]]
  action = "lane"
  lane = "only"
""")
    )


@pytest.fixture(scope="module")
def program() -> Iterator[SteerProgram]:
    """Of its own: the session's counters are for test runs."""
    with SteerProgram.load() as made:
        made.swap(kernel_lane("s"))
        yield made


def on(lab: Lab) -> tuple[int, str] | None:
    with lab.server.enter():
        return attached_program(lab.server.ifindex)


def put(lab: Lab, program: SteerProgram, mode: AttachMode = "native") -> Link:
    with lab.server.enter():
        return attach(program, lab.server.ifindex, mode)


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_attach_and_close(lab: Lab, program: SteerProgram, mode: AttachMode) -> None:
    assert on(lab) is None
    link = put(lab, program, mode)
    try:
        assert on(lab) == (program.id, mode)
        with lab.server.enter():
            assert link.mode == mode
            assert link.ifindex == lab.server.ifindex
        assert link.program_id == program.id
        before = program.counters()
        with Traffic(lab) as traffic:
            traffic.wait_for(100)
        assert traffic.received == list(range(traffic.sent))
        after = program.counters()
        passed = after.lanes[0].seen.packets - before.lanes[0].seen.packets
        assert passed == traffic.sent
        assert after.balanced
    finally:
        link.close()
    link.close()
    assert on(lab) is None


@pytest.mark.parametrize("mode", ["native", "generic"])
@pytest.mark.parametrize("there", ["native", "generic"])
def test_refused_where_another_program_is(
    lab: Lab, program: SteerProgram, there: AttachMode, mode: AttachMode
) -> None:
    with program.successor() as other:
        first = put(lab, other, there)
        try:
            with pytest.raises(BusyError) as caught:
                put(lab, program, mode)
            message = str(caught.value)
            assert f"program {other.id} ({PROGRAM_NAME}, {there})" in message
            assert lab.server.interface in message
            assert caught.value.hint
            assert on(lab) == (other.id, there)
        finally:
            first.close()


def test_a_program_attached_by_netlink(lab: Lab, program: SteerProgram) -> None:
    """Refused, named, and taken off only when asked for; what a link holds is not taken off."""
    lab.server.attach_pass()
    found = on(lab)
    assert found is not None
    with pytest.raises(BusyError, match=f"program {found[0]} "):
        put(lab, program)
    with lab.server.enter():
        detach_foreign(lab.server.ifindex)
    assert on(lab) is None
    link = put(lab, program)
    try:
        with lab.server.enter(), pytest.raises(BusyError, match=f"program {program.id} \\({PROGRAM_NAME}\\)"):
            detach_foreign(lab.server.ifindex)
        assert on(lab) == (program.id, "native")
    finally:
        link.close()


def test_interfaces_that_cannot(lab: Lab, program: SteerProgram) -> None:
    with lab.server.enter():
        with pytest.raises(InterfaceGoneError, match="interface 4242 does not exist"):
            attach(program, 4242)
        # Loopback has no XDP of its own.
        with pytest.raises(UnsupportedError, match="native XDP") as caught:
            attach(program, 1)
        assert "generic" in caught.value.hint
        attach(program, 1, "generic").close()
        with pytest.raises(InterfaceGoneError, match="4242"):
            attached_program(4242)
    assert program_name(program.id) == PROGRAM_NAME
    assert program_name(0xFFFFFFF) == "?"


def test_a_deleted_interface(make_lab: object, program: SteerProgram) -> None:
    """The link stays a link to nothing, and says so."""
    lab = make_lab()  # type: ignore[operator]
    link = put(lab, program)
    try:
        with lab.server.enter():
            assert link.ifindex == lab.server.ifindex
            lab.client.run(["ip", "link", "delete", lab.client.interface])
            assert link.ifindex == 0
            with pytest.raises(InterfaceGoneError):
                _ = link.mode
            with pytest.raises(SluiceError):
                link.update(program)
    finally:
        link.close()


def test_no_packet_lost_by_update(lab: Lab, program: SteerProgram) -> None:
    """A new version of the program takes over and back again, 100 times, on the same maps."""
    before = program.counters()
    with program.successor() as following:
        assert following.id != program.id
        assert following.cookie == program.cookie
        link = put(lab, program)
        try:
            with Traffic(lab) as traffic:
                for number in range(100):
                    traffic.wait_for(20)
                    link.update(program if number % 2 else following)
                    assert on(lab) == ((program if number % 2 else following).id, "native")
                traffic.wait_for(20)
            assert traffic.received == list(range(traffic.sent))
        finally:
            link.close()
        after = following.counters()
    assert after.lanes[0].seen.packets - before.lanes[0].seen.packets == traffic.sent
    assert after.balanced


def test_no_packet_lost_by_swaps(lab: Lab, program: SteerProgram) -> None:
    """A hundred policies in a row while traffic flows."""
    tables = [kernel_lane("even"), kernel_lane("odd", PORT)]
    before = program.counters()
    link = put(lab, program)
    try:
        with Traffic(lab) as traffic:
            for number in range(100):
                program.swap(tables[number % 2])
            traffic.wait_for(20)
        assert traffic.received == list(range(traffic.sent))
        assert traffic.sent > 100
    finally:
        link.close()
    after = program.counters()
    assert after.lanes[0].seen.packets - before.lanes[0].seen.packets == traffic.sent
    assert after.balanced


def test_kill_9_detaches(lab: Lab, tmp_path: Path) -> None:
    """The kernel closes the descriptors of a killed process, and with them the link."""
    policy = tmp_path / "policy.toml"
    policy.write_text(
        'version = 1\n[[lane]]\nname = "a"\n[[service]]\nname = "s"\nports = [7]\n', encoding="utf-8"
    )
    words = [
        sys.executable,
        str(ROOT / "tests/kernel/hold_steer.py"),
        lab.server.interface,
        "native",
        str(policy),
    ]
    owner = lab.server.popen(
        words,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}", "PATH": "/usr/bin:/bin"},
    )
    try:
        assert owner.stdout is not None
        readable, _, _ = select.select([owner.stdout], [], [], READY_SECONDS)
        assert readable
        assert owner.stdout.readline().startswith("ready")
        found = on(lab)
        assert found is not None
        assert program_name(found[0]) == PROGRAM_NAME
        owner.send_signal(signal.SIGKILL)
        assert owner.wait(10) == -signal.SIGKILL
        deadline = time.monotonic() + 10
        while on(lab) is not None:
            assert time.monotonic() < deadline, "still attached"
            time.sleep(0.01)
        # The program is gone from the kernel, too: nobody holds it.
        while program_name(found[0]) != "?":
            assert time.monotonic() < deadline, "still loaded"
            time.sleep(0.01)
    finally:
        if owner.poll() is None:
            owner.kill()
            owner.wait()
        if owner.stdout is not None:
            owner.stdout.close()


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    """A BPF file system of this test's own."""
    folder = tmp_path / "bpf"
    folder.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_pin(lab: Lab, program: SteerProgram, bpffs: Path) -> None:
    link = put(lab, program)
    path = bpffs / "link"
    link.pin(path)
    link.close()
    assert on(lab) == (program.id, "native")
    again = Link.from_pin(path)
    assert again.program_id == program.id
    assert again.id == link.id
    again.close()
    assert on(lab) == (program.id, "native")
    path.unlink()
    deadline = time.monotonic() + 10
    while on(lab) is not None:
        assert time.monotonic() < deadline, "still attached"
        time.sleep(0.01)
    with pytest.raises(SluiceError, match="opening the pinned link"):
        Link.from_pin(path)


def test_pin_outside_of_a_bpffs(lab: Lab, program: SteerProgram, tmp_path: Path) -> None:
    link = put(lab, program)
    try:
        with pytest.raises(SluiceError, match="pinning the link") as caught:
            link.pin(tmp_path / "link")
        assert "mount -t bpf" in caught.value.hint
    finally:
        link.close()

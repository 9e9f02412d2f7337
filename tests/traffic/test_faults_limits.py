# SPDX-License-Identifier: Apache-2.0
"""Opening lanes without privileges, locked memory or descriptors: said clearly, and nothing is left."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from sluice_cli.lab import Lab
from tests.ordinary_user import NOBODY, readable_python
from tests.traffic.served import ENVIRONMENT, POLICY, descriptors
from userspace.datagram.descriptors import LaneSpec
from userspace.datagram.xsk import open_queues
from xdp.errors import SluiceError
from xdp.link import attached_program
from xdp.owner_state import OwnerState, write_state
from xdp.state import InterfaceLock

pytestmark = [pytest.mark.root, pytest.mark.bpf]

# Arguments: policy, interface, mode, descriptors that are free, user.  Says what came of it, and what
# was left open.
PROBE = """
import json, os, resource, sys
from tests.traffic.served import descriptors
import userspace.datagram.lanes as lanes
from userspace.datagram.lanes import open_lanes
from xdp.errors import SluiceError
from xdp.policy import Policy
policy, interface, mode, files, user = sys.argv[1:]
policy = Policy.parse(policy)
import bcc, pyroute2
if user != "0":
    os.setgroups([]); os.setgid(int(user)); os.setuid(int(user))
before = descriptors()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
said = {}
try:
    if files != "0":
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 1 + int(files), hard))
    with open_lanes(policy, interface=interface, mode=mode) as opened:
        said = opened.status()
except SluiceError as error:
    said = {"error": type(error).__name__, "message": str(error), "hint": error.hint, "detail": error.detail}
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
left = {number: what for number, what in descriptors().items() if number not in before}
print(json.dumps({"said": said, "left": left}))
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(static_neighbours=True) as made:
        yield made


def probe(
    lab: Lab, mode: str, *, files: int = 0, user: int = 0, around: Sequence[str] = ()
) -> dict[str, Any]:
    """Open lanes in a process; nothing may be left in it, nor on the interface."""
    arguments = [POLICY, lab.server.interface, mode, str(files), str(user)]
    words = readable_python("-c", PROBE, *arguments, prefix=tuple(around))
    done = lab.server.run(words, check=False, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    left = set(found["left"].values())
    if files:  # bcc itself forgets maps that it made when it can't make another one
        left.discard("anon_inode:bpf-map")
    assert not left, found
    with lab.server.enter():
        assert attached_program(lab.server.ifindex) is None
    said: dict[str, Any] = found["said"]
    if "error" in said:
        assert "\n" not in said["message"]
        assert said["hint"], said
    return said


@pytest.fixture(params=["alone", "beside an owner"])
def company(request: pytest.FixtureRequest, lab: Lab) -> Iterator[None]:
    """What root's owner of another interface has in its folder may be read, not written."""
    if request.param == "alone":
        yield
        return
    with lab.client.enter():
        lock = InterfaceLock.take(lab.client.interface, lab.client.ifindex)
    # And what a killed one left, whose pid is another process's now.
    state = lock.path.with_suffix(".json")
    write_state(state, OwnerState(pid=1, started=0, program_id=0, interface="gone", mode="native copy"))
    try:
        yield
    finally:
        state.unlink(missing_ok=True)
        lock.release()


@pytest.mark.usefixtures("company")
class TestWithoutPrivileges:
    def test_xdp_is_refused(self, lab: Lab) -> None:
        said = probe(lab, "native", user=NOBODY)
        assert said["error"] == "PermissionsError"
        assert "root" in said["hint"]

    def test_auto_goes_on_with_kernel_sockets(self, lab: Lab) -> None:
        """And says for each better rung why not."""
        said = probe(lab, "auto", user=NOBODY)
        assert said["mode"] == "mmsg"
        refused = {one["mode"]: one["reason"] for one in said["refused"]}
        assert list(refused) == ["native-zero-copy", "native-copy", "generic-copy"]
        # What is tried first, and so what is said, depends on whether a BPF file system is mounted.
        for reason in refused.values():
            assert "not permitted" in reason or "may not be written" in reason


class TestLockedMemory:
    """Without CAP_IPC_LOCK the limit holds for root as well."""

    AROUND = ("setpriv", "--bounding-set=-ipc_lock", "prlimit", "--memlock=65536:65536", "--")

    @pytest.fixture(autouse=True)
    def tools(self) -> None:
        subprocess.run(["setpriv", "--version"], check=True, capture_output=True)

    def test_native(self, lab: Lab) -> None:
        said = probe(lab, "native", around=self.AROUND)
        assert said["error"] in {"UnsupportedError", "NoModeError"}
        assert "memory" in said["message"] + said["detail"]
        assert "ulimit -l" in said["hint"] + said["detail"]

    def test_auto(self, lab: Lab) -> None:
        said = probe(lab, "auto", around=self.AROUND)
        assert said["mode"] == "mmsg"
        assert any("memory" in one["reason"] for one in said["refused"])


class TestOpenFiles:
    @pytest.mark.parametrize("files", [1, 2, 5, 12, 27])
    def test_open_lanes(self, lab: Lab, files: int) -> None:
        """Not enough for the compiler, for the maps, or for all sockets."""
        said = probe(lab, "native", files=files)
        assert "oo many open files" in said["message"] + said["detail"], said

    def test_every_step_of_opening_queues(self, lab: Lab) -> None:
        """One descriptor more each time, until there are enough; whatever was missing, nothing leaks."""
        lanes = [LaneSpec(number=number, name=f"lane{number}", ring=64, quota=64) for number in range(3)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        failures = []
        with lab.server.enter():
            before = descriptors()
            free = (number for number in range(soft) if number not in before)
            for limit in itertools.islice(free, 32):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                try:
                    open_queues(lab.server.interface, lanes, mode="native-copy", reserve=0).close()
                    break
                except SluiceError as error:
                    failures.append(str(error))
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert descriptors() == before
            else:
                pytest.fail("31 descriptors are not enough for three lanes")
        assert len(failures) > len(lanes)  # the memory's, each socket's
        assert not any("\n" in said for said in failures)

# SPDX-License-Identifier: Apache-2.0
"""Settings of real interfaces: changed, put back, also after a kill, left alone when others changed them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from sluice_cli.lab import Lab
from tests.kernel.owned import ENVIRONMENT, KERNEL_POLICY, SECONDS, left_behind
from userspace.datagram.claim import Claim
from userspace.datagram.owner import Owner
from xdp.errors import InterfaceGoneError, SluiceError, UnsupportedError, UsageError
from xdp.interface import SETTINGS, Tuning, channels_for
from xdp.policy import Policy

pytestmark = [pytest.mark.root]

# Changes a setting with its journal and dies at a chosen moment.
KILLED = """
import os, signal, sys
from userspace.datagram.claim import Claim
from xdp.interface import Tuning
import xdp.journal as journal
from xdp.watch import interface_index
when = sys.argv[1]
write = journal.Journal._write
def dying(self, changes):
    write(self, changes)
    if changes and when == "journal":
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal._write = dying
claim = Claim("srv0", interface_index("srv0"), print)
claim.tune("srv0", Tuning(gro_flush_timeout=20000, napi_defer_hard_irqs=2))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def server(make_lab: object, lab: Lab) -> Iterator[Lab]:
    """A lab with this thread in the server's namespace."""
    with lab.server.enter():
        yield lab


def get(key: str, interface: str = "srv0") -> str:
    return SETTINGS[key].read(interface)


class TestSettings:
    @pytest.mark.parametrize("key", sorted(SETTINGS))
    def test_each_can_be_read_and_written_back(self, server: Lab, key: str) -> None:
        value = get(key)
        if key != "lro":  # veth has none
            SETTINGS[key].write("srv0", value)
        assert get(key) == value

    def test_the_namespace_is_the_threads(self, lab: Lab) -> None:
        with lab.server.enter():
            SETTINGS["gro_flush_timeout"].write("srv0", "30000")
            assert get("gro_flush_timeout") == "30000"
        with lab.client.enter():
            assert get("gro_flush_timeout", "cli0") == "0"
            with pytest.raises(InterfaceGoneError):
                get("gro_flush_timeout")

    @pytest.mark.parametrize("name", ["", ".", "..", "../lo", "eth9", "x" * 100])
    def test_names_that_are_none(self, server: Lab, name: str) -> None:
        for setting in SETTINGS.values():
            with pytest.raises((UsageError, InterfaceGoneError)):
                setting.read(name)

    def test_refused_by_the_driver(self, server: Lab) -> None:
        with pytest.raises(UnsupportedError, match="channels"):
            SETTINGS["channels"].write("srv0", "rx=0 tx=0 combined=0")
        with pytest.raises(UsageError):
            SETTINGS["channels"].write("srv0", "many")
        with pytest.raises(SluiceError, match="napi_defer_hard_irqs"):
            SETTINGS["napi_defer_hard_irqs"].write("srv0", "-1")

    def test_channels(self, make_lab: object) -> None:
        with Lab(queues=4) as lab, lab.server.enter():
            assert get("channels") == "rx=4 tx=4 combined=0"
            assert channels_for("srv0", 3) == "rx=3 tx=3 combined=0"
            for queues in (0, 5):
                with pytest.raises(UsageError, match="allowed: 1 to 4"):
                    channels_for("srv0", queues)


class TestPuttingBack:
    def test_at_the_end(self, server: Lab) -> None:
        claim = Claim("srv0", server.server.ifindex, pytest.fail)
        claim.tune("srv0", Tuning(gro_flush_timeout=20000, napi_defer_hard_irqs=2, gro=True))
        assert (get("gro_flush_timeout"), get("napi_defer_hard_irqs"), get("gro")) == ("20000", "2", "on")
        claim.release("srv0")
        assert (get("gro_flush_timeout"), get("napi_defer_hard_irqs"), get("gro")) == ("0", "0", "off")
        assert left_behind(server) == []

    @pytest.mark.parametrize("when", ["journal", "end"])
    def test_after_a_kill_by_the_next_start(self, server: Lab, when: str) -> None:
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, when], env=ENVIRONMENT, timeout=SECONDS, check=False
        )
        assert killed.returncode == -9
        assert left_behind(server) != []
        assert (get("gro_flush_timeout") == "20000") == (when == "end")
        told: list[str] = []
        Claim("srv0", server.server.ifindex, told.append).release("srv0")
        assert (get("gro_flush_timeout"), get("napi_defer_hard_irqs")) == ("0", "0")
        assert left_behind(server) == []
        assert any("put back" in line for line in told)

    def test_what_somebody_else_changed_since_stays(self, server: Lab) -> None:
        subprocess.run([sys.executable, "-c", KILLED, "end"], env=ENVIRONMENT, timeout=SECONDS, check=False)
        SETTINGS["gro_flush_timeout"].write("srv0", "555")
        told: list[str] = []
        Claim("srv0", server.server.ifindex, told.append).release("srv0")
        assert (get("gro_flush_timeout"), get("napi_defer_hard_irqs")) == ("555", "0")
        assert any("gro_flush_timeout" in line and "did not set" in line for line in told)

    def test_what_could_not_all_be_changed_is_put_back(self, server: Lab) -> None:
        claim = Claim("srv0", server.server.ifindex, pytest.fail)
        with pytest.raises(SluiceError):
            claim.tune("srv0", Tuning(gro_flush_timeout=20000, lro=True))
        assert get("gro_flush_timeout") == "20000"
        claim.release("srv0")
        assert get("gro_flush_timeout") == "0"

    def test_under_a_new_name(self, server: Lab) -> None:
        claim = Claim("srv0", server.server.ifindex, pytest.fail)
        claim.tune("srv0", Tuning(gro_flush_timeout=20000))
        for words in (["down"], ["name", "new0"]):
            server.server.run(["ip", "link", "set", "srv0", *words])
        claim.release("new0")
        assert get("gro_flush_timeout", "new0") == "0"
        assert left_behind(server) == []

    @pytest.mark.bpf
    def test_an_owner_with_fewer_queues(self, make_lab: object) -> None:
        with Lab(queues=4) as lab, lab.server.enter():
            # The other end must not send on more queues than this one receives on.
            lab.client.run(["ethtool", "-L", "cli0", "tx", "2"])
            with Owner.open("srv0", Policy.parse(KERNEL_POLICY), tuning=Tuning(queues=2)):
                assert get("channels") == "rx=2 tx=2 combined=0"
            assert get("channels") == "rx=4 tx=4 combined=0"
            assert left_behind(lab) == []

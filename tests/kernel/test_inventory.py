# SPDX-License-Identifier: Apache-2.0
"""What is loaded, found from the kernel alone: programs, links, holders, pins."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.kernel.steered import FAR, NEAR, Steered, in_namespace, namespace, until
from xdp import inventory
from xdp.errors import BusyError, NotLoadedError, UsageError
from xdp.link import Link

pytestmark = [pytest.mark.root, pytest.mark.bpf]

T = TypeVar("T")


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    """Sluice on the near end, a foreign program on the far one."""
    with namespace(tmp_path_factory.mktemp("inventory")) as made:
        made.hold()
        made.hold(None, interface=FAR, mode="generic")
        yield made


@contextlib.contextmanager
def bpffs() -> Iterator[Path]:
    """A bpffs of our own."""
    with tempfile.TemporaryDirectory(prefix="sluice-bpffs-") as folder:
        subprocess.run(["mount", "-t", "bpf", "bpf", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def test_finds_ours_among_others(steered: Steered) -> None:
    found = {one.interface: one for one in in_namespace(steered.name, inventory.loaded)}
    assert set(found) == {NEAR, FAR}
    ours, foreign = found[NEAR], found[FAR]
    assert (ours.ours, ours.mode, ours.name) == (True, "native", inventory.PROGRAM_NAME)
    assert (foreign.ours, foreign.mode, foreign.name) == (False, "generic", "somebody_else")
    assert {"ports", "rules", "counters", "xsks", "known", "strangers"} <= set(ours.maps)
    assert foreign.maps == {}
    assert abs(time.time() - ours.loaded_at) < 300
    assert len(ours.tag) == 16
    assert ours.link_id
    assert foreign.link_id
    assert in_namespace(steered.name, inventory.find).id == ours.id
    assert in_namespace(steered.name, inventory.interfaces) == ["lo", FAR, NEAR]


def test_what_cannot_be_found_says_why(steered: Steered) -> None:
    def wrong(interface: str) -> Callable[[], object]:
        return lambda: inventory.find(interface)

    with pytest.raises(BusyError, match=r"carries program \d+ \(somebody_else\), which is not Sluice's"):
        in_namespace(steered.name, wrong(FAR))
    with pytest.raises(NotLoadedError, match="nothing is loaded on lo"):
        in_namespace(steered.name, wrong("lo"))
    with pytest.raises(UsageError, match="no interface 'eth77' here"):
        in_namespace(steered.name, wrong("eth77"))


def test_maps_open_by_name(steered: Steered) -> None:
    ours = in_namespace(steered.name, inventory.find)
    opened = ours.map("generation")
    assert opened.lookup(bytes(4)) == (1).to_bytes(8, "little")
    opened.close()
    with pytest.raises(UsageError, match=r"no map 'nope'.*there are: counters, "):
        ours.map("nope")


def test_holders_are_the_processes_that_keep_it(steered: Steered) -> None:
    ours = in_namespace(steered.name, inventory.find)
    holders = inventory.holders(ours)
    assert [(one.pid, one.link, one.program, one.is_owner) for one in holders] == [
        (steered.processes[0].pid, True, True, True)
    ]
    assert holders[0].maps == len(ours.maps)
    assert holders[0].command


def test_this_process_is_not_among_the_holders(steered: Steered) -> None:
    ours = in_namespace(steered.name, inventory.find)
    opened = ours.map("ports")
    try:
        assert os.getpid() not in [one.pid for one in inventory.holders(ours)]
    finally:
        opened.close()


def test_pins_are_found_and_told_apart(steered: Steered) -> None:
    ours = in_namespace(steered.name, inventory.find)
    assert ours.link_id is not None
    from xdp._libbpf import lib

    descriptor = lib.sluice_link_by_id(ours.link_id)
    assert descriptor >= 0
    link = Link(descriptor)
    ports = ours.map("ports")
    try:
        with bpffs() as root:
            assert inventory.pins(ours, root) == []
            folder = root / "some" / NEAR
            folder.mkdir(parents=True)
            link.pin(folder / "link")
            assert lib.sluice_obj_pin(ports.fd, os.fsencode(folder / "ports")) == 0
            assert inventory.pins(ours, root) == [folder / "link"]
    finally:
        ports.close()
        link.close()


def test_a_program_that_leaves_is_gone(tmp_path: Path) -> None:
    with namespace(tmp_path) as made:
        process = made.hold()
        before = in_namespace(made.name, inventory.find)
        attachment = in_namespace(made.name, inventory.attachments)[0]
        process.kill()  # nobody can clean up after that but the kernel
        process.wait()
        until(lambda: in_namespace(made.name, inventory.attachments) == [], "the program off the interface")
        with pytest.raises(NotLoadedError, match="not loaded on any interface"):
            in_namespace(made.name, inventory.find)
        until(lambda: inventory.inspect(attachment) is None, "the program freed")
        with pytest.raises(NotLoadedError, match="map ports is gone"):
            until(lambda: before.map("ports").close(), "the map freed")
        assert inventory.holders(before) == []
        made.stop(process)


def test_a_program_attached_without_a_link(tmp_path: Path) -> None:
    """By netlink, as `ip link set xdp` does: there is no link, and inventory says so."""
    from pyroute2 import IPRoute

    from xdp._libbpf import lib

    with namespace(tmp_path) as made:
        process = made.hold(None, interface=FAR)
        foreign = in_namespace(made.name, lambda: inventory.loaded(FAR))[0]
        descriptor = lib.sluice_prog_by_id(foreign.id)
        assert descriptor >= 0

        def attach() -> None:
            with IPRoute() as route:
                index = route.link_lookup(ifname=NEAR)[0]
                attributes = [("IFLA_XDP_FD", descriptor), ("IFLA_XDP_FLAGS", lib.XDP_FLAGS_SKB_MODE)]
                route.link("set", index=index, xdp={"attrs": attributes})

        try:
            in_namespace(made.name, attach)
        finally:
            os.close(descriptor)
        made.stop(process)
        (found,) = in_namespace(made.name, inventory.loaded)
        assert (found.interface, found.mode, found.link_id) == (NEAR, "generic", None)


def test_an_ordinary_user_is_told_what_is_missing(steered: Steered) -> None:
    done = steered.sluice("status")
    assert done.returncode == 0
    done = steered.as_nobody("status")
    assert done.returncode == 4, done.stderr
    first, second = done.stderr.splitlines()
    assert first.startswith("sluice: error: may not look at program")
    assert "root" in second


def test_interface_names_that_are_numbers_or_odd(tmp_path: Path) -> None:
    with namespace(tmp_path) as made:
        pair = ["link", "add", "123", "type", "veth", "peer", "name", "a.b-c"]
        subprocess.run(["ip", "-n", made.name, *pair], check=True)
        subprocess.run(["ip", "-n", made.name, "link", "set", "123", "up"], check=True)
        made.hold(interface="123")
        assert in_namespace(made.name, lambda: inventory.find("123")).interface == "123"
        assert made.json("map", "list", "-i", "123")["interface"] == "123"


def test_boot_time_is_turned_into_wall_time() -> None:
    boot = time.clock_gettime_ns(ctypes.c_int(time.CLOCK_BOOTTIME).value)
    assert abs(inventory._since_epoch(boot) - time.time()) < 1

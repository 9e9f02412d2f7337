# SPDX-License-Identifier: Apache-2.0
"""The emulated machine: QEMU with two network cards that are connected to each other, and to nothing else.

It leaves nothing behind however this process ends.  Kernel, initramfs, console and report are files without a
name; QEMU is killed by the kernel when its parent dies (PR_SET_PDEATHSIG); and the network that it needs is a
namespace without a name too, which ends with the last process in it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Final, Literal

from pyroute2 import netns

from sluice_cli.vm_image import MOUNT_TAG, Job, initramfs
from sluice_cli.vm_packages import System
from xdp.errors import SluiceError, UnsupportedError

Driver = Literal["virtio", "igb"]
DRIVERS: Final[tuple[Driver, ...]] = ("virtio", "igb")

QUEUES: Final = 2
CPUS: Final = 2
MEMORY: Final = 2048  # MiB
SERVER_MAC, CLIENT_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
#: Beyond the machine's own limit, for it to start and to power off.
GRACE_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.1
_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
_TAPS: Final = ("tap0", "tap1")
# In a mount namespace of its own: /sys shows the cards of whoever mounts it.
_ONE_CPU: Final = (
    "mount -t sysfs sysfs /sys; for f in /sys/class/net/tap*/queues/rx-*/rps_cpus; do echo 1 >$f; done"
)

# Zero-copy maps packets for DMA, which virtio does only where it is told that addresses are the device's own
# (VIRTIO_F_ACCESS_PLATFORM).  Without offloads nothing is merged or left without a checksum on the way.
_VIRTIO: Final = (
    "disable-legacy=on,iommu_platform=on,rx_queue_size=1024,romfile=,"
    "csum=off,gso=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off"
)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: QEMU's exit code, what was printed, what was reported, and whether time ran out."""

    code: int
    console: str
    report: str
    seconds: float
    late: bool


def network_commands(driver: Driver) -> list[list[str]]:
    """What joins the two cards, run in the namespace that QEMU is started in.

    QEMU's hub gives a virtio card one queue; for more it wants taps, and a bridge between them.
    """
    if driver != "virtio":
        return []
    commands = [
        ["sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1", "net.ipv6.conf.all.disable_ipv6=1"],
        # Without snooping it is a plain switch that sends nothing of its own.
        ["ip", "link", "add", "bridge0", "up", "type", "bridge", "mcast_snooping", "0"],
    ]
    for tap in _TAPS:
        commands.append(["ip", "tuntap", "add", tap, "mode", "tap", "multi_queue"])
        # A bridge port holds what the other guest's card has no room for yet.
        commands.append(["ip", "link", "set", tap, "up", "txqueuelen", "10000", "master", "bridge0"])
    # What QEMU's threads write goes through the CPU that they are on, and would overtake when they move.
    commands.append(["unshare", "--mount", "sh", "-ec", _ONE_CPU])
    return commands


def card_options(driver: Driver) -> list[str]:
    """QEMU's options for the two cards: the server's first."""
    options: list[str] = []
    for number, mac in enumerate((SERVER_MAC, CLIENT_MAC)):
        if driver == "virtio":
            backend = f"tap,id=net{number},ifname={_TAPS[number]},script=no,downscript=no,queues={QUEUES}"
            # An interrupt for each queue and direction, one for the configuration, one for control.
            device = f"virtio-net-pci,netdev=net{number},mac={mac},mq=on,vectors={2 * QUEUES + 2},{_VIRTIO}"
        else:
            backend = f"hubport,id=net{number},hubid=0"
            # Each behind a port of its own: its virtual functions take the places of its neighbours.
            options += ["-device", f"pcie-root-port,id=port{number},chassis={number + 1}"]
            device = f"igb,netdev=net{number},mac={mac},bus=port{number},romfile="
        options += ["-netdev", backend, "-device", device]
    return options


def command_line(system: System, driver: Driver, initrd: str, console: str, report: str) -> list[str]:
    """QEMU's, with the paths of three files.

    Emulated throughout: the kernel's own virtualisation is not asked for, so that it runs everywhere.
    """
    share = system.root / "usr/share"
    return [
        *system.program("qemu-system-x86_64"),
        *("-L", str(share / "qemu"), "-L", str(share / "seabios")),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        # Five levels of page tables would only cost time.
        *("-machine", "q35,accel=tcg", "-cpu", "max,la57=off", "-smp", str(CPUS), "-m", str(MEMORY)),
        *("-kernel", str(system.image), "-initrd", initrd),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
        *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
        *("-chardev", f"file,id=report,path={report}", "-serial", "chardev:report"),
        *("-fsdev", f"local,id={MOUNT_TAG},path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", f"virtio-9p-pci,fsdev={MOUNT_TAG},mount_tag={MOUNT_TAG}"),
        *card_options(driver),
    ]


def run(system: System, driver: Driver, job: Job, watch: Callable[[str], None]) -> Outcome:
    """Run a job in a machine of its own, to the end; ``watch`` gets the console as it grows.

    Raises:
        UnsupportedError: no taps, bridges or namespaces here.
        SluiceError: QEMU can't be started.
    """
    with (
        tempfile.TemporaryFile() as initrd,
        tempfile.TemporaryFile() as console,
        tempfile.TemporaryFile() as report,
    ):
        initrd.write(initramfs(system, job))
        initrd.flush()
        files = [one.fileno() for one in (initrd, console, report)]
        qemu = command_line(system, driver, *(f"/proc/self/fd/{number}" for number in files))
        began = time.monotonic()
        with _own_network(driver):
            # The one thing that ends QEMU when this process is killed.
            words = ["setpriv", "--pdeathsig", "KILL", "--", *qemu]
            child = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                pass_fds=files, text=True,
            )  # fmt: skip
        try:
            late = not _wait(child, began + job.limit + GRACE_SECONDS, lambda: watch(_more(console)))
        finally:
            child.kill()
            said = child.communicate()[1]
        watch(_more(console))
        if child.returncode and not late:
            raise SluiceError(
                f"QEMU ended with code {child.returncode}: {_last(said)}",
                hint=f"remove its cache and try again: rm -r {system.root.parent}",
                detail=said,
            )
        return Outcome(child.returncode, _all(console), _all(report), time.monotonic() - began, late)


def _wait(child: subprocess.Popen[str], deadline: float, look: Callable[[], None]) -> bool:
    """Until it has ended; False when that is too late."""
    while time.monotonic() < deadline:
        try:
            child.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            look()
        else:
            return True
    return False


@contextmanager
def _own_network(driver: Driver) -> Iterator[None]:
    """This thread in a new network namespace, which lives on in the processes started meanwhile."""
    commands = network_commands(driver)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            _unshare_network()
            for command in commands:
                subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            raise UnsupportedError(
                f"cannot join the machine's cards: {_last(said)}",
                hint="it needs network namespaces, bridges and /dev/net/tun",
                detail=said,
            ) from error
        yield
    finally:
        netns.setns(home)
        os.close(home)


def _unshare_network() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _more(file: IO[bytes]) -> str:
    """What has been written since it was asked last; QEMU writes through a descriptor of its own."""
    return file.read().decode(errors="replace")


def _all(file: IO[bytes]) -> str:
    file.seek(0)
    return _more(file)


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"

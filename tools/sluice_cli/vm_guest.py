# SPDX-License-Identifier: Apache-2.0
"""Inside the emulated machine: ``python -m sluice_cli.vm_guest``, run by its first process.

Names the two cards as a lab knows them, runs the project's traffic tests on them and reports.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from sluice_cli.lab import CLIENT_INTERFACE, SERVER_INTERFACE
from sluice_cli.lab_nics import VARIABLE
from sluice_cli.testing import find_checkout
from sluice_cli.vm_image import REPORT_DEVICE
from sluice_cli.vm_machine import CLIENT_MAC, SERVER_MAC
from sluice_cli.vm_report import Case, Report, encode, read_junit
from xdp.probe_interface import driver_name

#: What is run: everything on the way of a packet, in and out, and the accounts of it.
TESTS: Final = (
    "tests/traffic/test_paths.py",
    "tests/kernel/test_datapath.py",
    "tests/kernel/test_datapath_frames.py",
    "tests/kernel/test_send_back.py",
    "tests/traffic/test_steering.py",
    "tests/traffic/test_steering_send.py",
)
#: The rungs below, which need no card and are shown everywhere else.
WITHOUT: Final = "not generic and not mmsg and not portable"
#: Of these files; what is about something that only a veth pair has.
LEFT_OUT: Final = {
    "tests/kernel/test_datapath.py::test_send_more_than_fits": "reads a counter of veth",
    "tests/kernel/test_datapath.py::test_all_queues": "a veth's queue is the sending CPU's",
    "tests/kernel/test_datapath.py::test_overflow_is_counted": "200,000 packets/s, none lost on the way",
    "tests/kernel/test_datapath_frames.py::test_a_lane_at_its_quota_hurts_nobody": "the same",
    "tests/kernel/test_datapath.py::test_ladder": "shows that veth has no zero-copy",
    "tests/kernel/test_datapath.py::test_ladder_refuses": "shows that veth has no zero-copy",
    "tests/kernel/test_datapath.py::test_send_back_is_for_own_batches": "needs two labs at a time",
}

#: With igb alone.  QEMU's igb drops what the other card has no room for, and tells the sender that it went.
LEFT_OUT_OF_IGB: Final = {
    "tests/traffic/test_steering_send.py::test_more_than_the_ring_holds": "10,000 packets, none of them lost",
}


def left_out(driver: str) -> dict[str, str]:
    """Tests and the reasons, for the cards of a driver."""
    return {**LEFT_OUT, **(LEFT_OUT_OF_IGB if driver == "igb" else {})}


def pytest_arguments(junit: Path, driver: str) -> list[str]:
    """The command line behind ``python -m pytest``."""
    without = [word for test in left_out(driver) for word in ("--deselect", test)]
    # No cache: what is written is gone with the machine.  Slow as it is, a hung test is told in time.
    options = ["-p", "no:cacheprovider", "--timeout=240", "--color=no", "--tb=short", "-v", "-rfEs"]
    return [*options, f"--junit-xml={junit}", "-k", WITHOUT, *without, *TESTS]


def name_cards() -> str:
    """Call the cards by their lab's names; their driver."""
    for name, mac in ((SERVER_INTERFACE, SERVER_MAC), (CLIENT_INTERFACE, CLIENT_MAC)):
        for path in Path("/sys/class/net").iterdir():
            if (path / "address").read_text(encoding="ascii").strip() == mac:
                subprocess.run(["ip", "link", "set", path.name, "name", name], check=True)
                # QEMU's igb offers to cut UDP_SEGMENT's messages into datagrams and then sends them whole.
                subprocess.run(["ethtool", "-K", name, "tx-udp-segmentation", "off"], check=False)
                break
        else:
            raise RuntimeError(f"no card with the address {mac}: has the kernel no driver for it?")
    return driver_name(SERVER_INTERFACE)


def run_tests(driver: str) -> Report:
    """Run them and read what they came to."""
    began = time.monotonic()
    tests: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *pytest_arguments(junit, driver)],
            cwd=find_checkout(),
            env={**os.environ, VARIABLE: f"{SERVER_INTERFACE},{CLIENT_INTERFACE}"},
            check=False,
        )
        try:
            tests, paths = read_junit(junit.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            tests, paths = [Case("pytest", "failed", str(error))], []
    return Report(
        driver,
        platform.release(),
        round(time.monotonic() - began, 1),
        done.returncode,
        tuple(tests),
        tuple(paths),
    )


def main() -> int:
    """Report, whatever happens; the exit code is of no use to anyone."""
    try:
        report = run_tests(name_cards())
    except Exception as error:  # noqa: BLE001 - outside it can be told, here nobody reads it
        report = Report("", platform.release(), 0.0, 1, (Case("machine", "failed", repr(error)),))
    Path(REPORT_DEVICE).write_text(encode(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""`sluice doctor` on lesser machines: this one with things hidden, or with fewer rights."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.ordinary_user import readable_python

pytestmark = [pytest.mark.root, pytest.mark.bpf]


def hidden(*commands: str) -> list[str]:
    """A prefix that runs the rest after these shell commands in a mount namespace of its own."""
    return ["unshare", "--mount", "sh", "-ec", " && ".join([*commands, 'exec "$@"']), "sh"]


def doctor(code: int, before: list[str] | None = None, *prefix: str) -> dict[str, dict[str, Any]]:
    """The report, by topic."""
    done = subprocess.run(
        [*(before or []), *readable_python("-m", "sluice_cli", "doctor", "--json", prefix=prefix)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    return {row["topic"]: row for row in json.loads(done.stdout)["host"]}


def empty(place: str) -> str:
    return f"mount -t tmpfs none {place}"


def test_no_btf_and_no_bpffs() -> None:
    """Neither is essential."""
    found = doctor(0, hidden(empty("/sys/kernel/btf"), "umount /sys/fs/bpf"))
    assert found["kernel BTF"]["state"] == "warn"
    assert found["bpffs"]["state"] == "warn"
    assert "mount -t bpf bpf /sys/fs/bpf" in found["bpffs"]["advice"]


def test_no_bcc() -> None:
    found = doctor(5, hidden(empty("/usr/lib/python3/dist-packages/bcc")))
    assert found["bcc"]["state"] == "missing"
    assert "python3-bpfcc" in found["bcc"]["advice"]


def test_another_package_of_the_name_bcc() -> None:
    """As pip installs it."""
    place = "/usr/lib/python3/dist-packages/bcc"
    found = doctor(5, hidden(empty(place), f"echo '__version__ = 1' >{place}/__init__.py"))
    assert found["bcc"]["detail"] == "a package of that name that is not bcc"


def test_no_libxdp() -> None:
    library = "$(readlink -f /usr/lib/*-linux-gnu/libxdp.so.1)"
    found = doctor(0, hidden(f"mount --bind /dev/null {library}"))
    assert found["libxdp"]["state"] == "missing"
    assert "libxdp-dev" in found["libxdp"]["advice"]


def test_no_headers() -> None:
    places = ["/usr/src", "/lib/modules"]
    hide = [f"if test -d {place}; then {empty(place)}; fi" for place in places]
    hide.append("if test -e /sys/kernel/kheaders.tar.xz; then mount -t tmpfs none /sys/kernel; fi")
    found = doctor(5, hidden(*hide))
    assert found["kernel headers"]["state"] == "missing"
    assert "linux-headers" in found["kernel headers"]["advice"]


@pytest.mark.parametrize(
    ("without", "code", "state"),
    [
        (["sys_admin"], 0, "warn"),
        (["net_raw"], 5, "missing"),
        (["sys_admin", "bpf"], 5, "missing"),
        ([], 0, "ok"),
    ],
    ids=["no-sys-admin", "no-net-raw", "no-bpf", "root"],
)
def test_capabilities(without: list[str], code: int, state: str) -> None:
    """CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON, nothing stands for CAP_NET_RAW."""
    less = ",".join(f"-{name}" for name in without)
    found = doctor(code, None, *(["setpriv", f"--bounding-set={less}"] if less else []))
    assert found["privileges"]["state"] == state
    if code:
        assert f"CAP_{without[-1].upper()}" in found["privileges"]["detail"]
    told = found["AF_XDP sockets"]
    assert told["state"] == ("ok" if code == 0 else "warn"), told


def test_little_locked_memory() -> None:
    less = ["prlimit", "--memlock=65536:65536"]
    found = doctor(0, less, "setpriv", "--bounding-set=-ipc_lock")
    assert found["locked memory"]["state"] == "warn"
    assert found["locked memory"]["detail"] == "64 KiB"
    assert doctor(0, less)["locked memory"]["state"] == "ok", "CAP_IPC_LOCK needs no limit"

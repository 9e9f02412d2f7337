# SPDX-License-Identifier: Apache-2.0
"""Mounting the file system that pins are in."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from xdp.bpffs import is_bpffs, mount_bpffs
from xdp.errors import PermissionsError, UnsupportedError

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty directory; what is mounted there is taken down."""
    yield tmp_path
    while is_bpffs(tmp_path):
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_mounted_once(place: Path) -> None:
    assert not is_bpffs(place)
    assert mount_bpffs(place)
    assert is_bpffs(place)
    assert place.stat().st_mode & 0o777 == 0o700
    assert not mount_bpffs(place), "one is enough"
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    (line,) = (line for line in mounts.splitlines() if f" {place} " in line)
    assert {"nosuid", "nodev", "noexec"} <= set(line.split()[5].split(","))


def test_nowhere_to_mount(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert not is_bpffs(nowhere)
    with pytest.raises(UnsupportedError, match="nowhere: No such file or directory") as caught:
        mount_bpffs(nowhere)
    assert caught.value.hint == f"mount -t bpf bpf {nowhere}"


def test_not_root(place: Path) -> None:
    before = Path.cwd()
    os.chdir(place)  # its parents are root's alone
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionsError, match="mounting a bpffs"):
            mount_bpffs(Path())
    finally:
        os.seteuid(0)
        os.chdir(before)
    assert not is_bpffs(place)

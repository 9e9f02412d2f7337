# SPDX-License-Identifier: Apache-2.0
"""The lock of an interface and the directory it lies in."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from xdp.errors import BusyError, PermissionsError, SluiceError
from xdp.state import InterfaceLock, holder, prepare


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def as_nobody(tmp_path: Path) -> Iterator[None]:
    """Root's rights, but none over files."""
    if os.geteuid() != 0:
        pytest.skip("becomes another user")
    before = Path.cwd()
    tmp_path.chmod(0o755)
    os.chdir(tmp_path)  # its parents are root's alone
    os.seteuid(65534)
    yield
    os.seteuid(0)
    os.chdir(before)


def test_the_directory_is_made_and_kept(run: Path) -> None:
    assert prepare(run) == run
    assert run.stat().st_mode & 0o777 == 0o755
    assert prepare(run) == run


def test_a_directory_that_others_can_write_to(run: Path) -> None:
    run.mkdir()
    run.chmod(0o777)
    with pytest.raises(PermissionsError, match="can be written to by others"):
        prepare(run)


def test_a_link_to_a_directory_of_somebody_else(run: Path) -> None:
    elsewhere = run.with_name("elsewhere")
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    run.symlink_to(elsewhere)
    with pytest.raises(PermissionsError):
        prepare(run)


def test_a_file_in_the_way(run: Path) -> None:
    run.write_text("", encoding="ascii")
    with pytest.raises(SluiceError, match="run: File exists"):
        prepare(run)


def test_not_root(as_nobody: None) -> None:
    with pytest.raises(PermissionsError, match="run may not be made") as caught:
        prepare(Path("run"))
    assert "root" in caught.value.hint


def test_a_lock_of_another_user(run: Path, as_nobody: None) -> None:
    os.seteuid(0)
    InterfaceLock.take("eth1", 7, run)  # stays until this process ends, as a killed owner's file does
    os.seteuid(65534)
    with pytest.raises(PermissionsError, match="may not be written"):
        InterfaceLock.take("eth1", 7, Path("run"))


def test_one_holder(run: Path) -> None:
    lock = InterfaceLock.take("eth1", 7, run)
    with pytest.raises(BusyError, match=f"eth1 is owned by process {os.getpid()}") as caught:
        InterfaceLock.take("eth1", 7, run)
    assert "sluice down eth1" in caught.value.hint
    other = InterfaceLock.take("eth2", 8, run)
    other.release()
    lock.release()
    lock.release()
    assert list(run.iterdir()) == []
    again = InterfaceLock.take("eth1", 7, run)
    assert again.path.exists()
    again.release()


def test_a_holder_that_has_not_yet_written_its_name(run: Path) -> None:
    lock = InterfaceLock.take("eth1", 7, run)
    os.truncate(lock.path, 0)
    with pytest.raises(BusyError, match="another process that is starting"):
        InterfaceLock.take("eth1", 7, run)
    lock.release()
    assert holder(lock.path) == "another process that is starting"


def test_a_file_that_is_removed_before_it_is_locked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder let go between our open and our lock: what we hold then is no longer at the path."""
    real = fcntl.flock
    removed: list[Path] = []

    def flock(descriptor: int, operation: int) -> None:
        if not removed:
            (path,) = run.glob("*.lock")
            path.unlink()
            removed.append(path)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    lock = InterfaceLock.take("eth1", 7, run)
    assert removed == [lock.path]
    assert holder(lock.path) == f"process {os.getpid()}"
    lock.release()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208

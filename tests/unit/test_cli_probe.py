# SPDX-License-Identifier: Apache-2.0
"""How answers of the kernel become findings; the real kernel's are in tests/kernel/test_probe.py."""

from __future__ import annotations

import errno
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sluice_cli.doctor import _table
from xdp import probe
from xdp.probe import Finding


@pytest.mark.parametrize(
    ("release", "state", "essential"),
    [
        ("5.10.0-30-amd64", "missing", True),
        ("5.15.0-generic", "warn", False),
        ("6.1.0-13-amd64", "ok", False),
        ("6.18.44", "ok", False),
    ],
)
def test_kernel_versions(monkeypatch: pytest.MonkeyPatch, release: str, state: str, essential: bool) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    found = next(iter(probe._kernel()))
    assert (found.detail, found.state, found.essential) == (release, state, essential)


def test_answers_of_libbpf() -> None:
    ask = probe._all_supported
    assert ask("t", {"a": 1, "b": 1}, "CONFIG", essential=True) == Finding("t", "ok", "all there")
    assert ask("t", {"a": 1, "b": 0}, "CONFIG", essential=True) == Finding(
        "t", "missing", "this kernel lacks b", "CONFIG", essential=True
    )
    assert ask("t", {"a": 0}, "CONFIG", essential=False).state == "warn"
    refused = ask("t", {"a": -errno.EPERM}, "CONFIG", essential=True)
    assert (refused.state, refused.essential) == ("warn", False)
    assert os.strerror(errno.EPERM) in refused.detail


def test_a_package_that_only_has_the_name_of_bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", ModuleType("bcc"))
    found = {one.topic: one for one in probe._libraries()}
    assert found["bcc"].state == "missing"
    assert found["bcc"].essential


def test_files_that_are_not_there_are_empty(tmp_path: Path) -> None:
    assert probe._read(str(tmp_path / "none")) == ""
    assert probe._effective_capabilities() >= 0


def test_advice_stands_below_its_row() -> None:
    table = _table([Finding("a", "ok", "fine"), Finding("b", "warn", "so so", "do this")], "host")
    assert table.rows == [["ok", "a", "fine"], ["warn", "b", "so so"], ["", "", "-> do this"]]
    assert table.styles == {0: "", 1: "yellow"}

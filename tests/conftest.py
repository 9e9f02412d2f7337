# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several rooms of tests share."""

from __future__ import annotations

import os
import posix
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sluice_cli.lab import Lab
from sluice_cli.skips import FEATURE, VECTORS, lacking, vectors_folder
from xdp.probe import probe_host

ROOT = Path(__file__).resolve().parent.parent


def _forget_coverage() -> None:
    """In a forked child.

    pyroute2 forks for each namespace and ends the child by SIGTERM.  Where coverage is measured it would then
    write all that its parent has run so far, which takes as long as the rest of a lab.
    """
    os._exit = posix._exit
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_coverage)


@pytest.fixture
def make_lab() -> Iterator[Callable[..., Lab]]:
    """Make labs with the arguments of `Lab`; all are gone at the end of the test."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(Lab(*args, **options))


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """Two hosts, one queue, nothing attached to the server's end."""
    return make_lab()


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder with real captures, which are no part of the repository."""
    folder = vectors_folder(ROOT)
    if not folder.is_dir():
        pytest.skip(f"{VECTORS}{folder} (set SLUICE_VECTORS)")
    return folder


@pytest.fixture(scope="session")
def lacking_features() -> frozenset[str]:
    """The topics of `sluice doctor` in which this kernel can't do everything."""
    return lacking(probe_host())


@pytest.fixture(autouse=True)
def skip_without_feature(request: pytest.FixtureRequest) -> None:
    """``@pytest.mark.feature("AF_XDP sockets")``: skipped when the probe says that the kernel has none."""
    for mark in request.node.iter_markers("feature"):
        lacks: frozenset[str] = request.getfixturevalue("lacking_features")
        if mark.args[0] in lacks:
            pytest.skip(f"{FEATURE}{mark.args[0]}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked root or bpf, or asks for a lab, needs root; says so instead of failing one by one."""
    if os.geteuid() == 0:
        return
    reason: Any = pytest.mark.skip(reason="needs root: run the tests with sudo")
    for item in items:
        marked = item.get_closest_marker("root") or item.get_closest_marker("bpf")
        if marked or "make_lab" in getattr(item, "fixturenames", ()):
            item.add_marker(reason)

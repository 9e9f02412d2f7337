# SPDX-License-Identifier: Apache-2.0
"""A program from the cache is the program that bcc compiled: maps, their types, what it does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.kernel import frames
from tests.kernel.steer_runs import XDP_PASS
from xdp._libbpf import lib
from xdp.bytecode import Bytecode, MapDefinition
from xdp.bytecode_cache import fetch
from xdp.compile import compile_program
from xdp.errors import UnsupportedError
from xdp.program import SteerProgram

pytestmark = pytest.mark.bpf

DEFINES = (f"SLUICE_CPUS={lib.sluice_possible_cpus()}",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Bytecode:
    return compile_program("steer.bpf.c", "sluice_steer", defines=DEFINES, cache=folder)


def test_second_time_no_compiler_is_needed(
    compiled: Bytecode, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = folder.iterdir()
    assert fetch(file.name, folder) == compiled
    monkeypatch.setitem(sys.modules, "bcc", None)
    assert compile_program("steer.bpf.c", "sluice_steer", defines=DEFINES, cache=folder) == compiled
    with pytest.raises(UnsupportedError, match="bcc's Python module is missing"):
        compile_program("steer.bpf.c", "sluice_steer", defines=(*DEFINES, "OTHER=1"), cache=folder)


def test_every_load_has_maps_of_its_own(compiled: Bytecode) -> None:
    one, two = compiled.make_maps(), compiled.make_maps()
    try:
        assert [*one] == [definition.name for definition in compiled.maps]
        assert compiled.fits(one)
        assert compiled.fits(two)
        assert not {m.info.id for m in one.values()} & {m.info.id for m in two.values()}
        assert compiled.on(one) != compiled.on(two)
        # Tools decode what they find by these.
        typed = [name for name, m in one.items() if m.info.btf_value_type_id]
        assert {"counters", "known", "strangers", "policies", "rules"} <= {*typed}
        del one["ports"]
        assert not compiled.fits(one)
    finally:
        for opened in [*one.values(), *two.values()]:
            opened.close()


def test_cookie_and_salt_are_drawn_for_each_load(steer_program: SteerProgram) -> None:
    with SteerProgram.load() as other:
        assert other.cookie != steer_program.cookie
        assert other.test_run(frames.udp_frame("198.18.0.1", 9, b"x")).retval == XDP_PASS


def test_a_map_that_the_kernel_refuses() -> None:
    wrong = Bytecode(b"", (MapDefinition("fine", 2, 4, 8, 1, 0), MapDefinition("wrong", 2, 0, 8, 1, 0)))
    with pytest.raises(UnsupportedError, match="the kernel refused to make the map wrong: Invalid argument"):
        wrong.make_maps()

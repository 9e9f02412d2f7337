# SPDX-License-Identifier: Apache-2.0
"""What commands need of a checkout: C references to compile, example policies; and what is said without."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice_cli import bench_reference, example_policy
from sluice_cli.bench_reference import compile_reference
from xdp.errors import UnsupportedError


def test_a_reference_is_compiled_once(tmp_path: Path) -> None:
    program = compile_reference("mmsg_echo", tmp_path)
    built = program.stat()
    assert program.read_bytes().startswith(b"\x7fELF")
    assert built.st_mode & 0o111
    assert compile_reference("mmsg_echo", tmp_path).stat() == built


def test_a_reference_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"nothing\.c is not here") as caught:
        compile_reference("nothing", tmp_path)
    assert "checkout" in caught.value.hint


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="no C compiler"):
        compile_reference("ping", tmp_path)


def test_a_reference_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when headers are missing."""
    (tmp_path / "xsk_broken.c").write_text("#include <not/there.h>\n", encoding="ascii")
    monkeypatch.setattr(bench_reference, "SOURCES", tmp_path)
    with pytest.raises(UnsupportedError, match=r"xsk_broken\.c does not compile") as caught:
        compile_reference("xsk_broken", tmp_path)
    assert "libxdp-dev" in caught.value.hint
    assert "not/there.h" in caught.value.detail
    assert not (tmp_path / "xsk_broken").exists()


def test_examples_of_a_checkout_and_installed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = example_policy.example_policy("validator.toml")
    assert ours.parts[-3:] == ("docs", "examples", "validator.toml")
    monkeypatch.setattr(example_policy, "_CHECKOUT", tmp_path / "none")
    monkeypatch.setattr(example_policy, "_INSTALLED", tmp_path)
    with pytest.raises(UnsupportedError, match=r"validator\.toml is neither in") as caught:
        example_policy.example_policy("validator.toml")
    assert "tools/sluice" in caught.value.hint
    (tmp_path / "validator.toml").write_text("", encoding="ascii")
    assert example_policy.example_policy("validator.toml") == tmp_path / "validator.toml"

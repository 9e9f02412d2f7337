# SPDX-License-Identifier: Apache-2.0
"""The journal of changed settings as a file: whatever is in it, a start goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xdp.errors import SluiceError
from xdp.interface import Setting
from xdp.journal import Change, Journal, journal_path

IFINDEX = 7
GOOD = {
    "version": 1,
    "ifindex": IFINDEX,
    "changes": [{"key": "gro", "before": "on", "after": "off"}],
}


def file_setting(path: Path, key: str = "gro") -> Setting:
    """A setting whose value is the content of a file."""

    def write(_interface: str, value: str) -> None:
        path.write_text(value, encoding="ascii")

    return Setting(key, lambda _interface: path.read_text(encoding="ascii"), write)


def write(run: Path, content: object) -> Path:
    path = journal_path(IFINDEX, run)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    path.chmod(0o644)
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert Journal.open(IFINDEX, tmp_path).changes == (Change("gro", "on", "off"),)


def test_none_is_an_empty_one(tmp_path: Path) -> None:
    assert Journal.open(IFINDEX, tmp_path).changes == ()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        json.dumps(GOOD)[:-4],
        {**GOOD, "version": 2},
        {**GOOD, "more": 1},
        {**GOOD, "changes": [{"key": "gro"}]},
        {**GOOD, "changes": [{"key": "../../x", "before": "a", "after": "b"}]},
        "[" * 100_000,
        " " * (1 << 17),
    ],
    ids=range(10),
)
def test_what_is_none_is_put_aside(tmp_path: Path, content: object) -> None:
    path = write(tmp_path, content)
    assert Journal.open(IFINDEX, tmp_path).changes == ()
    assert not path.exists()
    assert path.with_name(f"{path.name}.unreadable").exists()


def test_one_that_others_may_write_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path, GOOD).chmod(0o666)
    assert Journal.open(IFINDEX, tmp_path).changes == ()


def test_of_an_earlier_interface_with_that_number(tmp_path: Path) -> None:
    write(tmp_path, {**GOOD, "ifindex": 8})
    assert Journal.open(IFINDEX, tmp_path).changes == ()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    journal_path(IFINDEX, tmp_path).write_bytes(content)
    assert Journal.open(IFINDEX, tmp_path).changes == ()


def test_written_before_the_change(tmp_path: Path) -> None:
    value = tmp_path / "value"
    value.write_text("on", encoding="ascii")
    seen = []
    setting = file_setting(value)

    def look_first(interface: str, wanted: str) -> None:
        seen.append(json.loads(journal_path(IFINDEX, tmp_path).read_text(encoding="utf-8"))["changes"])
        setting.write(interface, wanted)

    journal = Journal.open(IFINDEX, tmp_path)
    assert journal.set("eth1", Setting("gro", setting.read, look_first), "off")
    assert seen == [[{"key": "gro", "before": "on", "after": "off"}]]
    assert Journal.open(IFINDEX, tmp_path).changes == (Change("gro", "on", "off"),)


def test_what_it_became_counts(tmp_path: Path) -> None:
    """A driver that rounds: the value that is there later is the one to be recognised."""
    value = tmp_path / "value"
    value.write_text("0", encoding="ascii")

    def to_tens(_interface: str, wanted: str) -> None:
        value.write_text(str(int(wanted) // 10 * 10), encoding="ascii")

    rounding = Setting("gro_flush_timeout", lambda _interface: value.read_text(encoding="ascii"), to_tens)
    journal = Journal.open(IFINDEX, tmp_path)
    assert journal.set("eth1", rounding, "1234")
    assert Journal.open(IFINDEX, tmp_path).changes == (Change("gro_flush_timeout", "0", "1230"),)


def test_no_change_no_journal(tmp_path: Path) -> None:
    value = tmp_path / "value"
    value.write_text("on", encoding="ascii")
    assert not Journal.open(IFINDEX, tmp_path).set("eth1", file_setting(value), "on")
    assert not journal_path(IFINDEX, tmp_path).exists()


def test_a_refused_change_is_not_in_it(tmp_path: Path) -> None:
    value = tmp_path / "value"
    value.write_text("on", encoding="ascii")

    def refuse(_interface: str, _value: str) -> None:
        raise SluiceError("no")

    journal = Journal.open(IFINDEX, tmp_path)
    with pytest.raises(SluiceError, match="no"):
        journal.set("eth1", Setting("gro", file_setting(value).read, refuse), "off")
    assert not journal_path(IFINDEX, tmp_path).exists()


def test_no_journal_no_change(tmp_path: Path) -> None:
    value = tmp_path / "value"
    value.write_text("on", encoding="ascii")
    journal = Journal(journal_path(IFINDEX, tmp_path / "missing"), IFINDEX)
    with pytest.raises(SluiceError, match=r"writing .*journal"):
        journal.set("eth1", file_setting(value), "off")
    assert value.read_text(encoding="ascii") == "on"


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    value = tmp_path / "value"
    value.write_text("on", encoding="ascii")
    journal = Journal.open(IFINDEX, tmp_path)
    journal.set("eth1", file_setting(value), "off")
    journal.forget()
    assert [path.name for path in tmp_path.iterdir()] == ["value"]

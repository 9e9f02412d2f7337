# SPDX-License-Identifier: Apache-2.0
"""The command line itself: help, errors, exit codes, JSON, colour, pipes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

from sluice_cli import main as cli
from sluice_cli.output import Output, Table, examples, samples
from xdp.errors import (
    BusyError,
    NotLoadedError,
    PermissionsError,
    PolicyError,
    SluiceError,
    UnsupportedError,
    UsageError,
    VerifierError,
)

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sluice_cli", *words], capture_output=True, text=True, check=False, timeout=60,
        env=environment(**more),
    )  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")]), "COLUMNS": "100", **more}


def test_help_names_every_command_and_imports_none() -> None:
    code = (
        "import sys; from sluice_cli.main import main; main(['--help']); "
        "slow = {'bcc', 'pyroute2', 'rich', 'scapy', 'msgspec'} & set(sys.modules); assert not slow, slow"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr
    for name in cli.SUBCOMMANDS:
        assert f"\n  {name} " in done.stdout


def test_help_takes_little_more_than_click() -> None:
    """In modules, for time depends on the machine: `sluice --help` must be there at once."""

    def loaded(code: str) -> int:
        # Not measured by coverage, which loads modules of its own.
        clean = {name: value for name, value in environment().items() if not name.startswith("COVERAGE_")}
        told = "; import sys; print(len(sys.modules), file=sys.stderr)"
        done = subprocess.run(
            [sys.executable, "-c", code + told], capture_output=True, text=True, check=True, env=clean
        )
        return int(done.stderr)

    help_text = "from sluice_cli.main import main; main(['--help'])"
    assert loaded(help_text) < loaded("import click") + 40


def present() -> list[str]:
    folder = ROOT / "tools" / "sluice_cli"
    return [name for name, entry in cli.SUBCOMMANDS.items() if (folder / f"{entry.module}.py").exists()]


@pytest.mark.parametrize("name", present())
def test_every_command_has_help_that_agrees_with_the_list(name: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    assert command.help is not None
    if name != "replay":  # its own help names the argument
        assert command.help.split("\n")[0] == cli.SUBCOMMANDS[name].help


@pytest.mark.parametrize("name", ["status", "lanes", "peers", "down", "check", "doctor"])
def test_every_report_has_examples_and_json(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0
    assert "Examples:" in done.stdout
    assert "--json" in done.stdout


@pytest.mark.parametrize("name", ["list", "show", "dump", "get", "set", "delete", "watch"])
def test_every_map_command_has_examples_and_json(name: str) -> None:
    done = run("map", name, "--help")
    assert done.returncode == 0
    assert "Examples:\n    sluice map" in done.stdout
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["statsu"], "no such command: statsu", "did you mean `sluice status`?"),
        (["frobnicate"], "no such command: frobnicate", "`sluice --help` lists the commands"),
        (["status", "--nope"], "no such option", "`sluice status --help` shows the usage"),
        (["map", "get"], "missing argument 'NAME'", "`sluice map get --help` shows the usage"),
        (["status", "--interval", "soon"], "invalid value for '--interval'", "`sluice status --help`"),
        (["check"], "missing argument 'FILE...'", "`sluice check --help` shows the usage"),
        (["--color", "pink", "status"], "invalid value for '--color'", "`sluice --help`"),
    ],
)
def test_a_wrong_command_line(words: list[str], message: str, hint: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith(f"sluice: error: {message}")
    assert second.startswith(f"hint: {hint}")


def test_errors_as_json_go_to_standard_output() -> None:
    for words in (["--json", "nope"], ["nope", "--json"]):
        done = run(*words)
        assert done.returncode == 2
        assert done.stderr == ""
        document = json.loads(done.stdout)
        assert document["version"] == 1
        assert document["error"] == {
            "type": "UsageError",
            "message": "no such command: nope",
            "hint": "`sluice --help` lists the commands",
            "exit_code": 2,
        }
    assert run("nope", "--", "--json").stdout == ""  # after -- it is no option


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("sluice ")


def test_no_words_at_all_show_the_help() -> None:
    for words in ([], ["map"]):
        done = run(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("Usage: sluice")


def test_shells_can_complete_commands() -> None:
    done = run(_SLUICE_COMPLETE="bash_complete", COMP_WORDS="sluice sta", COMP_CWORD="1")
    assert done.stdout.strip() == "plain,status"
    assert "_sluice_completion" in run(_SLUICE_COMPLETE="bash_source").stdout


@pytest.mark.parametrize(
    ("error", "code", "first"),
    [
        (UsageError("a"), 2, "a"),
        (PermissionsError("b"), 4, "b"),
        (UnsupportedError("c"), 5, "c"),
        (BusyError("d"), 6, "d"),
        (NotLoadedError("two\n lines"), 7, "two lines"),
        (VerifierError("e"), 8, "e"),
        (SluiceError("f"), 1, "f"),
        (OSError(errno.EPERM, "Operation not permitted"), 4, "Operation not permitted"),
        (OSError(errno.ENOSPC, "No space left on device", "/run/x"), 1, "/run/x: No space left on device"),
        (ZeroDivisionError("oh"), 1, "internal error: ZeroDivisionError: oh"),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    first: str,
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli.cli, "invoke", crash)
    assert cli.main(["check", "x"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == f"sluice: error: {first}"
    assert "Traceback" not in captured.err


def test_verbose_shows_detail_and_where_a_bug_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise VerifierError("refused", hint="look", detail="R1 invalid mem access\nprocessed 3 insns\n")

    monkeypatch.setattr(cli.cli, "invoke", refuse)
    assert cli.main(["status", "-v"]) == 8
    assert capsys.readouterr().err.splitlines() == [
        "sluice: error: refused", "hint: look", "R1 invalid mem access", "processed 3 insns",
    ]  # fmt: skip
    assert cli.main(["status"]) == 8
    assert "R1" not in capsys.readouterr().err
    assert cli.main(["status", "--json", "--verbose"]) == 8
    assert json.loads(capsys.readouterr().out)["error"]["detail"].startswith("R1")

    def break_down(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(cli.cli, "invoke", break_down)
    assert cli.main(["status", "--verbose"]) == 1
    assert "break_down" in capsys.readouterr().err


def test_ctrl_c_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (KeyboardInterrupt(), click.Abort()):

        def interrupt(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(cli.cli, "invoke", interrupt)
        assert cli.main(["status"]) == 130
        assert capsys.readouterr() == ("", "")


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    for words in (["--help"], ["doctor", "--json"]):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "sluice_cli", *words]
        done = subprocess.run(
            command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=environment()
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, ""), words


def test_a_module_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.SUBCOMMANDS, "status", cli.Subcommand("not_there", "x", "-"))
    assert cli.main(["status"]) == UnsupportedError.exit_code
    assert "not_there" in capsys.readouterr().err


# --- output ----------------------------------------------------------------------------------------------


def test_colour_only_where_someone_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    terminal: Any = Terminal()
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Output().colored(terminal)
    assert not Output().colored()  # pytest captures, so this is no terminal
    assert Output(color="always").colored()
    assert not Output(color="never").colored(terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Output().colored(terminal)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not Output().colored(terminal)


def test_errors_are_coloured_when_told_to() -> None:
    assert "\x1b[31m" in run("--color", "always", "nope").stderr
    assert "\x1b[31m" in run("nope", "--color=always").stderr
    assert "\x1b" not in run("nope").stderr


def test_a_terminal_gets_a_table_from_rich(tmp_path: Path) -> None:
    """On a real pseudo-terminal, with colour and without."""
    policy = tmp_path / "p.toml"
    policy.write_text(MINIMAL, encoding="utf-8")
    for more, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        text = on_terminal("check", str(policy), **more)
        assert "votes" in text
        assert "─" in text  # rich's line below the head
        assert ("\x1b[32m" in text) is coloured


MINIMAL = """
version = 1
[[lane]]
name = "votes"
[[service]]
name = "s"
ports = [1]
[[service.rule]]
action = "lane"
lane = "votes"
"""


def on_terminal(*words: str, **more: str) -> str:
    primary, secondary = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "sluice_cli", *words], stdout=secondary, stderr=secondary,
        env=environment(TERM="xterm", **more),
    )  # fmt: skip
    os.close(secondary)
    text = b""
    try:
        while chunk := os.read(primary, 65536):
            text += chunk
    except OSError as error:
        if error.errno != errno.EIO:  # the other end has closed
            raise
    finally:
        os.close(primary)
    assert process.wait(timeout=30) == 0
    return text.decode()


def test_plain_tables_align() -> None:
    table = Table(["name", "n"], [["a", "1"], ["long name", "1000"]], frozenset({1}), "title")
    assert list(table.lines()) == ["title", "name          n", "a             1", "long name  1000"]
    assert list(Table(["", ""], [["a", "b"]]).lines()) == ["a  b"]
    assert list(Table(["", ""], []).lines()) == []


def test_examples_keep_their_lines() -> None:
    assert examples("  a\n    b ") == "\b\nExamples:\n  a\n  b"


def test_samples_keep_to_their_grid() -> None:
    start = time.monotonic()
    assert list(samples(0.02, 4)) == [0, 1, 2, 3]
    assert time.monotonic() - start >= 0.06


# --- check -----------------------------------------------------------------------------------------------


def test_check_accepts_every_example() -> None:
    files = sorted(map(str, (ROOT / "docs" / "examples").glob("*.toml")))
    assert len(files) >= 3
    done = run("check", *files, "--json")
    assert done.returncode == 0, done.stdout
    document = json.loads(done.stdout)
    assert document["version"] == 1
    assert document["ok"] is True
    assert [one["file"] for one in document["files"]] == files
    for one in document["files"]:
        assert one["lanes"]
        assert one["services"]
        assert one["ports"] > 0


def test_check_says_all_that_is_wrong_and_all_that_is_right(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(MINIMAL.replace("[1]", '[53, "60-62", 70]'), encoding="utf-8")
    bad.write_text(MINIMAL.replace("votes", "rates", 1), encoding="utf-8")
    missing = tmp_path / "missing.toml"
    done = run("check", str(bad), str(good), str(missing))
    assert done.returncode == PolicyError.exit_code
    assert f"{good}: ok" in done.stdout
    assert "53, 60-62, 70" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("sluice: error: ")]
    assert [str(bad) in errors[0], str(missing) in errors[1], len(errors)] == [True, True, 2]
    document = json.loads(run("check", str(bad), str(good), "--json").stdout)
    assert [document["ok"], *(one["ok"] for one in document["files"])] == [False, False, True]

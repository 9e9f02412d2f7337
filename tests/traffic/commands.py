# SPDX-License-Identifier: Apache-2.0
"""Commands of `sluice` as processes that make labs, and proof that they leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from sluice_cli.lab import NETNS_DIRECTORY, Lab
from sluice_cli.lab_state import Marker, read_markers
from tests.ordinary_user import nobodys_python
from tests.traffic.served import ENVIRONMENT, until
from xdp.errors import SluiceError
from xdp.link import attached_program, program_name

COMMAND = [sys.executable, "-m", "sluice_cli"]
#: For what takes seconds on an idle machine.
PATIENCE = 120.0
EXIT_INTERRUPTED = 130


def run(*words: str, nobody: bool = False) -> subprocess.CompletedProcess[str]:
    """To its end; nothing that it started may outlive it."""
    with _started(*words, nobody=nobody) as process:
        out, errors = process.communicate(timeout=PATIENCE)
        assert not session(process.pid), "processes are left"
    return subprocess.CompletedProcess(words, process.returncode, out, errors)


def report(*words: str) -> dict[str, Any]:
    """What it prints with --json: one document, nothing else, and no word on stderr."""
    done = run(*words, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["version"] == 1
    return document


def refused(*words: str, nobody: bool = False) -> tuple[int, dict[str, Any]]:
    """Exit code and error of a command that can't be run; in text it is one line and a hint."""
    plain = run(*words, nobody=nobody)
    assert plain.stdout == ""
    lines = plain.stderr.splitlines()
    assert lines[0].startswith("sluice: error: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), plain.stderr
    done = run(*words, "--json", nobody=nobody)
    assert done.returncode == plain.returncode
    error: dict[str, Any] = json.loads(done.stdout)["error"]
    assert error["exit_code"] == done.returncode
    assert lines[0] == f"sluice: error: {error['message']}"
    return done.returncode, error


def interrupt(*words: str, whom: Literal["process", "terminal"], when: Literal["lab", "program"]) -> None:
    """Ctrl-C once its lab, or a program on the lab's server, is there: exit 130 and nothing left."""
    with _started(*words) as process:
        marker = until(lambda: _lab_of(process.pid), "the command's lab", PATIENCE)
        assert marker is not None
        lab = Lab.open(marker.name)
        program = None
        if when == "program":
            program = until(lambda: _program(lab), "a program on the server", PATIENCE)
        if whom == "terminal":  # Ctrl-C reaches everybody in the foreground
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == EXIT_INTERRUPTED, out + errors
        assert out == ""
        assert "Traceback" not in errors
        assert not session(process.pid), "processes are left"
    assert not _lab_of(process.pid)
    assert not any((NETNS_DIRECTORY / namespace).exists() for namespace in marker.namespaces)
    if program is not None:
        until(lambda: program_name(program) == "?", "the program is unloaded")


def killed(*words: str) -> None:
    """kill -9 once a program is on its lab's server: its processes end by themselves, a start tidies up."""
    with _started(*words) as process:
        marker = until(lambda: _lab_of(process.pid), "the command's lab", PATIENCE)
        assert marker is not None
        lab = Lab.open(marker.name)
        until(lambda: _program(lab), "a program on the server", PATIENCE)
        process.kill()
        process.wait(PATIENCE)
        until(lambda: not session(process.pid), "all its processes are gone")
    with Lab():
        assert not any((NETNS_DIRECTORY / namespace).exists() for namespace in marker.namespaces)


def session(leader: int) -> list[int]:
    """Processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # proc(5): pid (command) state parent group session ...; the command may hold anything
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def _started(*words: str, nobody: bool = False) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        nobodys_python("-m", "sluice_cli", *words) if nobody else [*COMMAND, *words],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:  # the test failed
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        for pid in session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _lab_of(pid: int) -> Marker | None:
    for marker in read_markers()[0]:
        if marker.owner_pid == pid and marker.ready:
            return marker
    return None


def _program(lab: Lab) -> int | None:
    with contextlib.suppress(SluiceError), lab.server.enter():
        found = attached_program(lab.server.ifindex)
        return found[0] if found else None
    return None

# SPDX-License-Identifier: Apache-2.0
"""`sluice simulate connections`: what it prints and exits with; the same seeds, the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sluice_cli.main import EXIT_INTERRUPTED, main
from userspace.simulation.connection_scenarios import SCENARIOS, scenario

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["simulate", "connections"]
SOME = [*WORDS, "--scenario", "line", "--scenario", "death"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"}


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts are switched off, and nobody may be told."""
    monkeypatch.setitem(
        SCENARIOS, "death", msgspec.structs.replace(scenario("long-death"), name="death", calm=True)
    )


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--list"]) == 0
    out = capsys.readouterr().out
    for one in SCENARIOS.values():
        assert one.name in out
        assert one.about in out
    assert main([*WORDS, "--list", "--json"]) == 0
    assert [one["name"] for one in document(capsys)["scenarios"]] == list(SCENARIOS)


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SOME, "--seeds", "3"]) == 0
    out = capsys.readouterr().out
    assert "6 runs, 0 violations" in out
    assert out.index("\nline ") < out.index("\ndeath ")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SOME, "--seeds", "4", "--json"]) == 0
    found = document(capsys)
    assert (found["version"], found["first_seed"], found["seeds"], found["ok"]) == (1, 1, 4, True)
    assert [(one["scenario"], one["seeds"], one["violations"]) for one in found["runs"]] == [
        ("line", 4, 0), ("death", 4, 0)
    ]  # fmt: skip
    assert found["runs"][1]["figures"]["back_most"] > 0


def test_other_processes_give_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing hangs on the hash seed of a process, nor on how many there are."""
    words = [*SOME, "--seeds", "22", "--json"]
    assert main([*words, "--jobs", "1"]) == 0
    first = capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "sluice_cli", *words, "--jobs", "2"], capture_output=True, text=True,
        check=True, env={**ENVIRONMENT, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert done.stdout == first


def test_one_seed_is_told_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--scenario", "death", "--seed", "3", "--verbose", "--json"]) == 0
    out, errors = capsys.readouterr()
    assert "connection 0 to endpoint 0 is open" in errors
    found = json.loads(out)
    assert (found["first_seed"], found["seeds"]) == (3, 1)
    assert main([*WORDS, "--scenario", "death", "--seed", "3", "--json"]) == 0
    quietly = capsys.readouterr()
    assert (quietly.out, quietly.err) == (out, "")


def test_scale_and_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--scenario", "steady", "--seed", "1", "--json"]
    assert main([*words, "--scale", "4", "--seconds", "10"]) == 0
    found = document(capsys)
    assert (found["scale"], found["seconds"]) == (4.0, 10.0)
    assert found["runs"][0]["counts"]["connections"] == 12


@pytest.mark.usefixtures("impossible")
def test_a_broken_promise(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SOME, "--seeds", "2", "--scale", "2"]) == 1
    out = capsys.readouterr().out
    assert "death, seed 1, at " in out
    assert "    sluice simulate connections --scenario death --seed 1 --scale 2 -v\n" in out
    assert "4 runs, 2 violations" in out
    assert main([*WORDS, "--scenario", "death", "--seed", "2", "--json"]) == 1
    found = document(capsys)
    assert found["ok"] is found["runs"][0]["ok"] is False
    (told,) = found["runs"][0]["broken"]
    assert (told["scenario"], told["seed"]) == ("death", 2)
    assert told["at"] > 0
    assert told["what"]


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SOME, "--seeds", "2", "--verbose"]) == 0
    errors = capsys.readouterr().err
    assert "[1 of 2] line: 2 of 2 seeds, 0 violations" in errors
    assert "[2 of 2] death: 2 of 2 seeds, 0 violations" in errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--scenario", "none"], "no scenario 'none'"),
        (["--seed", "1", "--seeds", "2"], "--seed is one run"),
        (["--seed", "-1"], "seed"),
        (["--seeds", "0"], "seeds"),
        (["--scale", "0"], "scale"),
        (["--scale", "nan"], "scale"),
        (["--seconds", "1"], "seconds"),
        (["--jobs", "0"], "jobs"),
    ],
)
def test_mistakes(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, *words]) == 2
    assert says in capsys.readouterr().err


def test_ctrl_c_ends_it_at_once() -> None:
    """With all of its processes, without a traceback, and without half a document."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sluice_cli", *WORDS, "-v", "--seeds", "100000", "--jobs", "2", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        first = process.stderr.readline()  # it has begun
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        out, errors = process.communicate(timeout=60)  # which waits for the last one that holds the pipe
    finally:
        process.kill()
        process.wait()
    assert "of 100000 seeds" in first
    assert process.returncode == EXIT_INTERRUPTED
    assert out == ""
    assert "Traceback" not in errors

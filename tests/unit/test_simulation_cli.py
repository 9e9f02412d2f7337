# SPDX-License-Identifier: Apache-2.0
"""`sluice simulate flow`: what it prints, draws and exits with; the same seed, the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from sluice_cli.main import EXIT_INTERRUPTED, main
from sluice_cli.simulate_plot import draw
from userspace.flow.registry import CONTROLLERS
from userspace.simulation import flow_scenarios
from userspace.simulation.disciplines import TailDrop
from userspace.simulation.flow_report import simulate
from userspace.simulation.flow_scenarios import SCENARIOS, Scenario, Threshold, scenario
from userspace.simulation.network import Network

ROOT = Path(__file__).resolve().parents[2]
OVERLOAD = ["simulate", "flow", "--scenario", "overload"]
LOSS = ["simulate", "flow", "--scenario", "loss", "--controller", "cubic", "--seconds", "1"]


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "flow", "--list"]) == 0
    out = capsys.readouterr().out
    for name in (*SCENARIOS, *CONTROLLERS):
        assert name in out
    assert main(["simulate", "flow", "--list", "--json"]) == 0
    listed = document(capsys)
    assert [one["name"] for one in listed["scenarios"]] == list(SCENARIOS)
    assert listed["controllers"] == list(CONTROLLERS)
    assert listed["default_controller"] in CONTROLLERS


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OVERLOAD, "--seconds", "2"]) == 0
    out = capsys.readouterr().out
    assert "seed 1: 4 thresholds, 0 missed" in out
    assert "overload: holds: high.delay_p99" in out
    assert "overflow" in out


def test_json_has_the_same_bytes_for_the_same_seed(capsys: pytest.CaptureFixture[str]) -> None:
    def run(seed: int) -> str:
        assert main([*LOSS, "--json", "--seed", str(seed)]) == 0
        return capsys.readouterr().out

    first = run(5)
    assert first == run(5)
    assert first != run(6)
    found = json.loads(first)
    assert (found["version"], found["seed"], found["ok"]) == (1, 5, True)
    assert [run["scenario"] for run in found["runs"]] == ["loss"]
    assert found["runs"][0]["controllers"] == ["cubic"]


def test_another_process_gives_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing hangs on the hash seed of a process."""
    words = [*OVERLOAD, "--seconds", "1", "--json"]
    assert main(words) == 0
    done = subprocess.run(
        [sys.executable, "-m", "sluice_cli", *words], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}", "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert done.stdout == capsys.readouterr().out


def test_a_missed_threshold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    impossible = replace(scenario("overload"), thresholds=(Threshold("utilisation", at_least=2.0),))
    monkeypatch.setitem(flow_scenarios.SCENARIOS, "overload", impossible)
    assert main([*OVERLOAD, "--seconds", "1"]) == 1
    out = capsys.readouterr().out
    assert "overload: missed: utilisation" in out
    assert "1 thresholds, 1 missed" in out
    assert main([*OVERLOAD, "--seconds", "1", "--json"]) == 1
    found = document(capsys)
    assert found["ok"] is found["runs"][0]["ok"] is False


def test_several_runs_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.svg"
    words = ["simulate", "flow", "--scenario", "latecomer", "--scenario", "mixed", "--seconds", "1"]
    controllers = ["--controller", "cubic", "--controller", "newreno"]
    code = main([*words, *controllers, "--plot", str(plot), "--json"])
    runs = document(capsys)["runs"]
    assert code == (0 if all(run["ok"] for run in runs) else 1)
    assert [(run["scenario"], run["controllers"]) for run in runs] == [
        ("latecomer", ["cubic"]), ("latecomer", ["newreno"]), ("mixed", ["cubic", "bbr"])
    ]  # fmt: skip
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["plot-latecomer-cubic.svg", "plot-latecomer-newreno.svg", "plot-mixed-cubic-bbr.svg"]
    for name in names:
        ET.parse(tmp_path / name)


def test_one_plot(tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    assert main([*LOSS, "--seed", "3", "--plot", str(plot)]) == 0
    text = plot.read_text(encoding="utf-8")
    assert text == draw(*simulate(scenario("loss"), ("cubic",), seed=3, seconds=1.0))
    assert "goodput" in text
    assert "seed 3" in text


def test_a_plot_of_sources_has_no_windows() -> None:
    text = draw(*simulate(scenario("overload"), seconds=1.0))
    assert "goodput" in text
    assert "window" not in text


def test_a_plot_of_a_long_run_is_thinned() -> None:
    def build(network: Network, _: tuple[str, ...]) -> None:
        link = network.link("link", rate=1e4, queue=TailDrop(limit_packets=5))
        network.source("source", (link,), rate=1e4)

    text = draw(*simulate(Scenario("slow", "a slow link", "", build, seconds=60.0, controllers=())))
    lines = [line for line in text.splitlines() if line.startswith("<polyline")]
    assert max(line.count(",") for line in lines) <= 385


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--scenario", "none"], "no scenario 'none'"),
        (["--controller", "none"], "no controller 'none'"),
        (["--seconds", "0"], "seconds"),
        (["--seconds", "nan"], "seconds"),
        (["--seed", "-1"], "seed"),
        (["--scenario", "overload", "--plot", "no/such/folder/plot.svg"], "no folder"),
    ],
)
def test_mistakes(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "flow", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_plot_that_cant_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / ("x" * 300)
    assert main([*OVERLOAD, "--seconds", "1", "--plot", str(plot)]) == 1
    assert "File name too long" in capsys.readouterr().err


def test_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    """Without a traceback, and without half a document; else the time limit of communicate ends it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sluice_cli", "-v", *OVERLOAD, "--seconds", "600", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        first = process.stderr.readline()  # it has begun
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "of 600 simulated seconds" in first
    assert process.returncode == EXIT_INTERRUPTED
    assert out == ""
    assert "Traceback" not in errors
